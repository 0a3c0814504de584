"""``--moe-token-dispatcher-type auto`` in whole runs."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest

from megatron_lsh.families import GPT
from megatron_lsh.moe import schedule
from megatron_lsh.observing.writers import read_jsonl
from megatron_lsh.parallel.testing import run_distributed_test
from megatron_lsh.training.train import train
from tests.training.helpers import tiny_config

FLAGS = (
    "--moe-token-dispatcher-type auto --expert-model-parallel-size 2 --lsh-auto-iters 2 --lsh-warmup-iters 1 "
    "--lsh-start-layer 1 --num-layers 3 --moe-per-layer-logging --eval-iters 0 --save {0}/ckpt --load {0}/ckpt "
    "--metrics-jsonl {0}/m.jsonl"
)


def _run(folder: str, gain: float, length: int) -> str:
    """Train or resume; what was printed. `gain` sets how much LSH has to save, so that the outcome is known."""
    schedule.MARGIN = gain  # this process is the test's own
    cfg = tiny_config(FLAGS.format(folder) + f" --train-iters {length}", world_size=2)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        train(cfg, GPT)
    return out.getvalue()


def _ran_lsh(path: Path) -> list[list[bool]]:
    """Per iteration, whether each layer compressed."""
    records: list[dict[str, Any]] = [record for record in read_jsonl(path) if "lm_loss" in record]
    return [[rate is not None for rate in record["lsh_compression_rate_per_layer"]] for record in records]


@pytest.mark.slow
def test_measures_decides_together_and_remembers(tmp_path: Path) -> None:
    lengths = (3, 12, 14)  # ends while measuring; measures from the start and decides; goes on as decided
    rank0, rank1 = zip(*(run_distributed_test(_run, 2, str(tmp_path), -1e9, n) for n in lengths), strict=True)
    assert "auto dispatcher: LSH" not in rank1[0] and "auto dispatcher: LSH" not in "".join(rank0)
    assert "> auto dispatcher: LSH in 2 of 2 MoE layers" in rank1[1] and "layer 2: lsh (exact " in rank1[1]
    assert "measured before the checkpoint" not in rank1[1] and "measured before the checkpoint" in rank1[2]
    layer0, layer1, layer2 = zip(*_ran_lsh(tmp_path / "m.jsonl"), strict=True)
    assert not any(layer0)  # below --lsh-start-layer
    assert layer1 == layer2
    # Warm-up; measuring from 1, and from 3 again after the resume: two settling and two measured pairs, so decided at 11.
    assert list(layer1) == [False, False, True, *[False, True] * 4, *[True] * 3]


def test_keeps_the_exact_alltoall_where_lsh_gains_too_little(tmp_path: Path) -> None:
    _, printed = run_distributed_test(_run, 2, str(tmp_path), 1.0, 11)
    assert "> auto dispatcher: LSH in 0 of 2 MoE layers" in printed and "layer 1: exact (exact " in printed
    assert [layers[1] for layers in _ran_lsh(tmp_path / "m.jsonl")] == [False, *[False, True] * 4, *[False] * 2]
