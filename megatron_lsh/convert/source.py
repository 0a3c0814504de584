"""A model as a list of native tensors that are read one piece at a time: what every format is turned into and made from.

Formats meet in the middle: a `Source` (Hugging Face, native, Megatron-LM, an upcycled dense model) hands out the tensors
of this framework's own model, and a writer of any format asks for them one after the other. Nobody holds a whole model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_lsh.config import Config, check_model, padded_vocab_size
from megatron_lsh.config.swin import SwinConfig
from megatron_lsh.data.tokenizers import Tokenizer
from megatron_lsh.errors import CheckpointError, ConfigError, MegatronLSHError, first_line
from megatron_lsh.inference.load import settings_of_inference
from megatron_lsh.models.gpt import GPTModel
from megatron_lsh.models.swin import SwinModel
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.parallel.context import offline_context

VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True)
class TensorSpec:
    """Shape and type of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Rows:
    """Consecutive rows (indices of dimension 0) of one tensor: the unit in which tensors are read."""

    name: str
    first: int
    count: int


@dataclass(frozen=True)
class Origin:
    """What a source knows about its model besides settings and tensors, to give back when it is exported again.

    Attributes:
        hf_config: the config.json it came with, or at least the ids of special tokens.
        files: small files to go along, name -> path or content (tokenizer, generation_config.json).
        tokenizer: the one that training used, if the model was trained here; `files` hold what transformers makes of it.
        dtypes: tensors of the Hugging Face layout whose type differs from that of the native tensor they are part of.
    """

    hf_config: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Path | bytes] = field(default_factory=dict)
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None

    def copy_files(self, folder: Path) -> None:
        """Write the small files into `folder`. Raises OSError."""
        for name, file in self.files.items():
            (folder / name).write_bytes(file if isinstance(file, bytes) else file.read_bytes())


class Source(Protocol):
    """A checkpoint seen as native tensors (names as in ``GPTModel.state_dict()``, whole and not cut over ranks).

    Attributes:
        what: names the checkpoint in messages.
        cfg: settings of the model; ``model.vocab_size`` is the vocabulary before padding.
        tensors: all tensors, in the order in which they are best read.
    """

    @property
    def what(self) -> str: ...

    @property
    def cfg(self) -> Config: ...

    @property
    def tensors(self) -> Mapping[str, TensorSpec]: ...

    @property
    def origin(self) -> Origin: ...

    def pieces(self, name: str) -> list[Rows]:
        """How to read a tensor, in order. One piece, except for stacked experts and padded vocabularies."""
        ...

    def read(self, rows: Rows) -> Tensor:
        """Some rows of a tensor, contiguous, on the CPU. Raises CheckpointError for a damaged file."""
        ...

    def culprits(self, rows: Rows) -> list[str]:
        """Names, in the checkpoint itself, of what is not finite in these rows (which are known to hold such a value)."""
        ...


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def all_pieces(source: Source) -> Iterator[Rows]:
    """Every piece of every tensor."""
    for name in source.tensors:
        yield from source.pieces(name)


def total_bytes(source: Source) -> int:
    return sum(spec.nbytes for spec in source.tensors.values())


def whole(name: str, spec: TensorSpec) -> list[Rows]:
    """The tensor as one piece."""
    return [Rows(name, 0, spec.shape[0])]


def row_by_row(name: str, spec: TensorSpec) -> list[Rows]:
    """One piece per row: stacked experts, expert by expert."""
    return [Rows(name, row, 1) for row in range(spec.shape[0])]


def padded_rows(cfg: Config) -> int:
    """Rows of the vocabulary's tensors in a checkpoint that belongs to no layout (as for TP = 1)."""
    return padded_vocab_size(required_vocab(cfg), cfg.model.make_vocab_size_divisible_by, 1)


def required_vocab(cfg: Config) -> int:
    if not cfg.tokenized:
        return 0
    if cfg.model.vocab_size is None:
        raise CheckpointError("the size of the vocabulary is not known: give --vocab-size")
    return cfg.model.vocab_size


def plain(cfg: Config) -> Config:
    """The same model, its tokens sent to their experts exactly and none dropped: what other frameworks compute."""
    cfg = settings_of_inference(cfg)
    cfg.moe.moe_token_dispatcher_type = "alltoall"
    return cfg


def model_shapes(cfg: Config, tensors: int | None = None) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model that `cfg` describes, read off the model itself (allocating nothing).

    Without what a compressing dispatcher learns, see ``plain``.

    Args:
        tensors: how many there are in the files; a model of more layers is not even built.

    Raises:
        ConfigError: settings that no model can have.
        CheckpointError: more layers than tensors, or sizes beyond what any machine can count.
    """
    layers = cfg.model.num_layers or 0
    if tensors is not None and layers > tensors:
        raise CheckpointError(
            f"{layers} layers cannot be in {tensors} tensors: settings and files are not of one model"
        )
    try:
        return _model_shapes(cfg)
    except (RuntimeError, OverflowError, MemoryError) as error:
        if isinstance(error, MegatronLSHError):
            raise
        raise CheckpointError(f"no model can have these sizes ({first_line(error)}): correct the settings") from None


def _model_shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    ctx = offline_context()
    if isinstance(cfg, SwinConfig):
        swin = SwinModel(cfg, 0, ctx, MoETelemetry(ctx.device))
        return {name: tuple(tensor.shape) for name, tensor in swin.state_dict().items()}
    model = GPTModel(plain(cfg), padded_rows(cfg), ctx, MoETelemetry(ctx.device))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check_shapes(source: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Every tensor of the model is there, in its shape, and nothing else. Raises CheckpointError naming them."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is left over" for name in found if name not in expected]
    problems += [
        f"{name} has shape {list(found[name])} and should have {list(expected[name])}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    fail(source, problems, "the settings and the tensors are not of one model")


def refuse_untrainable(cfg: Config, what: str) -> None:
    """Raise CheckpointError for a model that breaks a rule of training; `what` it is begins the message."""
    try:
        check_model(cfg)
    except ConfigError as error:
        raise CheckpointError(f"{what} cannot be trained here: {error}") from None


def fail(source: str, problems: list[str], remedy: str, limit: int = 5) -> None:
    """Raise CheckpointError with the first few problems and what to do, if there are any."""
    if problems:
        more = f"; and {len(problems) - limit} more" if len(problems) > limit else ""
        raise CheckpointError(f"{source}: {'; '.join(problems[:limit])}{more}: {remedy}")
