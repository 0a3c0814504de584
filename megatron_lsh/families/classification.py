"""Classifiers of texts, made of pretrained models of any family, and zero-shot classification with a GPT."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lsh.config import Config, required, validate
from megatron_lsh.config.classification import ClassificationConfig
from megatron_lsh.config.config_file import read_document
from megatron_lsh.config.from_checkpoint import first_weights
from megatron_lsh.config.serialize import as_saved_config, settings_given_in
from megatron_lsh.data.loader import Datasets
from megatron_lsh.data.samples.classification import (
    ClassificationData,
    Encoding,
    EvaluationOrder,
    ExampleSet,
    TrainingOrder,
    class_names,
    samples_per_epoch,
    tokenize_sets,
)
from megatron_lsh.data.samples.labelled_texts import read_sets
from megatron_lsh.data.samples.zero_shot import Prompt, ZeroShotSet
from megatron_lsh.data.tokenizers import Tokenizer, build_tokenizer
from megatron_lsh.errors import DataError
from megatron_lsh.families.family import Batch, Counts, Criterion, Family, Head
from megatron_lsh.families.losses import Losses, Mean
from megatron_lsh.families.scores import ClassJudge
from megatron_lsh.models.classification import HEAD, GPTScorer
from megatron_lsh.models.model import Model
from megatron_lsh.models.stacks import Stack
from megatron_lsh.parallel.context import ParallelContext

TRIM_TO = 8
"""batches are cut to their longest text, rounded up to a multiple of this times the tensor-parallel size"""


def classifier(
    name: str,
    config: type[ClassificationConfig],
    stacks: Callable[[Any], tuple[Stack, ...]],
    model: Callable[..., Model],
    *,
    unused_parameters: tuple[str, ...],
    fresh_parameters: Callable[[Any], tuple[str, ...]] = lambda cfg: (HEAD,),
) -> Family:
    """The classifiers that are made of a family's pretrained models.

    Args:
        name, config, stacks, model: of the classifiers, as in ``Family``.
        unused_parameters, fresh_parameters: as in ``Family``.
    """
    return Family(
        name=name,
        config=config,
        stacks=stacks,
        model=model,
        head=lambda cfg, vocab_size: Head(),
        datasets=_not_read,
        losses=class_losses,
        loss_tokens=lambda batch: len(batch["label"]),
        judge=lambda cfg: ClassJudge(len(cfg.finetune.classes), class_scores),
        criterion=_criterion,
        # An evaluation of a head that starts afresh would mean nothing: then the checkpoint must have it.
        fresh_parameters=lambda cfg: () if cfg.training.skip_train else fresh_parameters(cfg),
        unused_parameters=unused_parameters,
        prepare=prepare,
    )


@dataclass(frozen=True)
class Texts:
    """The data of a run, read on every rank before any process group exists."""

    classes: list[str]
    trained: ClassificationData | None
    """None for --zero-shot"""
    prompts: dict[str, ZeroShotSet]
    """by set, "valid" and "test"; empty without --zero-shot"""

    @property
    def examples(self) -> int | None:
        """Number of training texts; None without training."""
        return len(self.trained.train) if self.trained is not None and self.trained.train is not None else None


def prepare(family: Family, written: ClassificationConfig, world_size: int) -> tuple[ClassificationConfig, Family]:
    """The validated configuration, with the length of the run and the classes that follow from the data; and the family with
    the data.

    Args:
        family: the classifiers, without data.
        written: as ``parse_classification_args`` returns it. Not changed.

    Raises:
        ConfigError, DataError: see ``validate`` and `read_texts`.
    """
    texts = read_texts(validate(written, world_size))
    # The order of the classes is part of the model: config.json and checkpoints must say it.
    tune = dataclasses.replace(written.finetune, classes=texts.classes)
    cfg = validate(dataclasses.replace(written, finetune=tune, examples=texts.examples), world_size)
    began = _classes_of(first_weights(cfg.checkpoint, "config.json"))
    other = began is not None and began != texts.classes
    return cfg, dataclasses.replace(_with_texts(family, cfg, texts), renewed_parameters=(HEAD,) if other else ())


def _classes_of(path: Path | None) -> list[str] | None:
    """The classes in the configuration of a checkpoint; None if it has none."""
    document = None if path is None else as_saved_config(read_document(str(path)))
    if document is None:
        return None
    classes = settings_given_in(document).get("finetune", {}).get("classes")
    return list(classes) if isinstance(classes, list | tuple) else None


def read_texts(cfg: ClassificationConfig) -> Texts:
    """Read and tokenize the texts that `cfg` (validated) names.

    Raises:
        ConfigError, DataError: a tokenizer, file, column, label or class that cannot be used; a text that is too long.
    """
    tune = cfg.finetune
    tokenizer = build_tokenizer(cfg.data, cfg.model.vocab_size)
    sets = read_sets(tune, train=not cfg.training.skip_train)
    classes = class_names(sets, tune.classes)
    if cfg.training.skip_train:
        sets.pop("train", None)
    if tune.classification_metric == "f1" and len(classes) != 2:
        raise DataError(
            f"finetune.classification_metric (f1) is for 2 classes, and there are {len(classes)}: use macro-f1"
        )
    length = required(cfg.model.seq_length)
    if tune.zero_shot:
        names = tune.class_texts or classes
        if len(names) != len(classes):
            raise DataError(f"finetune.class_texts names {len(names)} classes, and there are {len(classes)}: name each")
        prompt = Prompt(tune.prompt_template, names, length, tune.truncate)
        prompts = {name: ZeroShotSet(part, classes, prompt, tokenizer) for name, part in sets.items()}
        return Texts(classes, None, prompts)
    encoding = Encoding.of(tune.backbone or "gpt", tokenizer, length, tune.truncate)
    return Texts(classes, tokenize_sets(sets, classes, tokenizer, encoding), {})


def _with_texts(family: Family, cfg: ClassificationConfig, texts: Texts) -> Family:
    """The family of classifiers for one run; of a GPT that classifies without training, if --zero-shot says so."""
    if cfg.finetune.zero_shot:
        return dataclasses.replace(
            family,
            model=GPTScorer,
            datasets=partial(_prompts, texts),
            losses=_no_training,
            judge=lambda cfg: ClassJudge(len(texts.classes), zero_shot_scores),
            criterion=lambda cfg: None,
            fresh_parameters=lambda cfg: (),
            unused_parameters=(),
        )
    assert texts.trained is not None
    train = texts.trained.train
    if train is None:
        return dataclasses.replace(family, datasets=partial(_sets, texts))
    return dataclasses.replace(
        family,
        datasets=partial(_sets, texts),
        mean_length=train.mean_length,
        samples_per_epoch=partial(samples_per_epoch, len(train)),
    )


def _not_read(cfg: ClassificationConfig, tokenizer: Tokenizer, ctx: ParallelContext, counts: Counts) -> Datasets:
    raise AssertionError("the texts are read by Family.prepare")


def _criterion(cfg: ClassificationConfig) -> Criterion:
    figure = (cfg.finetune.classification_metric or "accuracy").replace("-", "_")
    return Criterion(figure, cfg.finetune.early_stopping_patience)


def class_losses(cfg: ClassificationConfig, model: nn.Module, batch: Batch) -> Losses:
    """Mean cross-entropy of the texts of a micro-batch, and the routers' auxiliary losses."""
    logits_BC, aux_loss = model(*_inputs(model, batch))
    texts = len(batch["label"])
    return Losses(Mean(F.cross_entropy(logits_BC.float(), batch["label"]), texts), Mean(aux_loss, texts))


