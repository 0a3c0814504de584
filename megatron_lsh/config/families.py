"""What only one of the model families, or only fine-tuning, has: derived values and rules by the configuration's class."""

from __future__ import annotations

from megatron_lsh.config.bert import BertConfig, check_bert, refuse_relative_positions
from megatron_lsh.config.checker import Checker
from megatron_lsh.config.classification import ClassificationConfig, check_classification, derive_classification
from megatron_lsh.config.config import Config
from megatron_lsh.config.t5 import T5Config, check_t5, derive_t5


def derive_family(cfg: Config, check: Checker, world_size: int) -> None:
    """Fill in what the rest of the configuration is derived from."""
    if isinstance(cfg, T5Config):
        derive_t5(cfg, check)
    if isinstance(cfg, ClassificationConfig):
        derive_classification(cfg, check, world_size)


def check_family(cfg: Config, check: Checker) -> None:
    """The rules of one family, and the absence of what other families have."""
    if isinstance(cfg, T5Config):
        check_t5(cfg, check)
    elif isinstance(cfg, BertConfig):
        check_bert(cfg, check)
    else:
        refuse_relative_positions(check)
    # T5 counts the decoder's layers after the encoder's.
    if cfg.moe.num_experts is not None and not isinstance(cfg, T5Config):
        check.rule(
            "{lsh_start_layer} must be below {num_layers}",
            lambda start, layers: start < layers,
            "use --moe-token-dispatcher-type alltoall to run every layer exactly",
        )
    if isinstance(cfg, ClassificationConfig):
        check_classification(cfg, check)
    elif isinstance(cfg, BertConfig | T5Config):
        check.rule(
            "{sample_prompt} must not be given: only a GPT continues a text", lambda _: False, "drop --sample-prompt"
        )
