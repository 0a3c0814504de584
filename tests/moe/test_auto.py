from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from megatron_lsh.config import LSHConfig
from megatron_lsh.moe.layer_pass import measure
from megatron_lsh.moe.registry import build_dispatcher
from megatron_lsh.moe.schedule import (
    MARGIN,
    SETTLE,
    Decision,
    Scheduled,
    Trial,
    decide,
    restore_decisions,
    save_decisions,
    trials,
)
from megatron_lsh.parallel.context import offline_context

CPU = torch.device("cpu")


class FakeSpan:
    def __init__(self, ms: float) -> None:
        self.ms = ms

    def milliseconds(self) -> float:
        return self.ms


def run_trial(
    trial: Trial, exact_ms: float, lsh_ms: float, iterations: int, first: int = 0, warmup: int = 0
) -> list[bool]:
    """Drive a trial with two micro-batches per iteration; returns which iterations ran exactly."""
    ran_exact = []
    for iteration in range(first, first + iterations):
        paused = iteration < warmup
        trial.begin(iteration, paused)
        trial.begin(iteration, paused)  # an evaluation looks at the iteration again
        exact = paused or trial.current == "exact"
        ran_exact.append(exact)
        if trial.measures:
            slow = 1000.0 if iteration < warmup + 2 * SETTLE else 0.0  # first calls, not to be counted
            for _ in range(2):
                trial.add(FakeSpan(slow + (exact_ms if exact else lsh_ms) / 2))  # type: ignore[arg-type]
    return ran_exact


def make_trial(layer: int, iterations: int) -> Trial:
    return Trial(layer, ("exact", "lsh"), iterations, CPU)


def layers_with(trials: list[Trial]) -> nn.ModuleList:
    return nn.ModuleList([Scheduled({}, "exact", LSHConfig(), trial.layer, trial) for trial in trials])


@pytest.mark.parametrize(
    ("lsh_ms", "chosen"), [(50.0, True), (100.0 * (1 - MARGIN) - 0.1, True), (100.0 * (1 - MARGIN) + 0.1, False)]
)
def test_lsh_only_where_it_saves_time(lsh_ms: float, chosen: bool) -> None:
    trial, name = make_trial(3, iterations=2), "lsh" if chosen else "exact"
    ctx = offline_context(device="cpu")
    ran = run_trial(trial, 100.0, lsh_ms, iterations=2 * SETTLE + 4, warmup=0)
    assert ran == [True, False] * (SETTLE + 2)
    assert decide([trial], ctx) is None  # the last iteration is not booked yet
    trial.begin(len(ran), paused=False)
    text = decide([trial], ctx)
    assert trial.decision == Decision(name, {"exact": 100.0, "lsh": pytest.approx(lsh_ms)}) and trial.current == name
    assert text is not None and f"layer 3: {name} (exact 100.0 ms" in text
    assert decide([trial], ctx) is None
    trial.begin(len(ran) + 1, paused=False)
    assert trial.current == name


def test_the_fastest_of_three_that_is_fast_enough_is_kept() -> None:
    trial = Trial(0, ("exact", "node", "lsh"), 1, CPU)
    ran, ms = [], {"exact": 10.0, "node": 9.7, "lsh": 8.0}
    for iteration in range(3 * SETTLE + 4):
        trial.begin(iteration, paused=False)
        ran.append(trial.current)
        trial.add(FakeSpan(ms[trial.current]))  # type: ignore[arg-type]
    assert ran[:4] == ["exact", "node", "lsh", "exact"]
    assert decide([trial], offline_context(device="cpu")) is not None
    assert trial.decision == Decision("lsh", ms) and trial.current == "lsh"


