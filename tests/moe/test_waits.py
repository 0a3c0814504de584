"""The host waits for the device once per layer, for the arrival of the counts, and never in a backward pass or replay."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from torch.utils.checkpoint import checkpoint

from benchmarks.launches import Waits
from megatron_lsh.config.moe import LSHConfig
from megatron_lsh.config.parallel import ParallelConfig
from megatron_lsh.moe.layer_pass import ReplayMemo
from megatron_lsh.ops import reference_only
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.testing import run_distributed_test
from tests.moe.test_dispatchers import make_layer, single, tokens


def count(ctx, kind: str, **moe) -> list[list[str]]:
    """What is found in the forward pass, in the backward pass, and in a replay with its backward pass."""
    layer, _ = make_layer(ctx, kind, LSHConfig(), **moe)
    x = tokens(ctx.rank)
    layer(x)[0].sum().backward()  # what is done once
    found = []
    with Waits() as waits:
        y, aux = layer(x)
        found.append(list(waits.found))
        waits.found.clear()
        (y.pow(2).mean() + aux).backward()
        found.append(list(waits.found))
        memo = ReplayMemo()
        y, aux = checkpoint(lambda inputs: layer(inputs, None, memo), x, use_reentrant=False)
        waits.found.clear()
        (y.pow(2).mean() + aux).backward()
        found.append(list(waits.found))
    return found


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("moe", [{}, {"moe_expert_capacity_factor": 1.0}, {"moe_overlap_chunks": 2}], ids=str)
@pytest.mark.parametrize("kind", ["alltoall", "lsh"])
def test_a_rank_alone_waits_once(kind: str, moe: dict, plain: bool) -> None:
    with reference_only() if plain else nullcontext():
        assert count(single(), kind, **moe) == [["arrival"], [], []]


def on_two_ranks() -> list[list[list[str]]]:
    ctx = initialize(ParallelConfig(expert_model_parallel_size=2))
    return [count(ctx, kind) for kind in ("alltoall", "lsh")]


def test_two_ranks_wait_once() -> None:
    for found in run_distributed_test(on_two_ranks, 2):
        assert found == [[["arrival"], [], []]] * 2
