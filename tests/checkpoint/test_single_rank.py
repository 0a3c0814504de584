"""Everything that does not depend on the number of ranks, on one rank without torch.distributed."""

from __future__ import annotations

import random
import re
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lsh.checkpoint import CheckpointManager, inspect
from megatron_lsh.checkpoint.folders import TRACKER
from megatron_lsh.checkpoint.manifest import MANIFEST
from megatron_lsh.errors import CheckpointError
from megatron_lsh.parallel.context import offline_context
from tests.checkpoint.disks import tmpfs
from tests.checkpoint.toy import Trainer, manager, saved_names

CTX = offline_context(device="cpu")


def trainer(**settings: Any) -> Trainer:
    return Trainer(CTX, **settings)


def saved_run(root: Path, *iterations: int, **settings: Any) -> Trainer:
    """A run with checkpoints at `iterations`."""
    run = trainer()
    checkpoints = manager(CTX, root, **settings)
    for iteration in iterations:
        run.train(iteration)
        checkpoints.save(run.state())
    checkpoints.wait()
    return run


def said(checkpoints: CheckpointManager) -> str:
    return "\n".join(checkpoints.said)  # type: ignore[attr-defined]


def test_resume_is_bit_equal(tmp_path: Path) -> None:
    run = saved_run(tmp_path, 3)
    losses = run.train(6)
    resumed = trainer(seed=99)
    result = resumed.resume(manager(CTX, tmp_path))
    assert result is not None and result.iteration == 3 and result.same_layout and result.optimizer_loaded
    assert result.progress == {"iteration": 3, "consumed_samples": 24}
    assert result.extra == {"data_fingerprint": "abc"}
    assert result.config["lsh"] == {"lsh_seed": 3}
    assert result.notices == ()
    assert resumed.train(6) == losses
    assert resumed.digest() == run.digest()


def test_saving_does_not_change_the_run(tmp_path: Path) -> None:
    """Not even before the first step, when the optimizer has no state yet."""
    plain = trainer()
    plain.train(3)
    run = saved_run(tmp_path, 0, 1, 3)
    assert run.digest() == plain.digest()
    resumed = trainer(seed=99)
    result = resumed.resume(manager(CTX, tmp_path, ckpt_step=0))
    assert result is not None and not result.optimizer_loaded
    resumed.train(3)
    assert resumed.digest() == plain.digest()


def test_asynchronous_save_writes_the_state_at_the_call(tmp_path: Path) -> None:
    run = trainer()
    run.train(2)
    background = manager(CTX, tmp_path / "async", async_save=True)
    background.save(run.state())
    run.train(5)  # overwrites every tensor while the thread may still be writing
    background.wait()
    foreground = trainer()
    foreground.train(2)
    manager(CTX, tmp_path / "sync").save(foreground.state())
    loaded = [trainer(seed=98), trainer(seed=99)]
    for one, name in zip(loaded, ("async", "sync"), strict=True):
        one.resume(manager(CTX, tmp_path / name))
    assert loaded[0].digest() == loaded[1].digest() == foreground.digest()


def test_a_failed_asynchronous_save_surfaces_at_the_next_call_once(tmp_path: Path) -> None:
    run = trainer()
    checkpoints = manager(CTX, tmp_path, async_save=True)
    (tmp_path / TRACKER).mkdir()  # a folder where a file should be
    checkpoints.save(run.state())
    with pytest.raises(CheckpointError, match="iteration 0 could not be saved"):
        checkpoints.save(run.state())
    checkpoints.wait()
    (tmp_path / TRACKER).rmdir()
    checkpoints.save(run.state())
    checkpoints.wait()
    assert [info.valid for info in inspect(tmp_path, hashes=True)] == [True]


def test_a_flipped_bit_in_any_file_is_detected_and_the_older_checkpoint_loaded(tmp_path: Path) -> None:
    saved_run(tmp_path, 1, 2)
    rng = random.Random(0)
    files = sorted((tmp_path / "iter_0000002").iterdir())
    assert {path.name for path in files} == {
        ".metadata", "__0_0.distcp", "config.json", MANIFEST, "rng_00000.pt", "state.json",
    }  # fmt: skip
    for path in files:
        original = path.read_bytes()
        for _ in range(4):
            damaged = bytearray(original)
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            checkpoints = manager(CTX, tmp_path)
            result = trainer().resume(checkpoints)
            assert result is not None and result.iteration == 1
            assert path.name in said(checkpoints) and "falling back to iteration 1" in said(checkpoints)
            with pytest.raises(CheckpointError, match=path.name):
                manager(CTX, tmp_path, ckpt_step=2).load(trainer().state())
        path.write_bytes(original)
    result = trainer().resume(manager(CTX, tmp_path))
    assert result is not None and result.iteration == 2


