"""The host waits for the device once per layer, for the arrival of the counts, and never in a backward pass or replay."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from benchmarks.launches import Waits
from megatron_lsh.config.moe import LSHConfig
from megatron_lsh.config.parallel import ParallelConfig
from megatron_lsh.moe.layer_pass import ReplayMemo
from megatron_lsh.ops import reference_only
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.testing import run_distributed_test
from tests.moe.test_dispatchers import make_layer, single, tokens

ONCE = [["arrival"], [], []]
RESIDUALS = [
    LSHConfig(),
    LSHConfig(lsh_residual="interpolate", lsh_representative="mean"),
    LSHConfig(lsh_interpolation_rank=2),
    *(LSHConfig(lsh_residual=residual) for residual in ("identity", "none", "lowrank")),
    LSHConfig(lsh_residual="none", lsh_gradient="straight-through"),
]


def count(ctx, kind: str, lsh: LSHConfig = RESIDUALS[0], **moe) -> list[list[str]]:
    """What is found in the forward pass, in the backward pass, and in a replay with its backward pass."""
    layer, _ = make_layer(ctx, kind, lsh, **moe)
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
@pytest.mark.parametrize("moe", [{}, {"moe_expert_capacity_factor": 1.0}], ids=str)
def test_a_rank_alone_waits_once(moe: dict, plain: bool) -> None:
    with reference_only() if plain else nullcontext():
        assert count(single(), "alltoall", **moe) == ONCE
        for lsh in RESIDUALS:
            assert count(single(), "lsh", lsh, **moe) == ONCE, lsh


def on_two_ranks() -> None:
    ctx = initialize(ParallelConfig(expert_model_parallel_size=2))
    for kind, chunks in (("alltoall", 1), ("allgather", 1), ("lsh", 1), ("lsh", 2)):
        assert count(ctx, kind, moe_overlap_chunks=chunks) == ONCE, (kind, chunks)


def test_two_ranks_wait_once() -> None:
    run_distributed_test(on_two_ranks, 2)


def test_a_wait_is_seen() -> None:
    """What a GPU's host would have to wait for, and what it has already."""
    device = torch.device("cpu")
    x = torch.arange(4, device=device)
    with Waits() as waits:
        x.tolist(), x.sum().item(), x[x > 1], x.repeat_interleave(x), torch.tensor([0]).copy_(x[:1]), int(x[0])
        assert waits.found == ["tolist", "item", "__getitem__", "repeat_interleave", "copy_", "__int__"]
        waits.found.clear()
        here = torch.tensor([1, 2])
        here.cumsum(0).tolist(), here.to(torch.int32).tolist(), x.repeat_interleave(x, output_size=6), x[1:]
        assert waits.found == []
        here.to(device).tolist()
        assert waits.found == ["tolist"]
