"""Several ranks: any layout loads into any other, resuming is bit-equal, and one rank's failure is everybody's."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_lsh.checkpoint import inspect
from megatron_lsh.checkpoint.folders import TRACKER
from megatron_lsh.errors import CheckpointError
from megatron_lsh.parallel.context import ParallelContext, offline_context
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.testing import run_distributed_test
from tests.checkpoint.toy import Trainer, manager, saved_names
from tests.parallel.toy import batch, config


def context(tp: int, ep: int, shard: bool) -> ParallelContext:
    return initialize(config(tp, ep, shard))


def on_rank_0(action: Any) -> None:
    """Between two barriers."""
    dist.barrier()
    if dist.get_rank() == 0:
        action()
    dist.barrier()


def _layouts(root: Path) -> dict[str, np.ndarray]:
    run = Trainer(context(2, 2, True))
    run.train(3)
    manager(run.ctx, root / "first").save(run.state())
    values = run.values()
    losses, digest = run.train(6), run.digest()

    resumed = Trainer(context(2, 2, True), seed=99)
    result = resumed.resume(manager(resumed.ctx, root / "first"))
    assert result is not None and result.same_layout and result.rng is not None and result.notices == ()
    with torch.no_grad():  # an evaluation leaves parameters gathered; saving and resuming must not care
        state = torch.get_rng_state()
        resumed.model(*batch(0))
        torch.set_rng_state(state)
    manager(resumed.ctx, root / "evaluated").save(resumed.state())
    assert resumed.train(6) == losses
    assert resumed.digest() == digest
    again = Trainer(context(2, 2, True), seed=99)
    again.resume(manager(again.ctx, root / "evaluated"))
    assert again.train(6) == losses and again.digest() == digest

    for source, tp, ep, shard in (
        ("first", 1, 4, False),
        ("second", 2, 4, False),
        ("second", 1, 2, True),
        ("first", 4, 1, True),
    ):
        other = Trainer(context(tp, ep, shard), seed=99)
        result = other.resume(manager(other.ctx, root / source))
        assert result is not None and not result.same_layout
        assert (result.rng is None) == (tp != {"first": 2, "second": 1}[source])
        for name, value in other.values().items():
            assert torch.equal(value, values[name]), f"{name} differs after loading {source} under tp {tp}, ep {ep}"
        if (tp, ep) == (1, 4):
            manager(other.ctx, root / "second").save(other.state())
            other.train(4)  # and it can go on
    return {name: value.numpy() for name, value in values.items()}


@pytest.mark.slow
def test_any_layout_loads_into_any_other(tmp_path: Path) -> None:
    values = run_distributed_test(_layouts, 4, tmp_path)[0]
    for source in ("first", "second"):
        single = Trainer(offline_context(device="cpu"), seed=99)
        result = single.resume(manager(single.ctx, tmp_path / source))
        assert result is not None and not result.same_layout and result.iteration == 3
        assert (result.rng is None) == (source == "first")  # tensor parallel ranks draw differently
        assert "another layout (world_size=4, tp=" in result.notices[0]
        assert source == "second" or "ranks [0]: these are seeded anew" in result.notices[1]
        loaded = single.values()
        assert loaded.keys() == values.keys()
        for name, value in loaded.items():
            assert np.array_equal(value.numpy(), values[name]), name


def _failures(root: Path) -> list[str]:
    """Returns this rank's error messages, which must be the same on all ranks."""
    messages = []

    def fails(action: Any) -> None:
        try:
            action()
        except CheckpointError as error:
            messages.append(str(error))
        else:
            raise AssertionError("no CheckpointError")

    ctx = context(1, 2, True)
    save = root / "save"
    checkpoints = manager(ctx, save)
    run = Trainer(ctx)
    for iteration in (1, 2):
        run.train(iteration)
        checkpoints.save(run.state())
    digest = run.digest()

    # a save that fails on rank 1 only: no space, and state that cannot be saved
    run.train(3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for asynchronous in (False, True):
        limited = manager(ctx, save, async_save=asynchronous)
        if ctx.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            fails(lambda limited=limited: (limited.save(run.state()), limited.wait()))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    rng = {"unsafe": Path("x")} if ctx.rank == 1 else {}
    fails(lambda: checkpoints.save(run.state(rng=rng)))
    dist.barrier()
    assert saved_names(save) == ["iter_0000001", "iter_0000002", TRACKER]

    # a save folder that cannot be used, and one that is lost in the middle of the run
    on_rank_0(lambda: (root / "file").write_text(""))
    fails(lambda: manager(ctx, root / "file" / "save"))
    lost = manager(ctx, root / "lost")
    on_rank_0(lambda: (shutil.rmtree(root / "lost"), (root / "lost").write_text("")))
    fails(lambda: lost.save(run.state()))

    # a damaged shard: all ranks fall back to the same checkpoint
    shard = save / "iter_0000002" / "__1_0.distcp"
    content = shard.read_bytes()
    on_rank_0(lambda: shard.write_bytes(content[:5000] + bytes([content[5000] ^ 4]) + content[5001:]))
    other = Trainer(ctx, seed=99)
    damaged = manager(ctx, save)
    result = other.resume(damaged)
    assert result is not None and result.iteration == 1
    assert ctx.rank != 0 or any(shard.name in text for text in damaged.said)  # type: ignore[attr-defined]
    fails(lambda: manager(ctx, save, ckpt_step=2).load(other.state()))
    on_rank_0(lambda: shard.write_bytes(content))
    fails(lambda: manager(ctx, save).load(Trainer(ctx, column=20).state()))
    assert Trainer(ctx).resume(manager(ctx, root / "empty")) is None

    # after all that: an asynchronous save beside the training, which communicates at the same time
    background = manager(ctx, root / "background", async_save=True)
    other = Trainer(ctx, seed=99)
    other.resume(damaged)
    background.save(other.state())
    other.train(5)
    background.wait()
    last = Trainer(ctx, seed=98)
    last.resume(background)
    assert last.digest() == digest
    return messages


@pytest.mark.slow
def test_one_rank_fails_and_all_know(tmp_path: Path) -> None:
    messages = run_distributed_test(_failures, 2, tmp_path)
    assert messages[0] == messages[1]
    no_space, no_space_async, unsafe, no_folder, lost, damaged, another = messages[0]
    for text in (no_space, no_space_async):
        assert "rank 1: OSError: [Errno 27] File too large" in text and "still iteration 2" in text
    assert "could not be collected" in unsafe and "rank 1: " in unsafe
    assert "cannot be used: rank 0: NotADirectoryError" in no_folder
    assert "could not be saved" in lost and "rank 0: " in lost
    assert "__1_0.distcp is damaged" in damaged and "there are iterations [1, 2]" in damaged
    assert "column has shape (12,) in the checkpoint and (20,) now" in another
    assert all(info.valid for info in inspect(tmp_path / "save", hashes=True))