def test_truncated_and_missing_files_are_detected(tmp_path: Path) -> None:
    saved_run(tmp_path, 1, 2)
    for path in sorted((tmp_path / "iter_0000002").iterdir()):
        original = path.read_bytes()
        for content in (original[:-1], original[: len(original) // 2], b"", None):
            path.unlink() if content is None else path.write_bytes(content)
            checkpoints = manager(CTX, tmp_path)
            result = trainer().resume(checkpoints)
            assert result is not None and result.iteration == 1 and path.name in said(checkpoints)
        path.write_bytes(original)


def test_no_valid_checkpoint_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    saved_run(tmp_path, 1)
    (tmp_path / "iter_0000001" / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"no valid checkpoint.*manifest\.json is missing"):
        trainer().resume(manager(CTX, tmp_path))


def test_an_unfinished_first_save_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "iter_0000001.incomplete").mkdir()
    checkpoints = manager(CTX, tmp_path)
    assert trainer().resume(checkpoints) is None
    assert "starting afresh" in said(checkpoints)


@pytest.mark.parametrize(("text", "iteration"), [("2", 2), ("1", 1), ("9", 2), ("x", 2), (None, 2)])
def test_tracker_decides_unless_it_is_damaged(tmp_path: Path, text: str | None, iteration: int) -> None:
    saved_run(tmp_path, 1, 2)
    tracker = tmp_path / TRACKER
    tracker.unlink() if text is None else tracker.write_text(text)
    checkpoints = manager(CTX, tmp_path)
    result = trainer().resume(checkpoints)
    assert result is not None and result.iteration == iteration
    assert ("WARNING" in said(checkpoints)) == (text != "2")


def test_missing_checkpoint(tmp_path: Path) -> None:
    assert manager(CTX, tmp_path / "a", load=None).load(trainer().state()) is None
    for root in (tmp_path / "empty", tmp_path / "absent"):
        assert trainer().resume(manager(CTX, tmp_path / "a", load=str(root))) is None
        with pytest.raises(CheckpointError, match="exit-on-missing-checkpoint"):
            trainer().resume(manager(CTX, tmp_path, load=str(root), exit_on_missing_checkpoint=True))
    saved_run(tmp_path / "run", 1)
    with pytest.raises(CheckpointError, match=r"no checkpoint of this iteration; there are iterations \[1\]"):
        trainer().resume(manager(CTX, tmp_path / "run", ckpt_step=7))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="not a folder"):
        trainer().resume(manager(CTX, tmp_path, load=str(tmp_path / "file")))
    with pytest.raises(CheckpointError, match="it is one checkpoint; give the folder above it"):
        trainer().resume(manager(CTX, tmp_path, load=str(tmp_path / "run/iter_0000001")))


def test_finetune_and_pretrained_take_the_weights_only(tmp_path: Path) -> None:
    run = saved_run(tmp_path / "old", 3)
    old = str(tmp_path / "old")
    for settings in (
        {"load": old, "finetune": True},
        {"load": str(tmp_path / "new"), "pretrained_checkpoint": old},
        {"load": None, "pretrained_checkpoint": old},
    ):
        fresh = trainer(seed=99)
        result = fresh.resume(manager(CTX, tmp_path / "new", **settings))
        assert result is not None and result.weights_only and result.iteration == 0 and result.progress == {}
        assert result.rng is None and not result.optimizer_loaded
        assert fresh.schedule.steps == 0 and not fresh.optimizer.state
        assert all(torch.equal(a, b) for a, b in zip(fresh.model.parameters(), run.model.parameters(), strict=True))
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        trainer().resume(manager(CTX, tmp_path, load=None, pretrained_checkpoint=str(tmp_path / "nothing")))


def test_switches_for_optimizer_and_random_state(tmp_path: Path) -> None:
    saved_run(tmp_path / "all", 3)
    fresh = trainer(seed=99)
    result = fresh.resume(manager(CTX, tmp_path / "all", load_optim=False, load_rng=False))
    assert result is not None and result.iteration == 3 and not fresh.optimizer.state and result.rng is None
    saved_run(tmp_path / "bare", 3, save_optim=False, save_rng=False)
    assert not (tmp_path / "bare/iter_0000003/rng_00000.pt").exists()
    with pytest.raises(CheckpointError, match=r"no optimizer state.*--no-load-optim"):
        trainer().resume(manager(CTX, tmp_path / "bare"))
    with pytest.raises(CheckpointError, match=r"no random states.*--no-load-rng"):
        trainer().resume(manager(CTX, tmp_path / "bare", load_optim=False))
    result = trainer().resume(manager(CTX, tmp_path / "bare", load_optim=False, load_rng=False))
    assert result is not None and result.iteration == 3


