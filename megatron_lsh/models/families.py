"""Which class of model a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable

from megatron_lsh.config.bert import BertConfig
from megatron_lsh.config.config import Config
from megatron_lsh.config.finetune import FinetuneConfig
from megatron_lsh.config.t5 import T5Config
from megatron_lsh.models.bert import BertModel
from megatron_lsh.models.classification import make_classifier
from megatron_lsh.models.gpt import GPTModel
from megatron_lsh.models.language_model import LanguageModel
from megatron_lsh.models.t5 import T5Model


def model_of(cfg: Config) -> Callable[..., LanguageModel]:
    """The model of `cfg`'s family; called with (cfg, padded vocabulary, context, telemetry) it has no values yet."""
    if isinstance(cfg, FinetuneConfig):
        classes = len(cfg.finetune.classes or ()) or 2  # without the data two, the least there can be
        return lambda cfg, *rest: make_classifier(cfg, classes, *rest)
    if isinstance(cfg, T5Config):
        return T5Model
    return BertModel if isinstance(cfg, BertConfig) else GPTModel
