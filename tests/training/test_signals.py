"""Ends that nobody planned: signals, a launcher that dies, ranks that are lost, frozen or hang."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn

from megatron_lsh.config import Config, TrainingConfig, parse_args
from megatron_lsh.data.samples.dataset import Dataset
from megatron_lsh.data.samples.kinds import GPTSamples
from megatron_lsh.data.tokenizers import Tokenizer
from megatron_lsh.errors import ConfigError
from megatron_lsh.families import GPT, Losses
from megatron_lsh.families.family import text_datasets
from megatron_lsh.families.gpt import samples
from megatron_lsh.parallel.testing import DistributedTestError, run_distributed_test
from megatron_lsh.training import heartbeat, watch
from megatron_lsh.training.faults import Launcher, StopRequest, launch
from megatron_lsh.training.train import train
from tests.training.helpers import gpt_with, tiny_config

TRACKER = "latest_checkpointed_iteration.txt"


class During:
    """The loss of the tests, and something that happens to one rank during an iteration (counted from 1)."""

    def __init__(self, iteration: int, rank: int, action: Callable[[], object]) -> None:
        self.iteration, self.rank, self.action, self.count = iteration, rank, action, 0

    def __call__(self, cfg: Config, model: nn.Module, batch: Any) -> Losses:
        if model.training:
            self.count += 1
            if self.count == self.iteration and int(os.environ.get("RANK", "0")) == self.rank:
                self.action()
        return GPT.losses(cfg, model, batch)


def run(flags: str, event: During, world_size: int = 1) -> int:
    """Exit status of a run with one micro-batch per iteration."""
    cfg = tiny_config(f"{flags} --global-batch-size {2 * world_size} --eval-iters 0", world_size)
    return launch(lambda: cfg, lambda cfg: train(cfg, gpt_with(event)))


def forked(action: Callable[[], int], log: Path) -> int:
    """Process id of a child that does `action` and exits with what it returns; its output goes to `log`."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        status = action()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


# Signals


@pytest.mark.parametrize("number", StopRequest.SIGNALS)
def test_every_one_of_these_signals_saves_and_ends_with_status_0(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"--save {tmp_path}", During(3, 0, lambda: os.kill(os.getpid(), number))) == 0
    assert f"> received {number.name}: stopped after iteration" in capsys.readouterr().out
    assert (tmp_path / TRACKER).read_text() in ("3", "4")
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def test_an_ignored_signal_stays_ignored_unless_it_is_asked_for() -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup leaves to its child
    try:
        with StopRequest(TrainingConfig()) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
        with StopRequest(TrainingConfig(exit_signal="SIGHUP")) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested and stop.reason == "received SIGHUP"
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


def test_exit_signal_takes_megatrons_names() -> None:
    for text in ("SIGUSR2", "sigusr2", "usr2"):
        assert tiny_config(f"--exit-signal {text} --exit-signal-handler").training.exit_signal == "SIGUSR2"
    with pytest.raises(ConfigError, match=r"exit_signal .*SIGKILL.* must be one of SIGTERM, SIGINT"):
        parse_args(["--exit-signal", "SIGKILL"])
        tiny_config("--exit-signal SIGKILL")


# A launcher that dies


@pytest.mark.parametrize("wrapper", [False, True])
@pytest.mark.parametrize("torchrun", [True, False])
def test_the_death_of_torchrun_is_noticed_and_that_of_a_shell_is_not(
    torchrun: bool, wrapper: bool, tmp_path: Path
) -> None:
    told, dead = tmp_path / "told", tmp_path / "dead"

    def rank() -> int:
        if torchrun:
            os.environ["TORCHELASTIC_RUN_ID"] = "1"
        else:
            os.environ.pop("TORCHELASTIC_RUN_ID", None)
        launcher = Launcher()
        told.write_text(f"{launcher.gone} ")
        wait_for(dead.exists)
        with told.open("a") as file:
            file.write(str(launcher.gone))
        told.rename(tmp_path / "done")
        return 0

    def started() -> int:  # what torchrun starts is the leader of a session: the rank, or a script that waits for it
        os.setsid()
        return rank() if not wrapper else os.waitpid(forked(rank, tmp_path / "log"), 0)[1]

    def parent() -> int:
        forked(started, tmp_path / "log")
        wait_for(told.exists)
        time.sleep(0.1)
        return 0

    os.waitpid(forked(parent, tmp_path / "log"), 0)
    dead.touch()
    wait_for((tmp_path / "done").exists)
    assert (tmp_path / "done").read_text() == f"False {torchrun}"


