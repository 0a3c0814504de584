"""Making and initialising parameters that may be sharded over tensor or expert parallel ranks.

Every rank allocates its own shard only. Where the group has more than one rank the parameter is a DTensor, so that
fully_shard and torch.distributed.checkpoint know the global shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from megatron_lsh.errors import ConfigError
from megatron_lsh.parallel.context import EP, TP, ParallelContext
from megatron_lsh.parallel.random import derive_seed

# What ``parameter`` notes on a parameter besides its value; fully_shard makes new objects and these are copied over.
NOTES = ("init_spec", "cut", "global_shape", "shard_index", "matrices", "decays", "is_copy")
UNCUT: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True)
class Init:
    """How a parameter starts: "normal" (mean 0, `std`), "zeros", "ones", or "constant" (`value`)."""

    kind: str
    std: float = 0.0
    value: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("normal", "zeros", "ones", "constant"):
            raise ValueError(f"Init.kind ({self.kind}) must be normal, zeros, ones or constant")


@dataclass(frozen=True)
class Matrices:
    """How the last two dimensions [R, D] of a weight are made of matrices; dimensions before these count such weights.

    The R rows are `groups` times what `widths` sum to: queries, keys and values of head groups, gate and up of an expert.
    The rows of one kind, over all groups, are one matrix. Without `widths` the whole of [R, D] is one.
    """

    widths: tuple[int, ...] = ()
    groups: int = 1

    def rows(self, count: int) -> list[int]:
        """Rows of each kind in a group of a weight with `count` rows. Raises ValueError if they do not make it up."""
        if self.widths and self.groups * sum(self.widths) != count:
            raise ValueError(f"{self.groups} groups of {self.widths} rows are not {count}")
        return list(self.widths) or [count]


ONE_MATRIX = Matrices()


def parameter(
    shape: Iterable[int],
    ctx: ParallelContext,
    *,
    init: Init,
    cut: Mapping[str, int] = UNCUT,
    decays: bool = True,
    dtype: torch.dtype = torch.float32,
    matrices: Matrices | None = None,
) -> nn.Parameter:
    """An uninitialised parameter of global shape `shape`, of which this rank holds its shard.

    `cut` names the dimension that each kind of parallelism splits: ``{"tp": d}`` for a dense parameter split along
    dimension d, ``{}`` for one that tensor parallel ranks hold alike, ``{"ep": 0}`` for an expert parameter, whose
    dimension 0 counts the experts. `matrices`: of a weight of a hidden layer, what it is made of. `decays` is
    False for a matrix that weight decay leaves alone, as it does all vectors. Data parallelism and pipeline stages are not
    its business. Raises ConfigError if the dimension does not divide, ValueError for another cut. Fill it with
    ``initialize_parameters``.
    """
    shape = torch.Size(shape)
    if set(cut) - {TP} and dict(cut) != {EP: 0}:
        raise ValueError(f"cut ({dict(cut)}) must be {{}}, {{'tp': dimension}} or {{'ep': 0}}")
    group, mesh, name = (ctx.ep, ctx.expert_mesh, EP) if EP in cut else (ctx.tp, ctx.dense_mesh, TP)
    dim = cut.get(name)
    local_shape = list(shape)
    if dim is not None:
        if shape[dim] % group.size:
            raise ConfigError(_indivisible(shape, dim, name, group.size))
        local_shape[dim] //= group.size
    data = torch.empty(local_shape, dtype=dtype, device=ctx.device)
    if mesh is not None and group.size > 1:
        placement = Replicate() if dim is None else Shard(dim)
        stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        data = DTensor.from_local(data, mesh[name], [placement], run_check=False, shape=shape, stride=stride)
    result = nn.Parameter(data)
    result.init_spec = init  # type: ignore[attr-defined]
    result.cut = dict(cut)  # type: ignore[attr-defined]
    result.matrices = matrices  # type: ignore[attr-defined]
    result.decays = decays  # type: ignore[attr-defined]
    result.global_shape = shape  # type: ignore[attr-defined]
    result.shard_index = 0 if dim is None else group.rank  # type: ignore[attr-defined]
    return result


def _indivisible(shape: torch.Size, dim: int, name: str, size: int) -> str:
    if name == EP:
        return (
            f"moe.num_experts ({shape[dim]}) must be divisible by parallel.expert_model_parallel_size ({size}): "
            "change --num-experts or --expert-model-parallel-size"
        )
    return (
        f"dimension {dim} of a {list(shape)} weight ({shape[dim]}) must be divisible by "
        f"parallel.tensor_model_parallel_size ({size}): change the model's sizes or --tensor-model-parallel-size"
    )


def local(param: Tensor, partial_grad: bool = False) -> Tensor:
    """This rank's shard as a plain tensor, differentiable.

    `partial_grad` is for a parameter replicated over tensor parallel ranks and applied to a sequence-sharded
    activation: its gradient is then this rank's share of a sum over those ranks, which fully_shard carries out.
    """
    if not isinstance(param, DTensor):
        return param
    return param.to_local(grad_placements=[Partial()] if partial_grad else None)


def is_expert(param: Tensor) -> bool:
    """Whether `param` is cut over expert parallel ranks, so that each of them holds the values of other experts."""
    return EP in getattr(param, "cut", UNCUT)


def mark_copy(param: Tensor) -> None:
    """Say that another pipeline stage holds this parameter as well, and counts it."""
    param.is_copy = True  # type: ignore[attr-defined]


def is_copy(param: Tensor) -> bool:
    """Whether `param` is counted elsewhere: a tied embedding on the last pipeline stage."""
    return getattr(param, "is_copy", False)


@torch.no_grad()
def initialize_parameters(model: nn.Module, seed: int) -> None:
    """Fill every parameter of `model` made by ``parameter``.

    Each value is a pure function of (seed, name of the parameter in `model`[, index of the expert]): the full tensor is
    drawn in fp32 on the CPU and this rank's slice is kept, so every layout and device starts from the same weights.
    Call it before ``shard_model``. Raises ValueError for a parameter that was not made by ``parameter``.
    """
    for name, param in model.named_parameters():
        spec: Init | None = getattr(param, "init_spec", None)
        if spec is None:
            raise ValueError(f"{name} has no init_spec: make it with megatron_lsh.parallel.parameters.parameter")
        target = param.to_local() if isinstance(param, DTensor) else param
        if isinstance(param, DTensor) and param.device_mesh.ndim > 1:
            raise ValueError(f"{name} is sharded over data parallel ranks: initialise before shard_model")
        if target.is_meta:
            continue
        if spec.kind != "normal":
            target.fill_({"zeros": 0.0, "ones": 1.0, "constant": spec.value}[spec.kind])
        elif is_expert(param):
            first = _note(param, "shard_index") * target.shape[0]
            for index, expert in enumerate(target):
                expert.copy_(_normal(expert.shape, spec.std, derive_seed(seed, name, first + index)))
        else:
            full, dim = (
                _normal(_note(param, "global_shape"), spec.std, derive_seed(seed, name)),
                _note(param, "cut").get(TP),
            )
            if dim is not None:
                full = full.narrow(dim, _note(param, "shard_index") * target.shape[dim], target.shape[dim])
            target.copy_(full)


def _note(param: Tensor, name: str) -> Any:
    return getattr(param, name)


def _normal(shape: Iterable[int], std: float, seed: int) -> Tensor:
    return torch.empty(tuple(shape)).normal_(0.0, std, generator=torch.Generator().manual_seed(seed))
