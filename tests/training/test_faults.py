"""Non-finite steps, signals, and errors of a single rank, on two ranks."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_lsh.config import Config, TrainingConfig
from megatron_lsh.errors import ConfigError, DataError, MegatronLSHError
from megatron_lsh.families import GPT, Losses
from megatron_lsh.observing.writers import read_jsonl
from megatron_lsh.parallel.agreement import together
from megatron_lsh.parallel.context import offline_context
from megatron_lsh.parallel.initialize import initialize, shutdown
from megatron_lsh.parallel.testing import run_distributed_test
from megatron_lsh.training.faults import StopRequest, launch
from megatron_lsh.training.run import set_up
from megatron_lsh.training.train import train
from tests.training.helpers import copy_state, gpt_with, tiny_config

BIAS = "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-load-balancing-type none"


class NanOnRank:
    """A loss that is not finite, or whose gradient is not, in one micro-batch of one rank of some iterations."""

    def __init__(self, rank: int, calls: set[int], gradient_only: bool = False) -> None:
        self.rank, self.calls, self.gradient_only, self.count = rank, calls, gradient_only, 0

    def __call__(self, cfg: Config, model: nn.Module, batch: Any) -> Losses:
        losses = GPT.losses(cfg, model, batch)
        self.count += 1
        if self.count - 1 not in self.calls or int(os.environ["RANK"]) != self.rank:
            return losses
        loss = losses.main.value
        zero = (loss - loss.detach()).square()  # d/dx of 0 * sqrt(x) at 0
        bad = loss + zero.sqrt() if self.gradient_only else loss * float("nan")
        return replace(losses, main=replace(losses.main, value=bad))


def skip_on_two_ranks() -> tuple[list[bool], list[float]]:
    cfg = tiny_config(f"{BIAS} --expert-model-parallel-size 2 --global-batch-size 8", 2)
    ctx = initialize(cfg.parallel)
    loss = NanOnRank(1, {3})  # the second micro-batch of the second iteration
    run = set_up(cfg, gpt_with(loss), ctx)
    gradient = NanOnRank(0, {0}, gradient_only=True)
    batches = run.batches("train")
    results = [run.step(batches, 0, False)]
    before = _everything(run)
    results.append(run.step(batches, 1, False))
    _assert_same(before, _everything(run))
    for layer in run.model.moe_layers():  # type: ignore[operator]
        assert int(layer.router._step_counts_E.sum()) == 0, "the load of a skipped step must not count"
    bad_gradient = replace(run.step, forward_step=partial(gradient, cfg))
    results.append(bad_gradient(batches, 2, False))
    _assert_same(before, _everything(run))
    results.append(run.step(batches, 3, False))
    after = _everything(run)
    assert not torch.equal(before["model"][0], after["model"][0]), "training goes on"
    assert after["schedule"]["samples"] == before["schedule"]["samples"] + 8
    shutdown(ctx)
    return [result.skipped for result in results], [result.loss for result in results]


def rows_that_are_not_finite() -> list[bool]:
    """Poison what enters the MoE layers, on one rank; their rows are hashed, clustered and restored before anybody looks."""
    cfg = tiny_config("--expert-model-parallel-size 2 --moe-token-dispatcher-type lsh --lsh-target-rate 0.3", 2)
    ctx = initialize(cfg.parallel)
    run = set_up(cfg, GPT, ctx)
    batches, before = run.batches("train"), _everything(run)

    def skips(poison: Tensor, tokens: int) -> bool:
        def poisoned(module: nn.Module, arguments: Any, x_SBD: Tensor) -> Tensor:
            noise_SBD = torch.zeros_like(x_SBD)
            noise_SBD[: tokens if ctx.rank == 1 else 0] = poison
            return x_SBD + noise_SBD

        hook = run.model.embedding.register_forward_hook(poisoned)
        skipped = run.step(batches, 0, False).skipped
        hook.remove()
        return skipped

    skipped = []
    infinite = torch.tensor(float("inf"))
    nan = infinite * 0  # on x86 the NaN that arithmetic makes has its sign bit set
    for poison in (infinite, -infinite, nan, -nan):
        for tokens in (1, 32):
            skipped.append(skips(poison, tokens))
            _assert_same(before, _everything(run))
    skipped.append(run.step(batches, 0, False).skipped)
    shutdown(ctx)
    return skipped


def test_rows_that_are_not_finite_skip_the_step_and_nothing_else() -> None:
    assert run_distributed_test(rows_that_are_not_finite, 2) == [[True] * 8 + [False]] * 2


def _everything(run: Any) -> dict[str, Any]:
    return {
        "model": copy_state([*run.model.parameters(), *run.model.buffers()]),
        "optimizer": copy_state(run.step.optimizer.state_dict()),
        "schedule": run.step.schedule.state_dict(),
    }


def _assert_same(before: Any, after: Any) -> None:
    if isinstance(before, Tensor):
        assert torch.equal(before, after)
    elif isinstance(before, dict):
        assert before.keys() == after.keys()
        for key in before:
            _assert_same(before[key], after[key])
    elif isinstance(before, list):
        for one, other in zip(before, after, strict=True):
            _assert_same(one, other)
    else:
        assert before == after


def test_all_ranks_skip_a_non_finite_step_and_change_nothing() -> None:
    (skipped, losses), other = run_distributed_test(skip_on_two_ranks, 2)
    assert skipped == [False, True, True, False]
    assert losses[0] == other[1][0] and losses[1] != losses[1]  # NaN
    assert other[0] == skipped


def endless_nan(folder: str) -> tuple[int, str]:
    cfg = tiny_config(
        f"--max-consecutive-nan-iterations 3 --metrics-jsonl {folder}/metrics.jsonl --global-batch-size 4", 2
    )
    family = gpt_with(NanOnRank(0, {1, 3, 4, 5, 6}))
    message = ""

    def run(cfg: Config) -> None:
        nonlocal message
        try:
            train(cfg, family)
        except MegatronLSHError as error:
            message = str(error)
            raise

    return launch(lambda: cfg, run), message


def test_too_many_non_finite_steps_end_the_run_on_all_ranks(tmp_path: Path) -> None:
    for status, message in run_distributed_test(endless_nan, 2, str(tmp_path)):
        assert status == 1
        assert "not finite in 3 iterations in a row, up to iteration 6" in message
    records = read_jsonl(tmp_path / "metrics.jsonl")
    assert [record["nan_iterations"] for record in records] == [0, 1, 0, 1, 1, 1]
    assert [record["lm_loss"] is None for record in records] == [False, True, False, True, True, True]


class SignalOnRank:
    """Sends this process a signal during the forward pass of some iteration, on one rank only."""

    def __init__(self, rank: int, iteration: int, number: int) -> None:
        self.rank, self.iteration, self.number, self.count = rank, iteration, number, 0

    def __call__(self, cfg: Config, model: nn.Module, batch: Any) -> Losses:
        if model.training:
            if self.count == self.iteration and int(os.environ["RANK"]) == self.rank:
                os.kill(os.getpid(), self.number)
            self.count += 1
        return GPT.losses(cfg, model, batch)


def interrupted(folder: str) -> tuple[int, int]:
    cfg = tiny_config(f"--save {folder}/ckpt --metrics-jsonl {folder}/metrics.jsonl --global-batch-size 4", 2)
    ended_at = -1

    def run(cfg: Config) -> None:
        nonlocal ended_at
        ended_at = train(cfg, gpt_with(SignalOnRank(1, 4, signal.SIGTERM))).iteration

    return launch(lambda: cfg, run), ended_at


def test_signal_on_one_rank_saves_and_ends_all_with_status_0(tmp_path: Path) -> None:
    # The signal may come after this rank told the others about iteration 5; then all of them learn of it in 6.
    (status, ended_at), other = run_distributed_test(interrupted, 2, str(tmp_path))
    assert (status, ended_at) == other
    assert status == 0 and ended_at in (5, 6)
    assert (tmp_path / "ckpt" / "latest_checkpointed_iteration.txt").read_text() == str(ended_at)
    assert [record["iteration"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == list(range(1, ended_at + 1))


def one_rank_fails(kind: str) -> tuple[str, str, object]:
    ctx = initialize(tiny_config("", 2).parallel)
    assert together(ctx, lambda: ctx.rank) == ctx.rank

    def action() -> None:
        if ctx.rank == 1:
            raise DataError("no such file") if kind == "data" else ZeroDivisionError("a bug")

    try:
        together(ctx, action)
    except Exception as error:
        return type(error).__name__, str(error), error.reported_by  # type: ignore[attr-defined]
    return "", "", None


@pytest.mark.parametrize("kind", ["data", "bug"])
def test_an_error_of_one_rank_is_an_error_of_all(kind: str) -> None:
    innocent, guilty = run_distributed_test(one_rank_fails, 2, kind)
    if kind == "data":
        assert innocent == ("MegatronLSHError", "rank 1 failed: DataError: no such file", 1)
        assert guilty == ("DataError", "no such file", 1)
    else:
        assert "ZeroDivisionError" in innocent[1] and "Traceback" in innocent[1]
        assert guilty == ("ZeroDivisionError", "a bug", 1)


def test_launch_tells_mistakes_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        raise ConfigError("--lr is missing")

    assert launch(refuse, lambda _: None) == 1
    assert capsys.readouterr().err == "error: --lr is missing\n"
    assert launch(lambda: None, lambda _: refuse()) == 1
    assert capsys.readouterr().err == "error: [rank 0] --lr is missing\n"
    ctx = offline_context(device="cpu")
    assert launch(lambda: None, lambda _: together(ctx, refuse)) == 1
    assert capsys.readouterr().err == "error: --lr is missing\n"
    assert launch(lambda: 3, lambda _: None) == 0
    with pytest.raises(ZeroDivisionError):
        launch(lambda: 1 // 0, lambda _: None)


def test_stop_request() -> None:
    former = signal.getsignal(signal.SIGINT)
    with StopRequest(TrainingConfig()) as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert stop.requested and stop.reason == "received SIGINT"
    assert signal.getsignal(signal.SIGINT) is former
    late = StopRequest(TrainingConfig(exit_duration_in_mins=1.0), started=time.monotonic() - 61.0)
    assert late.requested and late.reason == "reached --exit-duration-in-mins"
