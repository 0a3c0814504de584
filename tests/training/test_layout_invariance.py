"""The same seed and data give the same loss curve, however the ranks share the work (fp32, 20 steps)."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_lsh.families import GPT
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.testing import run_distributed_test
from megatron_lsh.training.run import set_up
from tests.training.helpers import tiny_config

STEPS = 20
BASE = f"--train-iters {STEPS} --moe-layer-freq ([0]+[1])"
TWO_RANKS = {
    "EP 2": "--expert-model-parallel-size 2",
    "EP 2, sharded optimizer": "--expert-model-parallel-size 2 --use-distributed-optimizer",
    "TP 2, EP 2": "--tensor-model-parallel-size 2 --expert-model-parallel-size 2",
}
TWO_RANKS_OTHERWISE = {
    "DP 2": "",
    "DP 2, sharded optimizer": "--use-distributed-optimizer",
    "TP 2": "--tensor-model-parallel-size 2",
}
FOUR_RANKS = {
    "EP 4": "--expert-model-parallel-size 4",
    "EP 2, DP 4, sharded optimizer": "--expert-model-parallel-size 2 --use-distributed-optimizer",
    "TP 2, EP 4": "--tensor-model-parallel-size 2 --expert-model-parallel-size 4",
}


def curves(layouts: dict[str, str], world_size: int) -> dict[str, list[tuple[float, float]]]:
    """(loss, gradient norm) of every step, for each layout, on this rank."""
    found = {}
    for name, flags in layouts.items():
        cfg = tiny_config(f"{BASE} {flags}", world_size)
        ctx = initialize(cfg.parallel)
        run = set_up(cfg, GPT, ctx)
        batches = run.batches("train")
        results = [run.step(batches, iteration, False) for iteration in range(STEPS)]
        assert not any(result.skipped for result in results)
        found[name] = [(result.loss, result.grad_norm) for result in results]
    return found


@pytest.fixture(scope="module")
def alone() -> torch.Tensor:
    curve = torch.tensor(curves({"one rank": ""}, 1)["one rank"], dtype=torch.float64)
    dist.destroy_process_group()
    return curve


def check(layouts: dict[str, str], world_size: int, alone: torch.Tensor) -> None:
    ranks = run_distributed_test(curves, world_size, layouts, world_size)
    for name in layouts:
        assert all(rank[name] == ranks[0][name] for rank in ranks), f"{name}: ranks disagree"
        curve = torch.tensor(ranks[0][name], dtype=torch.float64)
        worst = ((curve - alone).abs() / alone).max(dim=0).values
        print(f"{name}: worst relative difference of loss {worst[0]:.1e}, of gradient norm {worst[1]:.1e}")
        torch.testing.assert_close(curve[:, 0], alone[:, 0], rtol=1e-5, atol=0.0, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(curve[:, 1], alone[:, 1], rtol=1e-3, atol=0.0, msg=lambda m, n=name: f"{n}: {m}")


def test_loss_falls(alone: torch.Tensor) -> None:
    assert alone[-1, 0] < alone[0, 0] - 0.05


def test_two_ranks(alone: torch.Tensor) -> None:
    check(TWO_RANKS, 2, alone)


@pytest.mark.slow
def test_two_ranks_otherwise(alone: torch.Tensor) -> None:
    check(TWO_RANKS_OTHERWISE, 2, alone)


@pytest.mark.slow
def test_four_ranks(alone: torch.Tensor) -> None:
    check(FOUR_RANKS, 4, alone)
