"""A run in pieces is the run in one piece: its validations, learning rates, length and optimizer settings."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import destroy_process_group

from megatron_lsh.errors import CheckpointError
from megatron_lsh.families import GPT
from megatron_lsh.observing.writers import read_jsonl
from megatron_lsh.parallel.initialize import initialize, shutdown
from megatron_lsh.training.run import set_up
from megatron_lsh.training.train import train
from tests.training.helpers import gpt_with, tiny_config
from tests.training.test_signals import During

EVALUATED = "--train-iters 8 --eval-interval 2 --global-batch-size 2"


def go(folder: Path, flags: str, event: During | None = None) -> Any:
    """Train, from the checkpoint in `folder` if there is one; returns the state at the end."""
    cfg = tiny_config(f"{flags} --save {folder}/c --load {folder}/c --metrics-jsonl {folder}/m.jsonl")
    return train(cfg, GPT if event is None else gpt_with(event))


def values(folder: Path, *keys: str) -> list[tuple[Any, ...]]:
    """(iteration, values) of the records that have all of `keys`."""
    records = read_jsonl(folder / "m.jsonl")
    return [(r["iteration"], *(r[key] for key in keys)) for r in records if all(key in r for key in keys)]


# Validations


def test_the_validation_due_at_exit_interval_is_made(tmp_path: Path) -> None:
    go(tmp_path / "one", EVALUATED)
    go(tmp_path / "two", f"{EVALUATED} --exit-interval 4")
    assert [iteration for iteration, _ in values(tmp_path / "two", "validation_loss")] == [2, 4]
    go(tmp_path / "two", EVALUATED)
    assert values(tmp_path / "two", "validation_loss") == values(tmp_path / "one", "validation_loss")


@pytest.mark.parametrize("arrives", [3, 4, 7, 8])
def test_a_signal_leaves_the_validation_that_is_due_to_the_resumed_run(
    arrives: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A signal during iteration 3 or 7 is heard of in the next one, one during 4 or 8 in the validation that follows."""
    go(tmp_path / "one", EVALUATED)
    stopped = go(tmp_path / "two", EVALUATED, During(arrives, 0, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert stopped.iteration == (4 if arrives < 5 else 8) and stopped.evaluation_due
    assert "the validation due there is left to the run that resumes" in capsys.readouterr().out
    assert not go(tmp_path / "two", EVALUATED).evaluation_due
    assert values(tmp_path / "two", "validation_loss") == values(tmp_path / "one", "validation_loss")
    go(tmp_path / "two", EVALUATED)  # it was noted that it has been made
    assert len(values(tmp_path / "two", "validation_loss")) == 4


def test_rates_that_follow_the_energy_go_on_where_they_were(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To the bit; in the second part rates are those of the first. The probe tells of layers that are far off."""
    flags = (
        f"{EVALUATED} --moe-token-dispatcher-type lsh --lsh-target-rate 0.9 --lsh-target-energy 0.3 --lsh-eval both "
    )
    flags += "--moe-per-layer-logging --lsh-probe-interval 1 --lsh-probe-warn 1e-6"
    go(tmp_path / "one", flags)
    go(tmp_path / "two", f"{flags} --exit-interval 3")
    told = capsys.readouterr().out
    go(tmp_path / "two", flags)
    keys = ("lm_loss", "grad_norm", "lsh_compression_rate_per_layer", "lsh_layers_above_probe_warn")
    whole = values(tmp_path / "one", *keys)
    assert whole == values(tmp_path / "two", *keys)
    assert values(tmp_path / "one", "validation_loss") == values(tmp_path / "two", "validation_loss")
    rates = [per_layer for _, _, _, per_layer, _ in whole]
    assert rates[0] != rates[3] != rates[-1] and max(map(max, rates[-2:])) < min(rates[0])
    assert "LSH sends between 5.0% and 90.0% of the rows of each layer" in told
    assert told.count("WARNING: restored rows are off by more than --lsh-probe-warn 1e-06") == 2  # once a run
    assert [above for *_, above in whole] == [[0, 1]] * 8


def test_a_complete_run_says_that_nothing_is_left_to_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    go(tmp_path, "--train-iters 2 --eval-iters 0")
    go(tmp_path, "--train-iters 2 --eval-iters 0")
    assert "> nothing left to train: the checkpoint is at iteration 2, and the run has 2" in capsys.readouterr().out


# Learning rates


def test_the_schedule_goes_on_without_the_optimizers_state(tmp_path: Path) -> None:
    flags = "--train-iters 12 --lr-decay-style cosine --lr-warmup-iters 4 --eval-iters 0 --global-batch-size 2"
    go(tmp_path / "one", flags)
    go(tmp_path / "two", f"{flags} --exit-interval 8 --no-save-optim")
    go(tmp_path / "two", f"{flags} --no-load-optim")
    assert values(tmp_path / "two", "learning_rate") == values(tmp_path / "one", "learning_rate")


# Lengths


@pytest.mark.parametrize(("batch", "iterations"), [(8, 12), (2, 24), (6, 13)])
def test_train_samples_is_the_length_whatever_the_batch_size_was(
    batch: int, iterations: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """32 samples in 8 iterations of 4, and then what is left of 64."""
    flags = "--train-samples 64 --eval-iters 0 --lr-decay-style cosine"
    go(tmp_path, f"{flags} --global-batch-size 4 --exit-interval 8")
    state = go(tmp_path, f"{flags} --global-batch-size {batch}")
    assert state.iteration == iterations and state.consumed_samples == 32 + (iterations - 8) * batch
    assert 64 - batch < state.consumed_samples <= 64
    said = f"WARNING: the global batch size is {batch}, and was 4 in the checkpoint: the run ends after iteration"
    assert f"{said} {iterations}, with {state.consumed_samples} samples" in capsys.readouterr().out
    saved = json.loads((tmp_path / "c" / "config.json").read_text())
    assert saved["config"]["training"]["train_iters"] == iterations
    assert go(tmp_path, f"{flags} --global-batch-size {batch}").iteration == iterations


def test_a_changed_batch_is_announced_for_a_length_in_iterations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    go(tmp_path, "--train-iters 4 --eval-iters 0 --global-batch-size 4 --exit-interval 2")
    state = go(tmp_path, "--train-iters 4 --eval-iters 0 --global-batch-size 2")
    assert (state.iteration, state.consumed_samples) == (4, 12)
    assert "the run ends after iteration 4, with 12 samples" in capsys.readouterr().out


# The optimizer's settings


def test_settings_of_the_optimizer_are_the_command_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--eval-iters 0 --global-batch-size 2 --adam-beta2"
    go(tmp_path / "long", f"{flags} 0.9 --train-iters 3")
    go(tmp_path / "run", f"{flags} 0.9 --train-iters 2")
    go(tmp_path / "run", f"{flags} 0.9 --train-iters 3")
    assert values(tmp_path / "run", "lm_loss") == values(tmp_path / "long", "lm_loss")
    assert "which holds" not in capsys.readouterr().out

    cfg = tiny_config(f"{flags} 0.5 --adam-eps 1e-6 --bf16 --load {tmp_path}/run/c --train-iters 4")
    ctx = initialize(cfg.parallel)
    run = set_up(cfg, GPT, ctx)
    for group in run.step.optimizer.param_groups:
        assert (group["betas"], group["eps"], group["lr"]) == ((0.9, 0.5), 1e-6, 1e-3)
    assert any(state["exp_avg_sq"].any() for state in run.step.optimizer.state.values()), (
        "the state is the checkpoint's"
    )
    shutdown(ctx)
    out = capsys.readouterr().out
    assert "WARNING: --adam-beta2 is 0.9 in the checkpoint and 0.5 now, which holds" in out
    assert "WARNING: --adam-eps is 1e-08 in the checkpoint and 1e-06 now, which holds" in out
    assert "WARNING: --bf16 is False in the checkpoint and True now" in out


@pytest.mark.parametrize(("saved", "now"), [("adam", "sgd"), ("sgd", "adam")])
def test_the_state_of_another_kind_of_optimizer_is_refused(saved: str, now: str, tmp_path: Path) -> None:
    flags = "--eval-iters 0 --global-batch-size 2 --optimizer"
    go(tmp_path, f"{flags} {saved} --train-iters 1")
    said = f"--optimizer is {saved} in the checkpoint and {now} now: give --optimizer {saved}, or --no-load-optim"
    with pytest.raises(CheckpointError, match=said):
        try:
            go(tmp_path, f"{flags} {now} --train-iters 2")
        finally:
            destroy_process_group()
    assert go(tmp_path, f"{flags} {now} --train-iters 2 --no-load-optim").iteration == 2
