"""What a family of models is: one record.

Whoever trains, counts or describes a model reads it there, and knows no family by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from megatron_lsh.config import Config, parse_args
from megatron_lsh.data.loader import Datasets, build_datasets
from megatron_lsh.data.samples.dataset import SampleKind
from megatron_lsh.data.tokenizers import Tokenizer, build_tokenizer
from megatron_lsh.errors import ConfigError, first_line
from megatron_lsh.families.losses import Losses
from megatron_lsh.families.scores import Judge
from megatron_lsh.models.model import Model
from megatron_lsh.models.stacks import Stack
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.parallel.agreement import unhurried_barrier
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.parameters import initialize_parameters

Batch: TypeAlias = Mapping[str, Any]
"""samples stacked to tensors, by name"""
Counts: TypeAlias = tuple[int, int, int]
"""wanted numbers of samples to train on, to validate on and to test on"""
_TOO_LARGE = ("allocate memory", "out of memory", "calculation overflowed")
"""what torch says of sizes beyond a machine's memory, or beyond 64 bits"""


class Head(NamedTuple):
    """What comes after the stacks, of one sample. Heads that read one position of it are not counted."""

    multiply_adds: float = 0.0
    outputs: int = 0
    """values that are kept for the backward pass: logits"""


class Criterion(NamedTuple):
    """Which evaluation is the best; its weights are kept and tested in the end."""

    figure: str
    """name of the figure; larger is better"""
    patience: int | None = None
    """evaluations without a better one after which training ends; None: it never does"""


def _text_tokenizer(cfg: Config) -> Tokenizer:
    return build_tokenizer(cfg.data, cfg.model.vocab_size)


def _marked_tokens(batch: Batch) -> int:
    return int(batch["loss_mask"].sum())


@dataclass(frozen=True)
class Family:
    """A kind of model, and all that belongs to it. `cfg` is always a validated configuration of the class `config`."""

    name: str
    config: type[Config]
    """its flags"""
    stacks: Callable[[Any], tuple[Stack, ...]]
    """(cfg) -> the stacks of layers that the model is made of, in the order in which a sample passes them"""
    model: Callable[[Any, int, ParallelContext, MoETelemetry], Model]
    """(cfg, padded vocabulary, context, telemetry) -> the model; its parameters have no values yet"""
    head: Callable[[Any, int], Head]
    """(cfg, padded vocabulary) -> what the model computes after the stacks"""
    datasets: Callable[[Any, Any, ParallelContext, Counts], Datasets]
    """(cfg, tokenizer, context, counts) -> what to train and evaluate on. Collective"""
    losses: Callable[[Any, Any, Batch], Losses]
    """(cfg, model, a micro-batch on the model's device) -> what is minimized"""
    loss_tokens: Callable[[Batch], int] = _marked_tokens
    """(a micro-batch) -> how many tokens the main loss is a mean of"""
    tokenizer: Callable[[Any], Tokenizer] | None = _text_tokenizer
    """(cfg) -> the tokenizer, which knows the vocabulary; None for a family whose samples are no text"""
    counts_images: bool = False
    """whether a sample is a picture, and speed is told in those"""
    classifier: Family | None = None
    """the family of classifiers that are made of such a model"""

    # Of families that are judged by more than their loss, on whole sets, after each epoch:
    judge: Callable[[Any], Judge] | None = None
    criterion: Callable[[Any], Criterion | None] = lambda cfg: None

    # Of families whose models start as pretrained models of another one:
    fresh_parameters: Callable[[Any], tuple[str, ...]] = lambda cfg: ()
    """(cfg) -> beginnings of the names of parameters that a pretraining checkpoint lacks"""
    renewed_parameters: tuple[str, ...] = ()
    """beginnings of the names of parameters that are not taken from the first checkpoint, which has other classes"""
    unused_parameters: tuple[str, ...] = ()
    """beginnings of the names of parameters that only a pretraining checkpoint has"""
    resized_parameters: Mapping[str, Callable[[Tensor, torch.Size], Tensor]] = field(default_factory=dict, hash=False)
    """end of the name of a parameter -> what makes it of one that a pretraining checkpoint has in another shape"""

    # Of families whose length of a run, classes or lengths follow from the data:
    prepare: Callable[[Family, Any, int], tuple[Config, Family]] | None = None
    """(this family, cfg as written, world size) -> validated cfg, and the family with what was read, before any process
    group exists"""
    closing: Callable[[Any, Any, Datasets, ParallelContext], Mapping[str, str]] | None = None
    """(cfg, model, datasets, context) -> what a complete run leaves besides: name -> place. Collective"""
    files: Mapping[str, bytes] = field(default_factory=dict, hash=False)
    """small files that every checkpoint holds: name -> content; such as the names of the classes"""
    samples_per_epoch: Callable[[int], int] | None = None
    """global batch size -> samples from one end of an epoch to the next; None where a run is not counted in epochs"""
    mean_length: float | None = None
    """positions of a sample on average, where samples are shorter than the model allows"""

    def parse(self, argv: Sequence[str] | None = None) -> Config:
        """The flags of a command line, by default that of this process. Raises ConfigError."""
        return parse_args(argv, self.config)

    def build(self, cfg: Config, vocab_size: int, ctx: ParallelContext, telemetry: MoETelemetry) -> Model:
        """The model with fresh weights on ``ctx.device``: a pure function of ``cfg`` and its seed, whatever the layout.

        Args:
            vocab_size: padded vocabulary.

        Raises:
            ConfigError: for sizes that are missing, do not fit together, or do not fit into memory.
        """
        try:
            model = self.model(cfg, vocab_size, ctx, telemetry)
            initialize_parameters(model, cfg.training.seed)
        except (MemoryError, RuntimeError) as error:  # of which torch's OutOfMemoryError is one
            if not isinstance(error, MemoryError) and not any(words in str(error) for words in _TOO_LARGE):
                raise
            raise ConfigError(
                f"the model does not fit into the memory of {ctx.device} ({first_line(error)}): make it smaller, or "
                "spread it over more ranks; --dry-run says what it takes"
            ) from None
        return model

    def tokens_per_sample(self, cfg: Config) -> float:
        """Positions of a sample: of a full one, unless the data is known. Of an encoder-decoder, those of both sides."""
        return self.mean_length or sum(stack.seq_length for stack in self.stacks(cfg))


def text_datasets(
    kind: Callable[[Any, Tokenizer], SampleKind],
) -> Callable[[Any, Tokenizer, ParallelContext, Counts], Datasets]:
    """The `Family.datasets` of a family whose samples are made of --data-path, or of synthetic tokens.

    Args:
        kind: (cfg, tokenizer) -> how samples are made.
    """

    def datasets(cfg: Config, tokenizer: Tokenizer, ctx: ParallelContext, counts: Counts) -> Datasets:
        return build_datasets(
            cfg.data,
            cfg.training.seed,
            counts,
            tokenizer,
            kind(cfg, tokenizer),
            is_builder=ctx.local_rank == 0,
            barrier=unhurried_barrier(ctx, "the index of the data"),
        )

    return datasets
