"""Values and gradients of every collective against autograd on one process that sees all ranks' inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_lsh.parallel import collectives
from megatron_lsh.parallel.context import Group, offline_context
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.layout import ParallelLayout
from megatron_lsh.parallel.testing import run_distributed_test
from tests.parallel.toy import config

N_ROWS, WIDTH = 8, 3


def draw(rank: int, rows: int = N_ROWS) -> Tensor:
    return torch.randn(rows, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


def check(
    function: Callable[[Tensor, Group], Tensor],
    whole: Callable[[list[Tensor]], list[Tensor]],
    group: Group,
    inputs: list[Tensor],
    weights: list[Tensor],
    summed: bool,
) -> None:
    """`whole` maps the inputs of all ranks to their outputs. The loss is sum_r weights_r . output_r over all ranks, and
    each rank's input gradient must be what autograd finds for its input; with ``summed=False`` the inputs are one
    replicated tensor, whose gradient every rank must hold."""
    everyone = [x.clone().requires_grad_() for x in inputs] if summed else [inputs[0].clone().requires_grad_()]
    outputs = whole(everyone if summed else everyone * group.size)
    sum((w * y).sum() for w, y in zip(weights, outputs, strict=True)).backward()
    x = inputs[group.rank].clone().requires_grad_()
    y = function(x, group)
    torch.testing.assert_close(y, outputs[group.rank].detach())
    y.backward(weights[group.rank])
    torch.testing.assert_close(x.grad, everyone[group.rank if summed else 0].grad)


def slices(x: Tensor, n: int) -> list[Tensor]:
    return list(x.chunk(n))


def all_collectives(tp: int) -> None:
    group = initialize(config(tp)).tp
    n = group.size
    same, different = [draw(99)] * n, [draw(rank) for rank in range(n)]
    part = N_ROWS // n
    parts = [draw(rank, part) for rank in range(n)]
    weights = [draw(100 + rank) for rank in range(n)]
    part_weights = [draw(200 + rank, part) for rank in range(n)]

    check(collectives.all_gather_sequence, lambda xs: [torch.cat(xs)] * n, group, parts, weights, True)
    check(collectives.reduce_scatter_sequence, lambda xs: slices(sum(xs), n), group, different, part_weights, True)
    check(collectives.copy_to_tensor_parallel, lambda xs: xs, group, same, weights, False)
    # What follows these two is replicated: the loss is counted once, not on each rank.
    once = [weights[0]] + [torch.zeros_like(weights[0])] * (n - 1)
    for function, whole, inputs in (
        (collectives.reduce_from_tensor_parallel, lambda xs: [sum(xs)] * n, different),
        (collectives.gather_sequence, lambda xs: [torch.cat(xs)] * n, parts),
    ):
        everyone = [x.clone().requires_grad_() for x in inputs]
        outputs = whole(everyone)
        sum((w * y).sum() for w, y in zip(once, outputs, strict=True)).backward()
        x = inputs[group.rank].clone().requires_grad_()
        y = function(x, group)
        torch.testing.assert_close(y, outputs[0].detach())
        y.backward(weights[0])  # equal on all ranks
        torch.testing.assert_close(x.grad, everyone[group.rank].grad)
    with pytest.raises(ValueError, match="cannot be split evenly"):
        collectives.reduce_scatter_sequence(draw(0, N_ROWS + 1), group)


@pytest.mark.parametrize("world_size", [2, 4])
def test_values_and_gradients(world_size: int) -> None:
    run_distributed_test(all_collectives, world_size, world_size)


def test_on_one_rank_they_return_their_input() -> None:
    group = offline_context(ParallelLayout(1)).tp
    x = draw(0)
    for name in (
        "all_gather_sequence",
        "reduce_scatter_sequence",
        "gather_sequence",
        "copy_to_tensor_parallel",
        "reduce_from_tensor_parallel",
    ):
        assert getattr(collectives, name)(x, group) is x
