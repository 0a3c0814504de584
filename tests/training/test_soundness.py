"""A model that is spoilt never takes the place of a good one: not finite, or giving no finite loss any more."""

from __future__ import annotations

import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from megatron_lsh.checkpoint import Standing, inspect
from megatron_lsh.config import Config
from megatron_lsh.config.checkpoint import CheckpointConfig
from megatron_lsh.errors import CheckpointError
from megatron_lsh.families import GPT, Losses
from megatron_lsh.parallel.context import offline_context
from megatron_lsh.parallel.testing import run_distributed_test
from megatron_lsh.training.early_stopping import BEST, BestWeights, EarlyStopping
from megatron_lsh.training.faults import launch
from megatron_lsh.training.train import train
from tests.checkpoint.toy import Trainer, manager, saved_names
from tests.training.helpers import gpt_with, tiny_config

TRACKER = "latest_checkpointed_iteration.txt"
FLAGS = (
    "--global-batch-size 2 --eval-iters 0 --save-interval 2 --save-retain-interval 1000 --override-opt_param-scheduler"
)


class In:
    """The losses of GPT, with something done to the model, or to the loss, in some iterations (counted from 1)."""

    def __init__(self, action: Callable[[int, nn.Module, Losses], Losses]) -> None:
        self.action, self.count = action, 0

    def __call__(self, cfg: Config, model: nn.Module, batch: Any) -> Losses:
        losses = GPT.losses(cfg, model, batch)
        if not model.training:
            return losses
        self.count += 1
        return self.action(self.count, model, losses)


def run(folder: Path, flags: str, action: Callable[[int, nn.Module, Losses], Losses] | None = None) -> int:
    cfg = tiny_config(f"{FLAGS} {flags} --save {folder} --load {folder}")
    family = GPT if action is None else gpt_with(In(action))
    return launch(lambda: cfg, lambda cfg: train(cfg, family))


def iterations(folder: Path) -> tuple[list[int], str | None]:
    """(iterations of the valid checkpoints, what the tracker names)"""
    tracker = folder / TRACKER
    valid = [info.iteration for info in inspect(folder, hashes=True) if info.valid]
    return sorted(valid), tracker.read_text() if tracker.exists() else None


def times(losses: Losses, factor: float | Tensor) -> Losses:
    return replace(losses, main=replace(losses.main, value=losses.main.value * factor))


NAN = float("nan")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 iterations that went well; of its checkpoints the last one is left."""
    folder = tmp_path_factory.mktemp("trained")
    assert run(folder, "--train-iters 6") == 0
    assert iterations(folder) == ([6], "6")
    return folder


@pytest.fixture
def good(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, to go on with."""
    return Path(shutil.copytree(trained, tmp_path / "good"))


