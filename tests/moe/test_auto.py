from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from megatron_lsh.config import LSHConfig
from megatron_lsh.moe import auto
from megatron_lsh.moe.auto import MARGIN, SETTLE, Decision, Trial, decide, restore_decisions, save_decisions, trials
from megatron_lsh.moe.timing import timed_region
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
        exact = paused or trial.exact
        ran_exact.append(exact)
        if trial._measures():
            slow = 1000.0 if iteration < warmup + 2 * SETTLE else 0.0  # first calls, not to be counted
            trial._spans += [FakeSpan(slow + (exact_ms if exact else lsh_ms) / 2)] * 2  # type: ignore[list-item]
    return ran_exact


class Layer(nn.Module):
    def __init__(self, trial: Trial) -> None:
        super().__init__()
        self.trial = trial


@pytest.mark.parametrize(
    ("lsh_ms", "chosen"), [(50.0, True), (100.0 * (1 - MARGIN) - 0.1, True), (100.0 * (1 - MARGIN) + 0.1, False)]
)
def test_lsh_only_where_it_saves_time(lsh_ms: float, chosen: bool) -> None:
    trial = Trial(3, iterations=2, device=CPU)
    ctx = offline_context(device="cpu")
    ran = run_trial(trial, 100.0, lsh_ms, iterations=2 * SETTLE + 4, warmup=0)
    assert ran == [True, False] * (SETTLE + 2)
    assert decide([trial], ctx) is None  # the last iteration is not booked yet
    trial.begin(len(ran), paused=False)
    text = decide([trial], ctx)
    assert trial.decision == Decision(chosen, 100.0, pytest.approx(lsh_ms)) and trial.exact != chosen
    assert text is not None and f"layer 3: {'lsh' if chosen else 'exact'} (exact 100.0 ms" in text
    assert decide([trial], ctx) is None
    trial.begin(len(ran) + 1, paused=False)
    assert trial.exact != chosen


def test_measuring_waits_for_the_warm_up_and_starts_again_on_resume() -> None:
    trial = Trial(0, iterations=1, device=CPU)
    assert trial.exact
    ran = run_trial(trial, 2.0, 1.0, iterations=4 + 2 * SETTLE + 2, warmup=4)
    assert ran[:4] == [True] * 4 and ran[4:] == [True, False] * (SETTLE + 1)
    trial.begin(len(ran), paused=False)
    assert trial.due() and trial.medians() == [2.0, 1.0]
    resumed = Trial(0, iterations=1, device=CPU)
    run_trial(resumed, 2.0, 1.0, iterations=3, first=7)
    assert not resumed.due()


def test_decisions_travel_in_checkpoints() -> None:
    before, after = (nn.ModuleList([Layer(Trial(n, 1, CPU)) for n in range(3)]) for _ in range(2))
    assert save_decisions(before) == {}
    for trial, lsh in zip(trials(before), (True, False, True), strict=True):
        trial.decision = Decision(lsh, 2.0, 1.0)
    saved = json.loads(json.dumps(save_decisions(before)))
    text = restore_decisions(after, saved)
    assert text is not None and "LSH in 2 of 3" in text and "measured before" in text
    assert [trial.decision for trial in trials(after)] == [trial.decision for trial in trials(before)]
    assert restore_decisions(nn.Linear(1, 1), saved) is None


def test_layers_that_cannot_gain_are_not_measured() -> None:
    from tests.moe.test_dispatchers import make_layer, single

    layer, _ = make_layer(single(), "auto", LSHConfig())
    assert layer.trial is None  # every expert is here
    assert trials(layer) == []
    assert auto.trials(nn.ModuleList([Layer(Trial(0, 1, CPU)), layer]))[0].layer == 0


def test_timed_region_counts_both_passes() -> None:
    spans = []
    x = torch.randn(4, requires_grad=True)
    with timed_region(CPU, spans.append) as region:
        y = region.leave(region.enter(x) * 2)
    assert len(spans) == 1
    (y**2).sum().backward()
    assert len(spans) == 2 and all(span.milliseconds() > 0 for span in spans)
    assert torch.equal(x.grad, 8 * x.detach())
    with timed_region(CPU, spans.append) as region, torch.no_grad():
        region.leave(region.enter(x.detach()))
    assert len(spans) == 3
