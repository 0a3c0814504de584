"""Collectives with gradients. The sequence is dimension 0 of an activation ([S, B, D]).

Each Function's backward is the adjoint of its forward when the loss is the same number on all ranks of the group, as
in Megatron-LM (arXiv:1909.08053 for f and g, arXiv:2205.05198 for their sequence parallel forms). On a group of one
rank every function returns its input.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lsh.parallel.context import Group


def all_gather_sequence(x: Tensor, group: Group) -> Tensor:
    """[S/n, ...] on each rank -> [S, ...] on all. Backward: reduce-scatter."""
    return x if group.size == 1 else _AllGather.apply(x, group)


def reduce_scatter_sequence(x: Tensor, group: Group) -> Tensor:
    """[S, ...] summed over ranks -> this rank's [S/n, ...] of the sum. Backward: all-gather."""
    return x if group.size == 1 else _ReduceScatter.apply(x, group)


def gather_sequence(x: Tensor, group: Group) -> Tensor:
    """[S/n, ...] -> [S, ...], for a consumer that is the same on all ranks. Backward: own slice (no sum)."""
    return x if group.size == 1 else _Gather.apply(x, group)


def copy_to_tensor_parallel(x: Tensor, group: Group) -> Tensor:
    """Identity on a replicated activation that enters a tensor parallel region. Backward: all-reduce."""
    return x if group.size == 1 else _Copy.apply(x, group)


def reduce_from_tensor_parallel(x: Tensor, group: Group) -> Tensor:
    """All-reduce of the partial results that leave a tensor parallel region. Backward: identity."""
    return x if group.size == 1 else _Reduce.apply(x, group)


def all_reduce_(x: Tensor, group: Group, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """`x`, summed (or what `op` says) over the group in place, without autograd. One rank alone leaves it as it is."""
    if group.size > 1 and group.process_group is not None:
        dist.all_reduce(x, op, group=group.process_group)
    return x


# torch 2.13 renamed two collectives and warns about the old names; torch 2.11 has only those.
all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def _all_gather(x: Tensor, group: Group) -> Tensor:
    gathered = x.new_empty((x.shape[0] * group.size, *x.shape[1:]))
    all_gather_single(gathered, x.contiguous(), group=group.process_group)
    return gathered


def _reduce_scatter(x: Tensor, group: Group) -> Tensor:
    _check_divisible(x, group)
    scattered = x.new_empty((x.shape[0] // group.size, *x.shape[1:]))
    reduce_scatter_single(scattered, x.contiguous(), group=group.process_group)
    return scattered


def _all_reduce(x: Tensor, group: Group) -> Tensor:
    return all_reduce_(x.clone(memory_format=torch.contiguous_format), group)


def _own_slice(x: Tensor, group: Group) -> Tensor:
    _check_divisible(x, group)
    return x.chunk(group.size)[group.rank].contiguous()


def _check_divisible(x: Tensor, group: Group) -> None:
    if x.shape[0] % group.size:
        raise ValueError(f"sequence of length {x.shape[0]} cannot be split evenly over {group.size} ranks")


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _reduce_scatter(grad, ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _all_gather(grad, ctx.group), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _own_slice(grad, ctx.group), None


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _all_reduce(grad, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None