@pytest.mark.parametrize(
    ("lsh_ms", "per_rank_ms", "chosen"),
    [(86.0, 70.0, "lsh per rank"), (70.0, 80.0, "lsh"), (86.0, 87.0, "deduplicated")],  # 5% less than 90 is 85.5
)
def test_over_nodes_every_way_is_tried(lsh_ms: float, per_rank_ms: float, chosen: str) -> None:
    """Exact, one row per (token, node), LSH per node and per rank: the fastest; LSH must save 5% of the best exact way."""
    from tests.moe.test_nodes import spec

    trial = build_dispatcher(spec(4, 4, 2, moe_token_dispatcher_type="auto", lsh_auto_iters=1)).trial
    assert trial is not None and trial.names == ("exact", "deduplicated", "lsh", "lsh per rank")
    ms = dict(zip(trial.names, (100.0, 90.0, lsh_ms, per_rank_ms), strict=True))
    for iteration in range(4 * SETTLE + 5):
        trial.begin(iteration, paused=False)
        trial.add(FakeSpan(ms[trial.current]))  # type: ignore[arg-type]
    line = decide([trial], offline_context(device="cpu"))
    assert trial.current == chosen and line is not None and "\n" not in line
    assert all(f"{name} {took:.1f} ms" in line for name, took in ms.items()), "it says why"


def test_measuring_waits_for_the_warm_up_and_starts_again_on_resume() -> None:
    trial = make_trial(0, iterations=1)
    assert trial.current == "exact"
    ran = run_trial(trial, 2.0, 1.0, iterations=4 + 2 * SETTLE + 2, warmup=4)
    assert ran[:4] == [True] * 4 and ran[4:] == [True, False] * (SETTLE + 1)
    trial.begin(len(ran), paused=False)
    assert trial.due() and trial.medians() == [2.0, 1.0]
    resumed = make_trial(0, iterations=1)
    run_trial(resumed, 2.0, 1.0, iterations=3, first=7)
    assert not resumed.due()


def test_decisions_travel_in_checkpoints() -> None:
    before, after = (layers_with([make_trial(n, 1) for n in range(3)]) for _ in range(2))
    assert save_decisions(before) == {}
    for trial, choice in zip(trials(before), ("lsh", "exact", "lsh"), strict=True):
        trial.decision = Decision(choice, {"exact": 2.0, "lsh": 1.0})
    saved = json.loads(json.dumps(save_decisions(before)))
    text = restore_decisions(after, saved)
    assert text is not None and "LSH in 2 of 3" in text and "measured before" in text
    assert [trial.decision for trial in trials(after)] == [trial.decision for trial in trials(before)]
    assert restore_decisions(nn.Linear(1, 1), saved) is None


def test_decisions_of_the_first_version_are_understood() -> None:
    model = layers_with([make_trial(n, 1) for n in range(2)])
    saved = {str(n): {"lsh": n == 1, "exact_ms": 2.0, "lsh_ms": 1.5} for n in range(2)}
    assert restore_decisions(model, saved) is not None
    assert [trial.decision for trial in trials(model)] == [
        Decision("exact", {"exact": 2.0, "lsh": 1.5}), Decision("lsh", {"exact": 2.0, "lsh": 1.5})
    ]  # fmt: skip


def test_layers_that_cannot_gain_are_not_measured() -> None:
    from tests.moe.test_dispatchers import make_layer, single

    layer, _ = make_layer(single(), "auto", LSHConfig())
    assert layer.dispatcher.trial is None  # every expert is here
    assert trials(layer) == []
    assert trials(nn.ModuleList([*layers_with([make_trial(0, 1)]), layer]))[0].layer == 0


def test_measure_counts_both_passes() -> None:
    spans = []
    x = torch.randn(4, requires_grad=True)
    y = measure(CPU, spans.append, lambda x: x * 2, x)
    assert len(spans) == 1
    (y**2).sum().backward()
    assert len(spans) == 2 and all(span.milliseconds() > 0 for span in spans)
    assert torch.equal(x.grad, 8 * x.detach())
    measure(CPU, spans.append, lambda x: x, x.detach())
    with torch.no_grad():
        measure(CPU, spans.append, lambda x: x, x)
    assert len(spans) == 4