def test_a_learning_rate_that_overflows_leaves_the_good_checkpoint_and_a_lower_one_goes_on(
    good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(good, "--train-iters 30 --lr 1e30") == 1
    assert iterations(good) == ([6], "6")
    assert f"the newest checkpoint with finite weights is {good / 'iter_0000006'}, which a plain --load" in (
        capsys.readouterr().err
    )
    assert run(good, "--train-iters 8") == 0
    assert iterations(good) == ([8], "8")


@contextmanager
def spoilt(iteration: int, count: int | None) -> Iterator[None]:
    """The update of an iteration (counted from 1) makes the first `count` values of every expert's weights infinite."""
    done = 0

    def after(optimizer: Optimizer, *_: object) -> None:
        nonlocal done
        done += 1
        if done == iteration:
            for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
                if weight.ndim == 3:
                    with torch.no_grad():
                        (weight.to_local() if isinstance(weight, DTensor) else weight).view(-1)[:count] = math.inf

    handle = register_optimizer_step_post_hook(after)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("flags", "iteration", "count"),
    [
        ("--train-iters 9", 1, None),  # the next loss is not finite
        ("--train-iters 9", 2, 1),  # found when it is to be saved
        ("--train-iters 9 --async-save", 2, 1),
        ("--train-iters 7", 1, 1),  # found at the end
        ("--train-iters 7 --eval-iters 1", 1, 1),
        ("--train-iters 9 --exit-interval 7", 1, 1),
    ],
)
def test_weights_that_are_not_finite_end_the_run_before_anything_is_saved_or_removed(
    flags: str, iteration: int, count: int | None, good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with spoilt(iteration, count):
        assert run(good, flags) == 1
    assert iterations(good) == ([6], "6")
    said = capsys.readouterr().err
    assert "error: the model is not finite after iteration" in said and "experts" in said and "iter_0000006" in said


def one_rank(folder: str) -> tuple[int, tuple[list[int], str | None]]:
    """Two ranks with experts of their own, of which rank 1 spoils one number in the step that is to be saved."""
    path = Path(folder)
    cfg = tiny_config(f"{FLAGS} --train-iters 5 --global-batch-size 4 --expert-model-parallel-size 2 --save {path}", 2)
    with spoilt(4, 1) if os.environ["RANK"] == "1" else nullcontext():
        status = launch(lambda: cfg, lambda cfg: train(cfg, GPT))
    return status, iterations(path)


def test_one_rank_that_is_not_finite_is_enough(tmp_path: Path) -> None:
    assert run_distributed_test(one_rank, 2, str(tmp_path)) == [(1, ([2], "2"))] * 2


def test_the_checkpoint_before_stays_until_a_step_was_done_with_the_newest(
    good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights of 1e30 are finite, and so are their losses; the gradients are not."""
    assert run(good, "--train-iters 30 --lr 1e30 --save-interval 1") == 1
    assert iterations(good) == ([6, 7], "7")
    said = capsys.readouterr().err
    assert "the newest checkpoint with finite weights is" in said and "iter_0000007, which a plain --load" in said
    assert "(should its steps be skipped as well, --ckpt-step 6 loads the one before)" in said
    assert run(good, "--train-iters 8 --ckpt-step 6 --save-interval 1") == 0
    assert iterations(good) == ([8], "8")


@pytest.mark.parametrize("flags", ["", "--async-save"])
def test_a_chain_of_short_runs_keeps_two(flags: str, tmp_path: Path) -> None:
    for end in (2, 4, 6):
        assert run(tmp_path, f"--train-iters 8 --exit-interval 2 {flags}") == 0
        assert iterations(tmp_path) == ([end - 2, end] if end > 2 else [2], str(end))
    assert run(tmp_path, f"--train-iters 8 {flags}") == 0
    assert iterations(tmp_path) == ([8], "8")


def test_while_steps_are_skipped_no_checkpoint_is_due_and_the_next_good_step_makes_it(tmp_path: Path) -> None:
    seen: dict[int, list[str]] = {}

    def bad(count: int, model: nn.Module, losses: Losses) -> Losses:
        seen[count] = [name for name in saved_names(tmp_path) if name.startswith("iter")]
        return times(losses, NAN) if count in (4, 5) else losses

    assert run(tmp_path, "--train-iters 7", bad) == 0
    two, six = "iter_0000002", "iter_0000006"
    assert seen == {1: [], 2: [], 3: [two], 4: [two], 5: [two], 6: [two], 7: [two, six]}
    assert iterations(tmp_path) == ([7], "7")


@pytest.mark.parametrize("how", ["signal", "exit-interval", "end"])
def test_an_end_while_the_model_is_in_doubt_loses_nothing_and_moves_nothing(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def bad(count: int, model: nn.Module, losses: Losses) -> Losses:
        if count == 5 and how == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        return times(losses, NAN) if count >= 4 else losses

    flags = {"signal": "", "exit-interval": "--exit-interval 5", "end": "--train-iters 5"}[how]
    assert run(tmp_path, f"--train-iters 9 {flags}", bad) == (1 if how == "end" else 0)
    kept, tracked = iterations(tmp_path)
    assert tracked == "2" and kept[0] == 2 and kept[1] in (5, 6)
    out, err = capsys.readouterr()
    assert f"does not name this checkpoint; --ckpt-step {kept[1]} loads it" in out
    assert (
        how != "end"
        or "not finite in the last iterations (2) of the run, so its model may be spoilt; the newest" in err
    )


def test_an_end_with_a_gradient_that_overflows_fp16_removes_nothing(tmp_path: Path) -> None:
    def bad(count: int, model: nn.Module, losses: Losses) -> Losses:
        value = losses.main.value
        infinite = times(losses, 1.0 + (value - value.detach()).square().sqrt())  # the derivative of a root at 0
        return infinite if count == 4 else losses

    assert run(tmp_path, "--train-iters 4 --fp16 --initial-loss-scale 1024", bad) == 0
    assert iterations(tmp_path) == ([2, 4], "4")


def test_a_run_whose_every_step_was_skipped_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in ("--train-iters 3", "--train-iters 9 --exit-interval 3"):
        assert run(tmp_path, flags, lambda count, model, losses: times(losses, NAN)) == 1
        assert iterations(tmp_path) == ([], None)
        said = capsys.readouterr().err
        assert "was not finite in any of the 3 iterations since the start of this run" in said
        assert "there is no checkpoint to go back to" in said


# The checkpoints' own rules


def test_a_checkpoint_that_was_saved_before_such_a_model_was_refused_gives_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx, trainer = offline_context(device="cpu"), Trainer(offline_context(device="cpu"))
    checkpoints = manager(ctx, tmp_path)
    trainer.train(1)
    checkpoints.save(trainer.state())
    trainer.train(2)
    with monkeypatch.context() as before, torch.no_grad():
        before.setattr("megatron_lsh.checkpoint.manager.not_finite", lambda tensors: [])
        trainer.model.odd[0, 0] = NAN
        checkpoints.save(trainer.state())
    later = manager(ctx, tmp_path)
    result = Trainer(ctx, seed=9).resume(later)
    assert result is not None and result.iteration == 1
    assert any("its model is not finite: odd" in line for line in later.said)  # type: ignore[attr-defined]


def test_the_optimizer_is_part_of_what_must_be_finite(tmp_path: Path) -> None:
    ctx = offline_context(device="cpu")
    trainer = Trainer(ctx)
    trainer.train(1)
    state = trainer.optimizer.state[trainer.model.odd]  # type: ignore[index]
    state["exp_avg_sq"][0, 0] = math.inf
    with pytest.raises(
        CheckpointError, match=r"not finite after iteration 1: optimizer\.state\.odd\.exp_avg_sq on rank 0"
    ):
        manager(ctx, tmp_path).save(trainer.state())
    assert saved_names(tmp_path) == []


def test_the_best_weights_are_never_those_of_a_validation_that_is_not_finite(tmp_path: Path) -> None:
    watcher = EarlyStopping("accuracy", patience=2)
    assert not watcher.observe(1, {"loss": NAN, "accuracy": 0.9}) and watcher.best_iteration is None
    assert watcher.observe(2, {"loss": 1.0, "accuracy": 0.3}) and not watcher.observe(3, {"loss": 1.0, "accuracy": NAN})
    ctx, trainer = offline_context(device="cpu"), Trainer(offline_context(device="cpu"))
    keeper = BestWeights(CheckpointConfig(save=str(tmp_path)), ctx, timedelta(minutes=1))
    for iteration, standing in ((1, Standing.SOUND), (2, Standing.DOUBTFUL), (3, Standing.DOUBTFUL)):
        trainer.train(iteration)
        keeper.save(trainer.state(), standing)
    assert iterations(tmp_path / BEST) == ([1, 2, 3], "3")
    trainer.train(4)
    keeper.save(trainer.state(), Standing.SOUND)
    assert iterations(tmp_path / BEST) == ([4], "4")