def class_scores(model: nn.Module, batch: Batch) -> Tensor:
    """Logits [B, C]."""
    logits_BC: Tensor = model(*_inputs(model, batch))[0]
    return logits_BC


def zero_shot_scores(model: nn.Module, batch: Batch) -> Tensor:
    """Mean log-likelihood per token of each class name after the prompt: fp32 [B, C]."""
    mask_BCS = batch["padding_mask"]
    width = _width(model, mask_BCS)
    scores = []
    for number in range(mask_BCS.shape[1]):
        tokens, labels, mask, counted = (
            batch[name][:, number, :width] for name in ("tokens", "labels", "padding_mask", "loss_mask")
        )
        loss_BS = model(tokens, labels, mask)
        scores.append(-(loss_BS * counted).sum(1) / counted.sum(1).clamp(min=1.0))
    return torch.stack(scores, dim=1)


def _no_training(cfg: ClassificationConfig, model: nn.Module, batch: Batch) -> Losses:
    raise AssertionError("zero-shot classification does not train")


def _inputs(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, token types and padding mask [B, S'], without the columns that are padding in every row."""
    width = _width(model, batch["padding_mask"])
    tokens, types, mask = (batch[name][:, :width] for name in ("tokens", "token_types", "padding_mask"))
    return tokens, types, mask


def _width(model: nn.Module, mask: Tensor) -> int:
    """Columns of the longest row of `mask` [..., S], rounded up; sequence parallelism cuts them over its ranks."""
    longest = int(mask.sum(-1).max())
    multiple = TRIM_TO * getattr(model, "ctx").tp.size  # noqa: B009 - of every LanguageModel
    return min(max(-(-longest // multiple) * multiple, multiple), mask.shape[-1])


def _sets(texts: Texts, cfg: Config, tokenizer: Tokenizer, ctx: ParallelContext, counts: Counts) -> Datasets:
    """Training texts in the order of the run, and the others once each; says on rank 0 what there is."""
    assert texts.trained is not None
    if ctx.rank == 0:
        print("\n".join(texts.trained.describe()), flush=True)
    batch = required(cfg.training.global_batch_size)
    train, samples = texts.trained.train, counts[0]
    return Datasets(
        TrainingOrder(train, batch, cfg.training.seed, samples) if train is not None and samples else None,
        *(_each_once(part, cfg, ctx) for part in (texts.trained.valid, texts.trained.test)),
    )


def _prompts(texts: Texts, cfg: Config, tokenizer: Tokenizer, ctx: ParallelContext, counts: Counts) -> Datasets:
    if ctx.rank == 0:
        for name, prompts in texts.prompts.items():
            print(
                f"{name} set: {len(prompts):,} texts of {len(texts.classes)} classes; {prompts.truncated:,} were cut",
                flush=True,
            )
    return Datasets(None, *(_each_once(texts.prompts.get(name), cfg, ctx) for name in ("valid", "test")))


def _each_once(part: ExampleSet | None, cfg: Config, ctx: ParallelContext) -> EvaluationOrder | None:
    if part is None:
        return None
    return EvaluationOrder(part, required(cfg.training.micro_batch_size) * ctx.dp.size)