def test_another_model_is_refused_with_the_first_difference(tmp_path: Path) -> None:
    saved_run(tmp_path, 1)
    other = trainer(column=20)
    before = other.digest()
    config = {"model": {"num_layers": 2, "hidden_size": 16}}
    with pytest.raises(CheckpointError, match="--hidden-size is 8 in the checkpoint and 16 now") as error:
        other.resume(manager(CTX, tmp_path), config=config)
    assert "column has shape (12,) in the checkpoint and (20,) now" in str(error.value)
    assert other.digest() == before

    missing = trainer()
    missing.model.register_parameter("new", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(CheckpointError, match="new is not in the checkpoint"):
        missing.resume(manager(CTX, tmp_path))
    surplus = trainer()
    del surplus.model.odd
    with pytest.raises(CheckpointError, match="odd is in the checkpoint only"):
        surplus.resume(manager(CTX, tmp_path), optimizer=None)


def test_same_weights_another_function(tmp_path: Path) -> None:
    """--num-attention-heads changes no shape, but a run must not go on with another value. Finetuning may."""
    saved_run(tmp_path, 1)
    config = {"model": {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 4}, "lsh": {"lsh_seed": 3}}
    with pytest.raises(CheckpointError, match="--num-attention-heads is 2 in the checkpoint and 4 now"):
        trainer().resume(manager(CTX, tmp_path), config=config)
    result = trainer().resume(manager(CTX, tmp_path, finetune=True), config=config)
    assert result is not None and "--num-attention-heads" in result.notices[0]


def test_vocabulary_padding_may_differ_but_not_the_vocabulary(tmp_path: Path) -> None:
    run = trainer()
    run.train(2)
    manager(CTX, tmp_path).save(run.state(padded_rows={"column": 10}))
    for size in (11, 16):
        other = trainer(column=size)
        tail = other.model.column.detach()[12:].clone()
        result = other.resume(manager(CTX, tmp_path), padded_rows={"column": 10})
        assert result is not None and "padding rows differ" in result.notices[0]
        common = min(size, 12)
        assert torch.equal(other.model.column[:common], run.model.column[:common])
        assert torch.equal(other.model.column[12:], tail)
        moment = other.optimizer.state[other.model.column]["exp_avg"]
        assert torch.equal(moment[:common], run.optimizer.state[run.model.column]["exp_avg"][:common])
        assert not moment[12:].any()
    with pytest.raises(CheckpointError, match="column has shape"):
        trainer(column=9).resume(manager(CTX, tmp_path), padded_rows={"column": 10})
    with pytest.raises(CheckpointError, match=r"column has 10 meaningful rows \(vocabulary\) .* and 11 now"):
        trainer().resume(manager(CTX, tmp_path), padded_rows={"column": 11})


def test_optimizer_state_follows_names_not_positions(tmp_path: Path) -> None:
    run = saved_run(tmp_path, 2)
    other = trainer(seed=99)
    other.optimizer = torch.optim.AdamW([{"params": list(other.model.parameters())[::-1]}], lr=1.0, fused=True)
    result = other.resume(manager(CTX, tmp_path))
    assert result is not None and not result.notices
    assert other.optimizer.param_groups[0]["lr"] == 1.0  # the settings are its own
    ours, theirs = dict(other.model.named_parameters()), dict(run.model.named_parameters())
    for name in ours:
        assert torch.equal(other.optimizer.state[ours[name]]["exp_avg"], run.optimizer.state[theirs[name]]["exp_avg"])
        assert other.optimizer.state[ours[name]]["step"] == 2


def test_retention_and_progress_file(tmp_path: Path) -> None:
    run = trainer()
    cfg = manager(CTX, tmp_path)._cfg
    cfg.save_retain_interval = 2
    checkpoints = CheckpointManager(cfg, CTX, log_progress=True, notify=lambda text: None)
    for iteration in (1, 2, 3):
        run.train(iteration)
        checkpoints.save(run.state())
    assert [info.iteration for info in inspect(tmp_path)] == [3, 2]
    lines = (tmp_path / "progress.txt").read_text().splitlines()
    assert len(lines) == 3 and "Iteration: 2\tSamples: 16" in lines[1]

    (tmp_path / "progress.txt").unlink()
    (tmp_path / "progress.txt").mkdir()  # cannot be written any more, which is no reason to keep every checkpoint
    said: list[str] = []
    checkpoints = CheckpointManager(cfg, CTX, log_progress=True, notify=said.append)
    for iteration in (4, 5, 6):
        run.train(iteration)
        checkpoints.save(run.state())
    assert [info.iteration for info in inspect(tmp_path)] == [6, 4, 2]
    assert sum("progress.txt could not be written" in text for text in said) == 3


def test_saving_the_same_iteration_again_replaces_it(tmp_path: Path) -> None:
    saved_run(tmp_path, 2)
    other = trainer(seed=99)
    other.train(2)
    manager(CTX, tmp_path).save(other.state())
    assert saved_names(tmp_path) == ["iter_0000002", TRACKER]
    loaded = trainer()
    loaded.resume(manager(CTX, tmp_path))
    assert loaded.digest() == other.digest()


def test_unusable_save_folder_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"--save .*file/save cannot be used: rank 0: NotADirectoryError"):
        manager(CTX, tmp_path / "file" / "save")


