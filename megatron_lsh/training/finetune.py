"""What fine-tuning a classifier puts into the train loop, and zero-shot classification with it: data, loss, scores."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lsh.config import Config, validate
from megatron_lsh.config.finetune import FinetuneConfig
from megatron_lsh.data.classification import (
    ClassificationData,
    Encoding,
    EvaluationOrder,
    TrainingOrder,
    class_names,
    samples_per_epoch,
    tokenize_sets,
)
from megatron_lsh.data.labelled import read_sets
from megatron_lsh.data.loader import Datasets
from megatron_lsh.data.tokenizers import build_tokenizer
from megatron_lsh.data.zero_shot import Prompt, ZeroShotSet
from megatron_lsh.errors import DataError
from megatron_lsh.models.classification import GPTScorer, build_classifier, fresh_parameters, unused_parameters
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.parameters import initialize_parameters
from megatron_lsh.training.classification import ClassificationEvaluator
from megatron_lsh.training.early_stopping import EarlyStopping
from megatron_lsh.training.losses import Losses, Mean
from megatron_lsh.training.run import Task, required
from megatron_lsh.training.step import Batch

TRIM_TO = 8
"""batches are cut to their longest text, rounded up to a multiple of this times the tensor-parallel size"""


@dataclass(frozen=True)
class Prepared:
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


def with_data(written: FinetuneConfig, world_size: int) -> tuple[FinetuneConfig, Prepared]:
    """The validated configuration, with the length of the run and the classes that follow from the data, and the data.

    Args:
        written: as ``parse_finetune_args`` returns it. Not changed.

    Raises:
        ConfigError, DataError: see ``validate`` and `prepare_data`.
    """
    data = prepare_data(validate(written, world_size))
    # The order of the classes is part of the model: config.json and checkpoints must say it.
    tune = dataclasses.replace(written.finetune, classes=data.classes)
    return validate(dataclasses.replace(written, finetune=tune, examples=data.examples), world_size), data


def prepare_data(cfg: FinetuneConfig) -> Prepared:
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
        return Prepared(classes, None, prompts)
    encoding = Encoding.of(tune.backbone or "gpt", tokenizer, length, tune.truncate)
    return Prepared(classes, tokenize_sets(sets, classes, tokenizer, encoding), {})


def finetune_task(cfg: FinetuneConfig, data: Prepared) -> Task:
    """The task of fine-tuning and evaluating a classifier, or of zero-shot classification."""
    count = len(data.classes)
    if cfg.finetune.zero_shot:
        return Task(
            build_model=_build_scorer,
            build_data=lambda cfg, _, ctx, samples: _zero_shot_sets(cfg, data, ctx),
            forward_step=_no_training,
            evaluator=ClassificationEvaluator(count, zero_shot_scores),
        )
    assert data.trained is not None
    train = data.trained.train
    figure = (cfg.finetune.classification_metric or "accuracy").replace("-", "_")
    return Task(
        build_model=lambda _, vocab, ctx, telemetry: build_classifier(cfg, count, vocab, ctx, telemetry),
        build_data=lambda cfg, _, ctx, samples: _sets(cfg, data, ctx, samples[0]),
        forward_step=classification_step,
        loss_tokens=lambda batch: len(batch["label"]),
        evaluator=ClassificationEvaluator(count, class_scores),
        early_stopping=EarlyStopping(figure, cfg.finetune.early_stopping_patience),
        # An evaluation of a head that starts afresh would mean nothing: then the checkpoint must have it.
        fresh_parameters=() if cfg.training.skip_train else fresh_parameters(cfg),
        unused_parameters=unused_parameters(cfg),
        samples_per_epoch=partial(samples_per_epoch, len(train)) if train is not None else None,
        tokens_per_sample=train.mean_length if train is not None else None,
    )


def classification_step(model: nn.Module, batch: Batch) -> Losses:
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


def _no_training(model: nn.Module, batch: Batch) -> Losses:
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


def _sets(cfg: Config, data: Prepared, ctx: ParallelContext, train_samples: int) -> Datasets:
    """Training texts in the order of the run, and the others once each; says on rank 0 what there is."""
    assert data.trained is not None
    if ctx.rank == 0:
        print("\n".join(data.trained.describe()), flush=True)
    batch, step = required(cfg.training.global_batch_size), _micro_step(cfg, ctx)
    train, valid, test = data.trained.train, data.trained.valid, data.trained.test
    return Datasets(
        TrainingOrder(train, batch, cfg.training.seed, train_samples) if train is not None and train_samples else None,
        EvaluationOrder(valid, step) if valid is not None else None,
        EvaluationOrder(test, step) if test is not None else None,
    )


def _zero_shot_sets(cfg: Config, data: Prepared, ctx: ParallelContext) -> Datasets:
    if ctx.rank == 0:
        for name, prompts in data.prompts.items():
            print(
                f"{name} set: {len(prompts):,} texts of {len(data.classes)} classes; {prompts.truncated:,} were cut",
                flush=True,
            )
    step = _micro_step(cfg, ctx)
    valid, test = (data.prompts.get(name) for name in ("valid", "test"))
    return Datasets(
        None,
        EvaluationOrder(valid, step) if valid is not None else None,
        EvaluationOrder(test, step) if test is not None else None,
    )


def _micro_step(cfg: Config, ctx: ParallelContext) -> int:
    """Samples that all ranks read at a time."""
    return required(cfg.training.micro_batch_size) * ctx.dp.size


def _build_scorer(cfg: Config, vocab_size: int, ctx: ParallelContext, telemetry: MoETelemetry) -> GPTScorer:
    model = GPTScorer(cfg, vocab_size, ctx, telemetry)
    initialize_parameters(model, cfg.training.seed)
    return model
