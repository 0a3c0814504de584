"""Whatever happens to the files of a save folder: the right values, or a CheckpointError; nothing that was good is lost."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_lsh.checkpoint import inspect
from megatron_lsh.checkpoint.folders import TRACKER
from megatron_lsh.checkpoint.manifest import MANIFEST, hash_file, read_manifest, write_manifest
from megatron_lsh.checkpoint.metadata import METADATA
from megatron_lsh.checkpoint.saved import CONFIG, STATE
from megatron_lsh.convert.native import NativeSource
from megatron_lsh.errors import CheckpointError, MegatronLSHError
from megatron_lsh.parallel.context import offline_context
from tests.checkpoint.test_hostile import Evil
from tests.checkpoint.toy import Trainer, manager
from tests.fuzzing import SEED, cases, damaged, mutated

CTX = offline_context(device="cpu")
OLD, NEW = "iter_0000001", "iter_0000002"
Damage = Callable[[Path, random.Random], None]


class Saved:
    """A save folder with two checkpoints, and what a run that is resumed from each of them holds."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.expected: dict[int, dict[str, Tensor]] = {}
        run, checkpoints = Trainer(CTX), manager(CTX, root)
        for iteration in (1, 2):
            run.train(iteration)
            checkpoints.save(run.state())
            self.expected[iteration] = {name: value.clone() for name, value in run.values().items()}

    def copy(self, target: Path) -> Path:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.root, target, symlinks=True)
        return target


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("saved") / "save")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def damage_a_file(folder: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    path.write_bytes(damaged(path.read_bytes(), rng))


def move_files(folder: Path, rng: random.Random) -> None:
    one, other = rng.sample(sorted(folder.iterdir()), 2)
    match rng.randrange(6):
        case 0:
            one.unlink()
        case 1:
            content = one.read_bytes()
            one.write_bytes(other.read_bytes())
            other.write_bytes(content)
        case 2:
            one.write_bytes((folder.parent / OLD / one.name).read_bytes())  # of the older checkpoint
        case 3:
            one.unlink()
            one.mkdir()
        case 4:
            one.unlink()
            one.symlink_to(rng.choice(("nowhere", one.name, "/dev/null", f"../{OLD}/{one.name}", other.name)))
        case _:
            one.rename(folder / f"{one.name}.bak")


def sign(folder: Path) -> None:
    """The manifest for what is there now, as whoever means harm would write it."""
    manifest = read_manifest(folder)
    files = tuple(hash_file(folder / entry.name) for entry in manifest.files if (folder / entry.name).is_file())
    write_manifest(folder, replace(manifest, files=files, sha256=""))


def odd_json(folder: Path, rng: random.Random) -> None:
    """Values of other types, under a manifest that vouches for them."""
    name = rng.choice((STATE, STATE, CONFIG))
    value = json.loads((folder / name).read_text())
    for _ in range(rng.choice((1, 1, 3))):
        value = mutated(value, rng)
    (folder / name).write_text(json.dumps(value))
    sign(folder)


def odd_manifest(folder: Path, rng: random.Random) -> None:
    body = mutated(json.loads((folder / MANIFEST).read_text()), rng)
    if isinstance(body, dict):
        body["sha256"] = ""
        text = json.dumps(body, indent=1, sort_keys=True) + "\n"
        body["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")


def signed_damage(folder: Path, rng: random.Random) -> None:
    """Other bytes in a pickle or a shard, and a manifest that vouches for them."""
    path = rng.choice([folder / METADATA, *folder.glob("rng_*"), *folder.glob("*.distcp")])
    content = path.read_bytes()
    executed = folder.parent.parent / "executed"
    path.write_bytes(damaged(content, rng) if rng.random() < 0.8 else pickle.dumps(Evil(executed)))
    sign(folder)


def check(saved: Saved, root: Path, damage: Damage, rng: random.Random) -> str:
    """Resume after the damage; returns how it went, and fails if that is not how it may go."""
    folder = saved.copy(root) / NEW
    older = files_of(root / OLD)
    damage(folder, rng)
    before = files_of(root)
    inspect(root, hashes=True)
    with contextlib.suppress(MegatronLSHError):
        NativeSource(folder)
    trainer = Trainer(CTX, seed=99)
    loading = manager(CTX, root / "elsewhere", load=str(root))
    try:
        result = trainer.resume(loading)
        assert result is not None
        outcome = str(result.iteration)
    except CheckpointError as error:
        assert str(root) in str(error)
        outcome = "refused"
    else:
        said = "\n".join(loading.said)  # type: ignore[attr-defined]
        source = int(result.folder.name[len("iter_") :])
        assert source == 2 or ("falling back to iteration 1" in said and NEW in said)
        if damage not in (odd_json, signed_damage):  # these say that the bytes are right
            assert result.iteration == source
            expected = saved.expected[source]
            assert all(torch.equal(value, expected[name]) for name, value in trainer.values().items())
    shutil.rmtree(root / "elsewhere")
    assert files_of(root) == before and files_of(root / OLD) == older, "loading changes nothing"
    return outcome


KINDS: dict[str, tuple[Damage, int]] = {
    "damaged file": (damage_a_file, 12),
    "moved files": (move_files, 12),
    "odd JSON": (odd_json, 16),
    "odd manifest": (odd_manifest, 12),
    "signed damage": (signed_damage, 12),
}


@pytest.mark.parametrize("kind", KINDS)
def test_fuzz_checkpoints(kind: str, saved: Saved, tmp_path: Path) -> None:
    damage, usual = KINDS[kind]
    outcomes: dict[str, int] = {}
    for number in range(cases(usual)):
        rng = random.Random(f"{kind} {SEED} {number}")
        try:
            outcome = check(saved, tmp_path / "save", damage, rng)
        except BaseException as error:
            error.add_note(f"case {number} of {kind!r}, FUZZ_SEED={SEED}") if hasattr(error, "add_note") else None
            raise
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        assert not (tmp_path / "executed").exists(), f"case {number} was executed"
    print(f"{kind}: {outcomes}")
    assert outcomes.keys() & {"1", "2"}


def test_fuzz_trackers(saved: Saved, tmp_path: Path) -> None:
    """Whatever the tracker holds, one of the two checkpoints is found, and loaded as it was saved."""
    root = saved.copy(tmp_path / "save")
    words = [b"2", b"1", b"release", b" 2\n", b"-1", b"2.0", b"0x2", b"1e0", b"9" * 30, b"", "\uff12".encode(), b"\xff"]
    for number in range(cases(10)):
        rng = random.Random(f"tracker {SEED} {number}")
        text = rng.choice(words)
        (root / TRACKER).write_bytes(text if rng.random() < 0.5 else damaged(text, rng))
        trainer = Trainer(CTX, seed=99)
        result = trainer.resume(manager(CTX, tmp_path / "elsewhere", load=str(root)))
        assert result is not None
        expected = saved.expected[result.iteration]
        assert all(torch.equal(value, expected[name]) for name, value in trainer.values().items())


def test_fuzz_a_save_beside_whatever_is_there(saved: Saved, tmp_path: Path) -> None:
    """A save into a folder with any junk in it succeeds or is refused, and leaves the good checkpoint, and its own, good."""
    names = [TRACKER, f"{TRACKER}.tmp", f"{NEW}.incomplete", f"{NEW}.old", NEW, ".lock", "config.json", "progress.txt"]
    for number in range(cases(8)):
        rng = random.Random(f"junk {SEED} {number}")
        root = saved.copy(tmp_path / "save")
        shutil.rmtree(root / NEW)
        other = tmp_path / "precious"
        other.mkdir(exist_ok=True)
        (other / MANIFEST).write_text("x")
        for name in rng.sample(names, 3):
            path = root / name
            if path.exists():
                path.unlink()
            match rng.randrange(4):
                case 0:
                    path.mkdir()
                    (path / MANIFEST).write_text("x")
                case 1:
                    path.write_bytes(rng.randbytes(20))
                case 2:
                    path.symlink_to(other)
                case _:
                    path.symlink_to("nowhere")
        run = Trainer(CTX)
        run.train(2)
        try:
            manager(CTX, root, save_retain_interval=1).save(run.state())
            assert [info.valid for info in inspect(root, hashes=True) if info.folder.name == NEW] == [True]
        except CheckpointError as error:
            assert str(root) in str(error)
        assert [info.valid for info in inspect(root, hashes=True) if info.folder.name == OLD] == [True]
        assert os.listdir(other) == [MANIFEST]
