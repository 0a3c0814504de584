"""Whatever a checkpoint holds, nothing of it is executed, and nothing outside of its folder is read for it."""

from __future__ import annotations

import json
import os
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lsh.checkpoint import inspect
from megatron_lsh.checkpoint.manifest import FileEntry, hash_file, read_manifest, write_manifest
from megatron_lsh.checkpoint.metadata import METADATA, read_metadata
from megatron_lsh.commands import checkpoint_info
from megatron_lsh.config import parse_args
from megatron_lsh.convert.native import NativeSource, read_config
from megatron_lsh.errors import CheckpointError, ConfigError, DamagedCheckpoint
from megatron_lsh.parallel.context import offline_context
from tests.checkpoint.toy import Trainer, manager

CTX = offline_context(device="cpu")


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


def saved(root: Path) -> Path:
    """Two checkpoints; the folder of the newer one."""
    run = Trainer(CTX)
    checkpoints = manager(CTX, root)
    for iteration in (1, 2):
        run.train(iteration)
        checkpoints.save(run.state())
    return root / "iter_0000002"


def sign(folder: Path, *more: FileEntry) -> None:
    """The manifest for what is in the folder now: its checksum is no secret."""
    manifest = read_manifest(folder)
    files = tuple(hash_file(folder / entry.name) for entry in manifest.files)
    write_manifest(folder, replace(manifest, files=files + more, sha256=""))


def resumed(root: Path) -> str:
    """What is said when the run is resumed; it must be from the older checkpoint."""
    checkpoints = manager(CTX, root)
    result = Trainer(CTX, seed=99).resume(checkpoints)
    assert result is not None and result.iteration == 1
    return "\n".join(checkpoints.said)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", [METADATA, "rng_00000.pt", "__0_0.distcp"])
def test_a_hostile_pickle_in_any_file_is_not_executed(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path / "save")
    placed = tmp_path / "executed"
    size = (folder / name).stat().st_size
    content = pickle.dumps(Evil(placed))
    (folder / name).write_bytes(content.ljust(size, b"\0") if name.startswith("__") else content)
    sign(folder)
    said = resumed(tmp_path / "save")
    assert "falling back to iteration 1" in said and ("tensors cannot be read" in said or name in said)
    checkpoint_info.main([str(folder), "--tensors"])
    with pytest.raises(CheckpointError):
        NativeSource(folder)
    if name == METADATA:
        assert [info.valid for info in inspect(tmp_path / "save")] == [False, True]
        with pytest.raises(DamagedCheckpoint, match=r"asks for posix\.mkdir, which no checkpoint needs"):
            read_metadata(folder)
    assert not placed.exists()


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "a/../../secret", "./state.json", "", ".", "a\\b", "a\0b"]
)
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path)
    (tmp_path / "secret").write_text("x")
    sign(folder, FileEntry(name, 1, "0" * 64))
    assert "must be one inside of the folder" in resumed(tmp_path)


def test_links_that_lead_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "save")
    for name in ("rng_00000.pt", METADATA, "state.json"):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        assert f"{name} is a link that leads out of the checkpoint" in resumed(tmp_path / "save")
        (folder / name).unlink()
        (tmp_path / name).rename(folder / name)
    whole = (tmp_path / "save").rename(tmp_path / "elsewhere")  # a linked folder is another matter: it is whole
    (tmp_path / "save").mkdir()
    for path in whole.iterdir():
        (tmp_path / "save" / path.name).symlink_to(path)
    result = Trainer(CTX, seed=99).resume(manager(CTX, tmp_path / "new", load=str(tmp_path / "save")))
    assert result is not None and result.iteration == 2


def test_files_that_the_metadata_names_must_be_in_the_manifest(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    manifest = read_manifest(folder)
    for name in ("__0_0.distcp", METADATA, "state.json", "config.json"):
        files = tuple(entry for entry in manifest.files if entry.name != name)
        write_manifest(folder, replace(manifest, files=files, sha256=""))
        assert [info.valid for info in inspect(tmp_path, hashes=True)] == [False, True]
        assert f"does not list {name}" in resumed(tmp_path)


def test_a_read_that_fails_gives_way_to_the_checkpoint_before(tmp_path: Path) -> None:
    """Bytes that are as they were written, but are no tensor of this shape."""
    folder = saved(tmp_path)
    metadata = read_metadata(folder)
    place = next(place for index, place in metadata.storage_data.items() if index.fqn == "model.column")
    with open(folder / place.relative_path, "r+b") as stream:
        stream.seek(place.offset)
        stream.write(bytes(place.length))
    sign(folder)
    said = resumed(tmp_path)
    assert "its tensors cannot be read" in said and "falling back to iteration 1" in said
    with pytest.raises(CheckpointError, match="its tensors cannot be read"):
        manager(CTX, tmp_path, ckpt_step=2).load(Trainer(CTX).state())


def test_a_dispatcher_that_only_a_checkpoint_names_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "modules" / "evil_dispatcher.py"
    module.parent.mkdir()
    module.write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(module.parent)
    name = "evil_dispatcher:make"
    run = Trainer(CTX)
    manager(CTX, tmp_path / "save").save(run.state(config={"moe": {"moe_token_dispatcher_type": name}}))
    folder = tmp_path / "save" / "iter_0000000"
    assert read_config(folder).moe.moe_token_dispatcher_type == "alltoall"
    assert read_config(folder, dispatcher=name).moe.moe_token_dispatcher_type == name

    by_a_run = tmp_path / "config.json"
    by_a_run.write_text(
        json.dumps({"version": 1, "derived": [], "config": {"moe": {"moe_token_dispatcher_type": name}}})
    )
    for path in (folder / "config.json", by_a_run):
        with pytest.raises(ConfigError, match="must not be imported because a file says so"):
            parse_args(["--config", str(path)])
        for word in (name, "lsh"):
            cfg = parse_args(["--config", str(path), "--moe-token-dispatcher-type", word])
            assert cfg.moe.moe_token_dispatcher_type == word
    own = tmp_path / "mine.yaml"
    own.write_text(f"moe_token_dispatcher_type: {name}\n")
    assert parse_args(["--config", str(own)]).moe.moe_token_dispatcher_type == name
    assert "evil_dispatcher" not in sys.modules


def test_torch_makes_of_the_checked_metadata_what_it_makes_of_its_own(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    ours = read_metadata(folder)
    with open(folder / METADATA, "rb") as stream:
        theirs = pickle.load(stream)
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    places = {index: (place.relative_path, place.offset, place.length) for index, place in theirs.storage_data.items()}
    assert places == {i: (place.relative_path, place.offset, place.length) for i, place in ours.storage_data.items()}
    assert all(isinstance(tensor.size, torch.Size) for tensor in ours.state_dict_metadata.values())