def wait_for(condition: Callable[[], object], seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def orphans(folder: str) -> list[str]:
    """Two ranks whose parent is killed in their third iteration by one of them."""
    logs = [Path(folder) / f"rank{rank}.log" for rank in range(2)]

    def agent() -> int:
        pids = []
        for rank in range(2):
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", TORCHELASTIC_RUN_ID="test")
            event = During(3, 0, lambda: os.kill(os.getppid(), signal.SIGKILL))
            action = lambda event=event: run(f"--save {folder} --train-iters 5000", event, 2)  # noqa: E731
            pids.append(forked(action, logs[rank]))
        for pid in pids:
            os.waitpid(pid, 0)
        return 0

    os.waitpid(forked(agent, Path(folder) / "agent.log"), 0)
    wait_for((Path(folder) / TRACKER).exists)
    wait_for(lambda: "stopped after iteration" in logs[1].read_text())
    return [log.read_text() for log in logs]


def test_orphans_save_and_end(tmp_path: Path) -> None:
    ((first, last),) = run_distributed_test(orphans, 1, str(tmp_path))
    assert "torchrun is gone: stopped after iteration" in last or "another rank asked to stop" in last
    tracked = int((tmp_path / TRACKER).read_text())
    assert 3 <= tracked < 1000 and f"stopped after iteration {tracked} of 5000" in last
    assert "rror" not in first + last


# Ranks that are lost


def lost_rank(folder: str, how: str) -> None:
    """What rank 0 says; rank 1 is lost in its third iteration."""
    heartbeat.BEAT_S = 0.3  # type: ignore[misc]
    rank = int(os.environ["RANK"])

    def lose() -> None:
        if how == "failed":
            raise ZeroDivisionError("a bug")
        time.sleep(1.0)  # its last heartbeat knows the iteration
        os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)

    log = Path(folder) / f"rank{rank}.log"
    sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115
    timeout = 0.1 if how == "frozen" else 1.0
    stages = "--pipeline-model-parallel-size 2 --micro-batch-size 4" if how != "frozen" else ""
    try:
        status = run(f"--distributed-timeout-minutes {timeout} --save {folder}/s {stages}", During(3, 1, lose), 2)
        assert status == 1
    except ZeroDivisionError:
        assert rank == 1
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (
            "killed",
            "last heard of in iteration 3, training step of pipeline stage 1, is gone; a process that the system kills says "
            "nothing",
        ),
        ("failed", "failed in iteration 3, training step of pipeline stage 1: ZeroDivisionError: a bug"),
        (
            "frozen",
            "last heard of in iteration 3, training step, does not answer any more; it was frozen, and has been killed",
        ),
    ],
)
def test_a_lost_rank_is_named(how: str, said: str, tmp_path: Path) -> None:
    try:
        run_distributed_test(lost_rank, 2, str(tmp_path), how)
        assert how == "failed"
    except DistributedTestError as error:
        assert how != "failed", error  # rank 1 left no report
    text = (tmp_path / "rank0.log").read_text()
    where = "training step of pipeline stage 0" if how != "frozen" else "training step"
    assert f"error: [rank 0] lost contact with another rank in iteration 3, {where}: rank 1 (process " in text
    assert said in text and "Resume from the last checkpoint (" in text and "Traceback" not in text


# Ranks that hang


def hanging(folder: str, how: str) -> tuple[int, str]:
    """Exit status and last words of rank 0, whose third iteration never ends."""
    heartbeat.BEAT_S, watch.PATIENCE_S = 0.2, 1.0  # type: ignore[misc]
    log = Path(folder) / "rank0.log"

    def hang() -> None:
        if how == "told to stop":
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)

    def fail() -> None:
        time.sleep(1.0)
        raise ZeroDivisionError("a bug")

    def rank(number: int) -> int:
        world_size = 1 if how == "told to stop" else 2
        os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(world_size))
        event = During(3, 0, hang) if number == 0 else During(3, 1, fail)
        return run("--distributed-timeout-minutes 0.05" if world_size == 1 else "", event, world_size)

    first = forked(lambda: rank(0), log)
    if how == "beside one that failed":
        forked(lambda: rank(1), Path(folder) / "rank1.log")
    return os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]), log.read_text()


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("told to stop", "received SIGTERM, but for 3 s nothing moved (--distributed-timeout-minutes)"),
        ("beside one that failed", "another rank failed, and this one does not come to an end"),
    ],
)
def test_a_rank_that_hangs_ends_itself(how: str, why: str, tmp_path: Path) -> None:
    ((status, text),) = run_distributed_test(hanging, 1, str(tmp_path), how)
    assert status == 1
    assert "error: [rank 0] hangs in iteration 3, training step at " in text and "test_signals.py, line " in text
    assert why in text


def test_an_iteration_that_takes_longer_than_the_time_out_is_told_where_nccl_would_end_the_process(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from datetime import timedelta

    from megatron_lsh.parallel.context import offline_context

    place = watch.Place(watch.TRAINING, 7)
    stop = StopRequest(TrainingConfig())
    guard = watch.Watch(offline_context(device="cpu"), stop, timedelta(seconds=0.05), place, announce=True)
    guard._hearts.period_s = 0.05
    with guard:
        time.sleep(0.5)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "error: [rank 0] iteration 7, training step takes longer than --distributed-timeout-minutes: "
    )


# A rank that is slow, and not lost


def slow_builder(folder: str) -> tuple[int, str]:
    """Status and log of a rank of two, of which the first builds the index of the data for longer than the time-out."""
    log, first = Path(folder) / f"rank{os.environ['RANK']}.log", os.environ["RANK"] == "0"

    class Slow(GPTSamples):
        def mock(self, stream: int, num_samples: int) -> Dataset:
            if first:
                time.sleep(9.0)
            return super().mock(stream, num_samples)

    def kind(cfg: Config, tokenizer: Tokenizer) -> Slow:
        return Slow(**vars(samples(cfg, tokenizer)))

    cfg = tiny_config("--train-iters 1 --global-batch-size 4 --eval-iters 0 --distributed-timeout-minutes 0.1", 2)
    with open(log, "w", buffering=1) as sys.stderr:
        status = launch(lambda: cfg, lambda cfg: train(cfg, replace(GPT, datasets=text_datasets(kind))))
    return status, log.read_text()


@pytest.mark.slow
def test_the_rank_that_builds_the_index_may_take_longer_than_the_time_out(tmp_path: Path) -> None:
    assert run_distributed_test(slow_builder, 2, str(tmp_path)) == [(0, "")] * 2
