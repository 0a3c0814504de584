"""kill -9 of all ranks at random moments: every resume finds a valid checkpoint, and the end is bit-equal."""

from __future__ import annotations

import json
import os
import random
import runpy
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from megatron_lsh.checkpoint import inspect
from megatron_lsh.checkpoint.folders import TRACKER
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.testing import DistributedTestError, run_distributed_test
from tests.checkpoint.toy import Trainer, manager
from tests.data.images.pictures import write_gratings
from tests.parallel.toy import config

ITERATIONS = 16  # of the small trainer
SCRIPTS = Path(__file__).parents[2]
GPT = shlex.split("""
    --mock-data --tokenizer-type NullTokenizer --vocab-size 64 --num-workers 0
    --num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16
    --num-experts 4 --expert-model-parallel-size 2 --moe-token-dispatcher-type lsh --use-distributed-optimizer
    --micro-batch-size 2 --global-batch-size 8 --train-iters 60 --lr 1e-3 --log-interval 5 --eval-interval 30
    --eval-iters 1 --device cpu --no-progress
""")
#: Epochs of 11 iterations and a quarter, and everything that is drawn for a picture.
SWIN = shlex.split("""
    --img-h 16 --patch-dim 2 --num-channels 1 --swin-depths 1 2 --hidden-size 16 --num-attention-heads 2
    --swin-window-size 4 --drop-path-rate 0.1 --num-workers 2 --num-experts 4 --expert-model-parallel-size 2
    --moe-token-dispatcher-type lsh --moe-router-gate-noise 1 --moe-expert-dropout 0.1 --use-distributed-optimizer
    --micro-batch-size 4 --global-batch-size 8 --train-iters 60 --lr 1e-3 --log-interval 5 --eval-interval 30
    --device cpu --no-progress
""")


def kill_all(pids: Path, tracker: Path, seconds: float) -> None:
    """On rank 0: SIGKILL for both ranks, `seconds` after this run has saved its first checkpoint."""
    before = tracker.read_text() if tracker.exists() else None
    (pids / os.environ["RANK"]).write_text(str(os.getpid()))
    if os.environ["RANK"] != "0":
        return

    def kill() -> None:
        while not tracker.exists() or tracker.read_text() == before:
            time.sleep(0.01)
        time.sleep(seconds)
        for rank in (1, 0):
            os.kill(int((pids / str(rank)).read_text()), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()


def check_remains(root: Path) -> list[int]:
    """What has no manifest was being removed; what has one is valid, and that is where the tracker points."""
    found = inspect(root, hashes=True)
    assert all(info.valid or info.manifest is None for info in found), found
    assert not (root / TRACKER).exists() or any(info.tracked and info.valid for info in found), found
    return [info.iteration for info in found if info.valid]


def _toy(root: Path | None, kill_after_s: float | None, async_save: bool) -> tuple[list[float], str]:
    """Train to the end, resuming from `root` and saving after every iteration."""
    ctx = initialize(config(1, 2, True))
    run = Trainer(ctx)
    if root is None:
        return run.train(ITERATIONS)[-1:], run.digest()
    checkpoints = manager(ctx, root, async_save=async_save, save_retain_interval=10)
    run.resume(checkpoints)
    if kill_after_s is not None:
        kill_all(root.parent, root / TRACKER, kill_after_s)
    losses: list[float] = []
    while run.iteration < ITERATIONS:
        losses = run.train(run.iteration + 1)
        checkpoints.save(run.state())
    checkpoints.wait()
    return losses, run.digest()


def test_a_small_trainer_survives_kill_minus_nine(tmp_path: Path) -> None:
    rng = random.Random(0)
    uninterrupted = run_distributed_test(_toy, 2, None, None, False)
    root = tmp_path / "save"
    for attempt in range(3):
        with pytest.raises(DistributedTestError, match="exit code -9"):
            run_distributed_test(_toy, 2, root, rng.uniform(0.0, 0.5), attempt % 2 == 1)
        check_remains(root)
    assert run_distributed_test(_toy, 2, root, None, False) == uninterrupted


def _pretrain(script: str, flags: list[str], pids: Path, tracker: Path, kill_after_s: float | None) -> None:
    """The real entry script, in this process."""
    if kill_after_s is not None:
        kill_all(pids, tracker, kill_after_s)
    sys.argv = [script, *flags]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as exit:
        assert exit.code == 0, exit.code


def records(path: Path, key: str) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line["iteration"], line[key]) for line in lines if key in line]


def tensors(folder: Path) -> dict[str, Tensor]:
    """Everything in a checkpoint, whole."""
    entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    result = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in entries.items()}
    dcp.load(result, checkpoint_id=folder, no_dist=True)
    return result


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("family", ["gpt", "swin"])
def test_pretraining_survives_kill_minus_nine(tmp_path: Path, family: str) -> None:
    """Ten times; of pictures, with threads that read ahead, in the middle of epochs."""
    rng, kills = random.Random(1), 10 if family == "gpt" else 5
    script, model = str(SCRIPTS / f"pretrain_{family}_moe.py"), GPT
    if family == "swin":
        model = [*SWIN, "--data-path", str(write_gratings(tmp_path / "data", train=90, valid=9))]
    whole, save = tmp_path / "whole", tmp_path / "save"
    metrics = [tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"]

    def flags(root: Path, log: Path, *more: str) -> list[str]:
        return ["--save", str(root), "--load", str(root), "--metrics-jsonl", str(log), *model, *more]

    run_distributed_test(_pretrain, 2, script, flags(whole, metrics[0]), tmp_path, tmp_path, None)
    often = flags(save, metrics[1], "--save-interval", "1", "--save-retain-interval", "10")
    resumed_from = []
    for attempt in range(kills):
        asynchronous = ["--async-save"] if attempt % 2 else []
        with pytest.raises(DistributedTestError, match="exit code -9"):
            run_distributed_test(
                _pretrain, 2, script, often + asynchronous, tmp_path, save / TRACKER, rng.uniform(0.0, 0.7)
            )
        resumed_from.append(check_remains(save)[0])
    run_distributed_test(_pretrain, 2, script, often, tmp_path, tmp_path, None)

    print(f"killed {kills} times; newest valid checkpoint after each: {resumed_from}")
    assert resumed_from == sorted(resumed_from) and resumed_from[-1] < 60
    for key in ("lm_loss", "validation_loss"):
        expected = records(metrics[0], key)
        assert expected[-1][0] == 60
        assert set(records(metrics[1], key)) == set(expected), key
    before, after = tensors(whole / "iter_0000060"), tensors(save / "iter_0000060")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
