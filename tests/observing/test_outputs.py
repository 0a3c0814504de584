"""Whatever only observes a run (metrics, TensorBoard, its log, its plot) neither ends it nor grows with its length."""

from __future__ import annotations

import gc
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from megatron_lsh.config import Config, LoggingConfig
from megatron_lsh.errors import ConfigError
from megatron_lsh.families import GPT, Losses
from megatron_lsh.observing.plot import plot_losses
from megatron_lsh.observing.reporter import Reporter, RunFigures
from megatron_lsh.observing.state import StepResult, TrainState
from megatron_lsh.observing.writers import AppendedFile, JsonlFile, SteadyStream, read_jsonl
from megatron_lsh.parallel.context import offline_context
from megatron_lsh.parallel.testing import run_distributed_test
from megatron_lsh.training.faults import launch
from megatron_lsh.training.startup import save_config
from megatron_lsh.training.train import train
from tests.checkpoint.disks import tmpfs
from tests.observing.test_metrics import layer
from tests.training.helpers import gpt_with, tiny_config


class During:
    """The loss of the tests, and something that happens to this rank during an iteration (counted from 0)."""

    def __init__(self, iteration: int, action: Any, rank: int = 0) -> None:
        self.iteration, self.action, self.rank, self.count = iteration, action, rank, 0

    def __call__(self, cfg: Config, model: nn.Module, batch: Any) -> Losses:
        if model.training:
            if self.count == self.iteration and int(os.environ.get("RANK", "0")) == self.rank:
                self.action()
            self.count += 1
        return GPT.losses(cfg, model, batch)


def test_a_full_disk_under_the_metrics_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = tmp_path / "disk"
    with tmpfs(disk, 64) as mounted:
        if not mounted:
            pytest.skip("needs root to mount a small disk")
        filler = disk / "filler"

        def fill() -> None:
            with pytest.raises(OSError), open(filler, "wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 64)

        cfg = tiny_config(
            f"--micro-batch-size 8 --metrics-jsonl {disk}/m.jsonl --tensorboard-dir {disk}/tb --save {tmp_path}/s "
            "--eval-interval 3 --tensorboard-queue-size 3"
        )
        first = During(2, fill)
        then = During(6, filler.unlink)  # there is space again

        def loss(cfg: Config, model: nn.Module, batch: Any) -> Losses:
            first(cfg, model, batch)
            return then(cfg, model, batch)

        assert train(cfg, gpt_with(loss)).iteration == 10
        out = capsys.readouterr().out
        assert out.count("WARNING: --metrics-jsonl: ") == out.count("WARNING: --tensorboard-dir: ") == 1
        lines = (disk / "m.jsonl").read_text().splitlines()
        found = {record["iteration"] for record in map(json.loads, lines)}  # every line is whole
        lost = set(range(1, 11)) - found  # the last page of the file took some lines yet
        assert lost and lost <= {3, 4, 5, 6}
        assert (tmp_path / "s" / "iter_0000010").is_dir()

        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        board = EventAccumulator(str(disk / "tb"))
        board.Reload()
        steps = {event.step for event in board.Scalars("lm loss")}
        assert set(range(1, 11)) - steps <= {3, 4, 5, 6} and {1, 8, 9, 10} <= steps


def log_breaks(folder: str) -> int:
    """Rank 0, which tells of checkpoints, loses the reader of its log; rank 1, which reports, fills its disk."""
    cfg = tiny_config(f"--train-iters 6 --global-batch-size 4 --save {folder}/s --save-interval 2", 2)

    def onto(descriptor: int) -> None:
        os.dup2(descriptor, 1)

    def closed() -> int:
        reader, writer = os.pipe()
        os.close(reader)
        return writer

    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - as in a process of its own
    full = During(2, lambda: onto(os.open("/dev/full", os.O_WRONLY)), rank=1)
    gone = During(2, lambda: onto(closed()), rank=0)

    def loss(cfg: Config, model: nn.Module, batch: Any) -> Losses:
        full(cfg, model, batch)
        return gone(cfg, model, batch)

    return launch(lambda: cfg, lambda cfg: train(cfg, gpt_with(loss)))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_log_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    assert run_distributed_test(log_breaks, 2, str(tmp_path)) == [0, 0]
    assert (tmp_path / "s" / "latest_checkpointed_iteration.txt").read_text() == "6"


def test_a_lost_stream_is_told_once() -> None:
    told: list[str] = []
    reader, writer = os.pipe()
    os.close(reader)
    stream = SteadyStream(os.fdopen(writer, "w"), told.append)
    for _ in range(3):
        print("x" * 9000, file=stream, flush=True)  # type: ignore[call-overload]
    assert len(told) == 1 and "Broken pipe" in told[0]
    assert stream.fileno() == writer


def test_a_file_that_is_moved_or_deleted_begins_anew(tmp_path: Path) -> None:
    """As logrotate does it: records go to the name that was given, or nobody finds them."""
    told: list[str] = []
    path = tmp_path / "folder" / "m.jsonl"
    path.parent.mkdir()
    file = AppendedFile(path, "--metrics-jsonl", told.append)
    assert file.append(b"1\n")
    path.rename(tmp_path / "m.jsonl.1")
    assert file.append(b"2\n") and file.append(b"3\n")
    assert ((tmp_path / "m.jsonl.1").read_bytes(), path.read_bytes()) == (b"1\n", b"2\n3\n")
    path.unlink()
    path.parent.rmdir()
    assert [file.append(b"4\n") for _ in range(2)] == [False, False] and len(told) == 1
    path.parent.mkdir()
    assert file.append(b"5\n") and path.read_bytes() == b"5\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_what_was_not_written_is_told_once_and_cut_off(tmp_path: Path) -> None:
    told: list[str] = []
    full = AppendedFile(Path("/dev/full"), "--metrics-jsonl", told.append)
    assert [full.append(b"x") for _ in range(3)] == [False] * 3
    assert len(told) == 1 and "No space left" in told[0]
    full.close()
    assert not full.append(b"x")


@pytest.mark.parametrize(
    "damage",
    [
        '{"iteration": "three"}',
        '{"iteration": null}',
        '{"iteration": [1]}',
        '{"iteration": 2, "lm_loss": "high"}',
        '{"lm_loss": 1.0}',
        "[1, 2]",
        "\x00" * 64,
        "[" * 100_000,
        '{"iteration": ' + "9" * 5000 + "}",
        '{"iteration": 2',
        "\ud800",
        "",
    ],
    ids=lambda text: repr(text[:24]),
)
def test_damaged_lines_stop_neither_a_resume_nor_the_plot(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"iteration": number, "lm_loss": 1.0}) for number in (1, 2, 3, 4)]
    lines.insert(1, damage)
    path.write_bytes("\n".join([*lines, '{"iteration": 5, "lm']).encode("utf-8", "surrogatepass"))
    resumed = JsonlFile(path, 2)
    assert resumed.notice is not None and "cut back to iteration 2: 3 later lines dropped" in resumed.notice
    resumed.write({"iteration": 3, "lm_loss": 2.0})
    numbers = [r["iteration"] for r in read_jsonl(path) if r.get("lm_loss") in (1.0, 2.0) and "iteration" in r]
    assert numbers == [1, 2, 3]
    assert plot_losses(path).exists()