def test_state_that_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    run = saved_run(tmp_path, 1)
    checkpoints = manager(CTX, tmp_path)
    with pytest.raises(CheckpointError, match="must consist of numbers"):
        checkpoints.save(run.state(extra={"path": Path("x")}))
    with pytest.raises(CheckpointError, match="could not be collected"):
        checkpoints.save(run.state(rng={"unsafe": Path("x")}))
    assert [info.valid for info in inspect(tmp_path, hashes=True)] == [True]


@pytest.mark.parametrize("async_save", [False, True])
def test_full_disk(tmp_path: Path, async_save: bool) -> None:
    """Disks of many sizes, so that space runs out in every kind of file: shards, metadata, manifest, tracker."""
    saved_run(tmp_path / "measure", 1)
    pages = sum(-(-path.stat().st_size // 4096) for path in (tmp_path / "measure/iter_0000001").iterdir())
    failures = 0
    for spare in (1, pages // 2, pages - 2, pages - 1, pages, pages + 1, pages + 2):
        root = tmp_path / f"disk{spare}"
        with tmpfs(root, 4 * (pages + spare + 3)) as mounted:
            if not mounted:
                pytest.skip("no tmpfs can be mounted here")
            saved_run(root, 1)
            run = trainer()
            run.train(2)
            checkpoints = manager(CTX, root, async_save=async_save)
            try:
                checkpoints.save(run.state())
                checkpoints.wait()
            except CheckpointError as error:
                failures += 1
                assert "No space left on device" in str(error)
                assert "last good checkpoint is still iteration 1" in str(error)
                assert saved_names(root) == ["iter_0000001", TRACKER]
            result = trainer().resume(manager(CTX, tmp_path, load=str(root)))
            assert result is not None and result.iteration in (1, 2)
            assert all(info.valid for info in inspect(root, hashes=True))
    assert failures >= 4


def test_file_size_limit(tmp_path: Path) -> None:
    """As a full disk, where no file system can be mounted."""
    run = saved_run(tmp_path, 1)
    run.train(2)
    checkpoints = manager(CTX, tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"could not be saved.*File too large.*still iteration 1"):
            checkpoints.save(run.state())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved_names(tmp_path) == ["iter_0000001", TRACKER]
    checkpoints.save(run.state())
    assert [info.valid for info in inspect(tmp_path, hashes=True)] == [True, True]


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("how", ["read-only", "deleted", "replaced by a file"])
def test_a_save_folder_that_goes_away(tmp_path: Path, how: str, async_save: bool) -> None:
    """What can be saved is saved; what cannot is one error that names the folder, and nothing that was there is lost."""
    root = tmp_path / "disk"
    with tmpfs(root, 4000) as mounted:
        if not mounted:
            pytest.skip("no tmpfs can be mounted here")
        save = root / "run"
        run = trainer()
        checkpoints = manager(CTX, save, async_save=async_save)
        run.train(1)
        checkpoints.save(run.state())
        checkpoints.wait()
        run.train(2)
        if how == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
        else:
            shutil.rmtree(save)
        if how == "replaced by a file":
            save.write_text("not a folder")
        if how == "deleted":  # whoever moved it away goes on with a new one
            checkpoints.save(run.state())
            checkpoints.wait()
            assert [(info.iteration, info.valid) for info in inspect(save, hashes=True)] == [(2, True)]
            return
        with pytest.raises(CheckpointError, match=re.escape(str(save))):
            checkpoints.save(run.state())
            checkpoints.wait()
        if how == "read-only":
            subprocess.run(["mount", "-o", "remount,rw", str(root)], check=True)
            assert [(info.iteration, info.valid) for info in inspect(save, hashes=True)] == [(1, True)]
        else:
            assert save.read_text() == "not a folder"
