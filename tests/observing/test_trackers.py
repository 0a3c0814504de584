"""Writers beside the log: Weights & Biases, those of other packages, and what happens when they fail."""

from __future__ import annotations

import json
import struct
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_lsh.config import LoggingConfig
from megatron_lsh.errors import ConfigError
from megatron_lsh.families import GPT
from megatron_lsh.observing.trackers import refuse_missing_writers
from megatron_lsh.training.train import train
from tests.training.helpers import tiny_config

Points = dict[str, dict[int, float]]
"""name -> iteration -> value"""


def records(path: Path) -> Iterator[bytes]:
    """Records of LevelDB's log format (doc/log_format.md there), which offline runs have behind 7 bytes of their own."""
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        if kind in (1, 4):  # the whole of a record, or its last part
            yield parts
            parts = b""
        at += 7 + length
        if 32768 - at % 32768 < 7:  # no header fits into the rest of the block
            at += 32768 - at % 32768


def points_of_wandb(folder: Path) -> Points:
    """What the files of offline runs hold, read record by record."""
    from wandb.proto import wandb_internal_pb2

    found: Points = defaultdict(dict)
    for path in sorted(folder.rglob("run-*.wandb")):
        for data in records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            for name, text in items.items():
                if not name.startswith("_"):
                    found[name][int(items["_step"])] = json.loads(text)
    return dict(found)


def points_of_tensorboard(folder: Path) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder))
    board.Reload()
    return {name: {event.step: event.value for event in board.Scalars(name)} for name in board.Tags()["scalars"]}


def test_weights_and_biases_shows_what_tensorboard_shows_and_a_resumed_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "SILENT": "true", "DISABLE_GIT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    save = tmp_path / "s"
    flags = f"--save {save} --load {save} --tensorboard-dir {tmp_path}/tb --wandb-project p --wandb-exp-name n"
    train(tiny_config(f"{flags} --train-iters 4 --exit-interval 2 --eval-interval 2"), GPT)
    first = (save / "wandb" / "run-id.txt").read_text()
    assert train(tiny_config(f"{flags} --train-iters 4 --eval-interval 2"), GPT).iteration == 4
    assert (save / "wandb" / "run-id.txt").read_text() == first
    names = {path.name for path in save.rglob("run-*.wandb")}
    assert names == {f"run-{first.strip()}.wandb"}, "both parts are of one run"

    wandb, board = points_of_wandb(save), points_of_tensorboard(tmp_path / "tb")
    assert set(wandb) == set(board) and set(board["lm loss"]) == {1, 2, 3, 4}
    for name, values in board.items():
        assert wandb[name] == pytest.approx(values, rel=1e-6), name


PLUGIN = """
class Fails:
    def __init__(self, facts):
        assert facts.settings["training"]["train_iters"] == 3 and facts.iteration == 0
        self.seen = []

    def points(self, iteration, values, *, flush=False):
        self.seen.append(iteration)
        raise OSError("no network")

    def close(self):
        print("seen", sorted(set(self.seen)))
        raise OSError("no network")

def cannot_open(facts):
    raise PermissionError("a wrong key")
"""


def test_writers_of_other_packages_are_found_by_name_and_a_failing_one_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    info = tmp_path / "failing_writers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: failing-writers\nVersion: 1.0\n")
    points = "fails = failing_writers:Fails\nclosed = failing_writers:cannot_open\nother = nothing:at_all\n"
    (info / "entry_points.txt").write_text(f"[megatron_lsh.writers]\n{points}")
    (tmp_path / "failing_writers.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    cfg = tiny_config("--train-iters 3 --metrics-writers fails closed")
    refuse_missing_writers(cfg.logging)
    assert train(cfg, GPT).iteration == 3
    said = capsys.readouterr().out
    assert said.count("WARNING: --metrics-writers fails failed (OSError: no network): the training goes on") == 1
    assert "WARNING: --metrics-writers closed could not be opened (PermissionError: a wrong key)" in said
    assert "seen [1, 2, 3]" in said


def test_a_writer_that_is_not_installed_is_told_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"--wandb-project \(p\) needs the package wandb: pip install"):
        refuse_missing_writers(LoggingConfig(wandb_project="p"))
    with pytest.raises(ConfigError, match=r"--metrics-writers \(mlflow\) must be among the entry points"):
        refuse_missing_writers(LoggingConfig(metrics_writers=["mlflow"]))


def test_what_has_no_effect_without_a_project_is_named() -> None:
    cfg = tiny_config("--wandb-exp-name run --wandb-entity team")
    assert "no effect without --wandb-project: --wandb-exp-name, --wandb-entity" in cfg.notices
