"""Which checkpoints may go once a step was done: never the one that the run stands on, and never because of a fault."""

from __future__ import annotations

from pathlib import Path

import pytest

import megatron_lsh.checkpoint.manager as module
from megatron_lsh.checkpoint import Standing, folders, inspect
from megatron_lsh.errors import CheckpointError
from megatron_lsh.parallel.context import offline_context
from tests.checkpoint.toy import Trainer, manager


def iterations(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("iter_*"))


def test_a_save_that_failed_in_the_background_removes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also not if an earlier attempt had saved that iteration."""
    ctx = offline_context(device="cpu")
    trainer, first = Trainer(ctx), manager(ctx, tmp_path, save_retain_interval=1000)
    for iteration in (10, 20):
        trainer.train(iteration)
        first.save(trainer.state(), Standing.FRESH)
    trainer = Trainer(ctx, seed=9)
    again = manager(ctx, tmp_path, save_retain_interval=1000, async_save=True, ckpt_step=10)
    trainer.resume(again)
    folders.write_tracker(tmp_path, 10)
    trainer.train(11)
    again.worked()
    trainer.train(20)

    def fail(*_: object, **__: object) -> None:
        raise CheckpointError("No space left on device")

    monkeypatch.setattr(module, "write_checkpoint", fail)
    again.save(trainer.state(), Standing.FRESH)
    assert again._thread is not None
    again._thread.join()
    again.worked()
    assert iterations(tmp_path) == ["iter_0000010", "iter_0000020"]
    with pytest.raises(CheckpointError, match="No space left"):
        again.wait()


@pytest.mark.parametrize("retain", [None, 1000])
def test_a_checkpoint_that_was_read_from_its_old_folder_stays(tmp_path: Path, retain: int | None) -> None:
    ctx = offline_context(device="cpu")
    trainer, saving = Trainer(ctx), manager(ctx, tmp_path, save_retain_interval=retain)
    for iteration in (1, 2, 2):  # twice, as after a step back: the first one stands aside
        trainer.train(iteration)
        saving.save(trainer.state(), Standing.FRESH)
    newest = next((tmp_path / "iter_0000002").glob("__0_*"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    before, later = iterations(tmp_path), manager(ctx, tmp_path, save_retain_interval=retain)
    result = Trainer(ctx, seed=9).resume(later)
    assert result is not None and result.folder.name == "iter_0000002.old"
    later.worked()
    assert iterations(tmp_path) == before
    assert any(info.valid and info.iteration == 2 for info in inspect(tmp_path, hashes=True))


def test_a_folder_that_cannot_be_looked_at_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one rank tidies, so an error of it would leave the others waiting."""
    ctx = offline_context(device="cpu")
    trainer, saving = Trainer(ctx), manager(ctx, tmp_path, save_retain_interval=1000)
    trainer.train(1)
    saving.save(trainer.state(), Standing.FRESH)
    whole = Path.iterdir

    def stale(path: Path) -> object:
        if path == tmp_path:
            raise OSError(116, "Stale file handle")
        return whole(path)

    monkeypatch.setattr(Path, "iterdir", stale)
    saving.worked()
    assert any("Stale file handle" in line for line in saving.said)  # type: ignore[attr-defined]
