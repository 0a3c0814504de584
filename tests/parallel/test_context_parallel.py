"""How sequences are shared out over context-parallel ranks, and gathered again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_lsh.parallel.context import offline_group
from megatron_lsh.parallel.context_parallel import gather_positions, own_chunks, own_positions
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.testing import run_distributed_test
from tests.parallel.toy import config


def test_every_rank_looks_at_equally_many_chunks() -> None:
    for size in (1, 2, 3, 4):
        chunks = [own_chunks(offline_group(tuple(range(size)), rank)) for rank in range(size)]
        assert sorted(chunk for both in chunks for chunk in both) == list(range(2 * size))
        assert {sum(chunk + 1 for chunk in both) for both in chunks} == {2 * size + 1}


def test_positions_are_one_chunk_of_the_head_and_one_of_the_tail() -> None:
    x_BS = torch.arange(12).expand(2, 12)
    one = offline_group((4, 5, 6), 5)
    assert own_positions(x_BS, one)[1].tolist() == [2, 3, 8, 9]
    assert own_positions(x_BS[0], one, dim=0).tolist() == [2, 3, 8, 9]
    assert own_positions(x_BS, offline_group((4,), 4)) is x_BS
    with pytest.raises(ValueError, match="10 positions cannot be cut into 6 chunks"):
        own_positions(torch.arange(10), one, dim=0)


def gathered(world_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a rank gathers, the gradient of its part, and that of the whole on one rank."""
    group = initialize(config(tp=world_size)).tp  # any group
    whole = torch.randn(12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = torch.randn(world_size, 12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    part = own_positions(whole.detach(), group, dim=0).requires_grad_()
    result = gather_positions(part, group)
    assert torch.equal(result, whole)
    (result * weights[group.rank]).sum().backward()  # each rank has a loss of its own; they add up
    (whole * weights.sum(0)).sum().backward()
    assert part.grad is not None and whole.grad is not None
    return result.detach(), part.grad, own_positions(whole.grad, group, dim=0)


def test_gathered_positions_are_in_order_and_their_gradients_are_summed() -> None:
    for _, grad, expected in run_distributed_test(gathered, 3, 3):
        torch.testing.assert_close(grad, expected)
