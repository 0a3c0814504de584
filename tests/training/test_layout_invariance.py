"""The same seed and data give the same loss curve and the same gradients, however the ranks share the work (fp32)."""

from __future__ import annotations

from functools import cache
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch.distributed as dist

from megatron_lsh.families import GPT
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.testing import run_distributed_test
from megatron_lsh.training.run import set_up
from tests.models.model_helpers import full_gradients
from tests.training.helpers import tiny_config

STEPS = 20
QUICK_STEPS = 6  # of the layouts that `make test` tries; `make test-all` has all pairs of ways over 20
BASE = f"--train-iters {STEPS} --moe-layer-freq 2 --num-layers 4 --eval-iters 0"
# Interleaved stages take as many micro-batches at a time as there are of them.
DEEP = BASE.replace("--num-layers 4", "--num-layers 8 --untie-embeddings-and-output-weights --global-batch-size 16")

FLAGS = {
    "PP 2": "--pipeline-model-parallel-size 2",
    "PP 4": "--pipeline-model-parallel-size 4",
    "interleaved": "--num-virtual-stages-per-pipeline-rank 2",
    "CP 2": "--context-parallel-size 2",
    "TP 2": "--tensor-model-parallel-size 2",
    "EP 2": "--expert-model-parallel-size 2",
    "EP 4": "--expert-model-parallel-size 4",
    "DP 2": "",  # what the number of ranks leaves
    "sharded": "--use-distributed-optimizer",
    "recomputed": "--recompute-granularity full",
}


class Layout(NamedTuple):
    """Which of FLAGS, on how many ranks."""

    ranks: int
    names: tuple[str, ...]
    base: str = BASE
    steps: int = STEPS

    @property
    def flags(self) -> str:
        return " ".join([self.base, *(FLAGS[name] for name in self.names)])

    def __str__(self) -> str:
        return ", ".join(self.names)


QUICK = (
    Layout(2, ("CP 2", "EP 2", "sharded"), steps=QUICK_STEPS),
    Layout(2, ("TP 2", "EP 2", "recomputed"), steps=QUICK_STEPS),
    Layout(2, ("PP 2", "interleaved", "recomputed"), steps=QUICK_STEPS),
    Layout(4, ("PP 2", "EP 2", "DP 2", "sharded"), steps=QUICK_STEPS),
)
SLOW = (
    Layout(8, ("PP 2", "interleaved", "CP 2", "TP 2", "EP 2", "sharded")),
    Layout(8, ("PP 4", "interleaved", "DP 2", "EP 2", "sharded", "recomputed"), DEEP),
    Layout(8, ("PP 4", "TP 2", "EP 2", "recomputed")),
    Layout(8, ("PP 4", "CP 2", "EP 2", "recomputed")),
    Layout(8, ("PP 2", "interleaved", "DP 2", "EP 4"), DEEP),
    Layout(8, ("DP 2", "CP 2", "TP 2", "EP 4", "sharded", "recomputed")),
)


class Found(NamedTuple):
    """(loss, gradient norm) of every step, and the clipped gradients of the first one, by name."""

    curve: list[tuple[float, float]]
    gradients: dict[str, Any]


def found(flags: str, world_size: int, steps: int = STEPS) -> Found:
    cfg = tiny_config(flags, world_size)
    run = set_up(cfg, GPT, initialize(cfg.parallel))
    batches, gradients = run.batches("train"), {}

    def keep(*_: Any) -> None:
        gradients.update({name: grad.numpy() for name, grad in full_gradients(run.model).items()})
        hook.remove()

    hook = run.step.optimizer.register_step_pre_hook(keep)
    results = [run.step(batches, iteration, False) for iteration in range(steps)]
    assert not any(result.skipped for result in results)
    return Found([(result.loss, result.grad_norm) for result in results], gradients)


def several(layouts: tuple[Layout, ...]) -> list[Found]:
    return [found(layout.flags, layout.ranks, layout.steps) for layout in layouts]


@cache
def alone(base: str) -> Found:
    """On one rank."""
    result = found(base, 1)
    dist.destroy_process_group()
    return result


def check(*layouts: Layout) -> None:
    """All of one number of ranks."""
    for number, ranks in enumerate(zip(*run_distributed_test(several, layouts[0].ranks, layouts), strict=True)):
        layout = layouts[number]
        expected = alone(layout.base)
        assert all(rank.curve == ranks[0].curve for rank in ranks), f"{layout}: ranks disagree"
        worst = np.abs(np.array(ranks[0].curve) / np.array(expected.curve[: layout.steps]) - 1).max(0)
        assert worst[0] < 1e-5 and worst[1] < 1e-3, f"{layout}: loss, gradient norm differ by {worst}"
        assert {name for rank in ranks for name in rank.gradients} == set(expected.gradients), layout
        largest = max(np.linalg.norm(gradient) for gradient in expected.gradients.values())
        for rank in ranks:
            for name, gradient in rank.gradients.items():
                error = np.linalg.norm(gradient - expected.gradients[name])
                # Of what has no gradient but rounding, such as a bias of all keys, the size says nothing.
                size = max(np.linalg.norm(expected.gradients[name]), 1e-3 * largest)
                assert error < 1e-5 * size, f"{layout}: {name} differs by {error / size:.1e}"


def test_loss_falls() -> None:
    curve = alone(BASE).curve
    assert curve[-1][0] < curve[0][0] - 0.05


def test_every_two_ways_of_sharing_the_work_meet_in_a_layout() -> None:
    together = {frozenset(pair) for layout in (*QUICK, *SLOW) for pair in combinations(layout.names, 2)}
    exclusive = {frozenset(("PP 2", "PP 4")), frozenset(("EP 2", "EP 4"))}
    missing = {frozenset(pair) for pair in combinations(FLAGS, 2)} - together - exclusive
    assert missing == {frozenset(("PP 4", "EP 4"))}, "which needs 16 ranks"
    assert len(QUICK) + len(SLOW) <= 12 and all(layout.ranks <= 8 for layout in (*QUICK, *SLOW))


def test_two_ranks() -> None:
    check(*QUICK[:3])


def test_four_ranks() -> None:
    check(*QUICK[3:])


@pytest.mark.slow
@pytest.mark.parametrize("layout", SLOW, ids=str)
def test_more_ranks(layout: Layout) -> None:
    check(layout)