def test_lines_behind_later_ones_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"iteration": number}) + "\n" for number in (1, 5, 2, 6, 3)))
    notice = JsonlFile(path, 3).notice
    assert notice is not None and "2 later lines dropped" in notice
    assert [record["iteration"] for record in read_jsonl(path)] == [1, 2, 3]


def test_a_resume_needs_no_space_to_cut_the_metrics_back(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", 32) as mounted:
        if not mounted:
            pytest.skip("needs root to mount a small disk")
        path = tmp_path / "disk" / "metrics.jsonl"
        with pytest.raises(OSError), open(path, "wb", buffering=0) as file:
            for number in range(10**6):
                file.write(json.dumps({"iteration": number}).encode() + b"\n")
        resumed = JsonlFile(path, 7)
        resumed.write({"iteration": 8, "again": True})
        resumed.close()
        assert [record["iteration"] for record in read_jsonl(path)] == list(range(9))


def test_a_full_disk_keeps_the_settings_that_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tmpfs(tmp_path / "disk", 32) as mounted:
        if not mounted:
            pytest.skip("needs root to mount a small disk")
        folder = tmp_path / "disk" / "run"
        folder.mkdir()
        cfg = tiny_config(f"--save {folder}")
        ctx = offline_context(device="cpu")
        save_config(cfg, ctx)
        before = (folder / "config.json").read_bytes()
        with pytest.raises(OSError), open(folder / "filler", "wb", buffering=0) as file:
            while True:
                file.write(b"x" * 64)
        cfg.training.train_iters = 99
        save_config(cfg, ctx)
        assert (folder / "config.json").read_bytes() == before
        assert "config.json could not be written" in capsys.readouterr().out


def test_a_remote_tensorboard_folder_is_refused() -> None:
    from megatron_lsh.observing.writers import open_tensorboard

    with pytest.raises(ConfigError, match=r"--tensorboard-dir \(s3://bucket/tb\) must be a folder"):
        open_tensorboard(LoggingConfig(tensorboard_dir="s3://bucket/tb"), 0)


def kept(intervals: int) -> int:
    """Number of objects that a reporter holds after so many log intervals and evaluations of a model with 32 MoE layers."""
    ctx = offline_context(device="cpu")
    reporter = Reporter(LoggingConfig(progress=False), ctx, RunFigures(10**6, 8, 256, 1e9, None))
    reporter.writes = False
    for iteration in range(1, intervals + 1):
        layers = [layer(number) for number in range(32)]
        result = StepResult(2.0, 1.0, skipped=False, stop=False)
        reporter.interval(TrainState(iteration=iteration), result, 1e-3, 1, layers, None)
        reporter.evaluation(iteration, "validation", {"as trained": 2.0}, final=False)
    assert reporter.payload.iterations == intervals and reporter.validation[-1][0] == intervals
    seen: set[int] = set()
    waiting: list[Any] = [value for name, value in vars(reporter).items() if name not in ("ctx", "watch", "cfg")]
    while waiting:
        item = waiting.pop()
        if id(item) not in seen and not isinstance(item, type | types.ModuleType | types.FunctionType):
            seen.add(id(item))
            waiting += gc.get_referents(item)
    return len(seen)


def test_memory_does_not_grow_with_the_number_of_log_intervals() -> None:
    assert kept(300) < kept(5) + 10


def test_a_plot_that_cannot_be_drawn_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.png").mkdir()  # where the plot would go
    cfg = tiny_config(f"--train-iters 1 --eval-iters 0 --metrics-jsonl {tmp_path}/m.jsonl")
    assert train(cfg, GPT).iteration == 1
    assert "loss plot: not drawn: " in capsys.readouterr().out
