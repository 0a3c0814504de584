"""``--moe-token-dispatcher-type auto`` in whole runs."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest

from megatron_lsh.moe import auto
from megatron_lsh.parallel.testing import run_distributed_test
from megatron_lsh.training.train import train
from megatron_lsh.training.writers import read_jsonl
from tests.training.helpers import tiny_config, tiny_task

FLAGS = (
    "--moe-token-dispatcher-type auto --expert-model-parallel-size 2 --lsh-auto-iters 2 --lsh-warmup-iters 1 "
    "--lsh-start-layer 1 --num-layers 3 --moe-per-layer-logging --eval-iters 0 --save {0}/ckpt --load {0}/ckpt "
    "--metrics-jsonl {0}/m.jsonl"
)


def _runs(folder: str, gain: float, *lengths: int) -> list[str]:
    """Train, resume, ...; what each run printed. `gain` sets how much LSH has to save, so that the outcome is known."""
    auto.MARGIN = gain  # type: ignore[misc] # this process is a test's own
    printed = []
    for length in lengths:
        cfg = tiny_config(FLAGS.format(folder) + f" --train-iters {length}", world_size=2)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            train(cfg, tiny_task(cfg))
        printed.append(out.getvalue())
    return printed


@pytest.mark.parametrize(("gain", "chosen"), [(-1e9, True), (1.0, False)])
def test_measures_decides_together_and_remembers(tmp_path: Path, gain: float, chosen: bool) -> None:
    lengths = (3, 12, 14)  # ends while measuring; measures from the start and decides; goes on as decided
    rank0, rank1 = run_distributed_test(_runs, 2, str(tmp_path), gain, *lengths)
    count = 2 if chosen else 0
    assert "auto dispatcher: LSH" not in rank1[0] and "auto dispatcher: LSH" not in "".join(rank0)
    assert f"> auto dispatcher: LSH in {count} of 2 MoE layers" in rank1[1] and "layer 2: " in rank1[1]
    assert "measured before the checkpoint" not in rank1[1] and "measured before the checkpoint" in rank1[2]
    records: list[dict[str, Any]] = [record for record in read_jsonl(tmp_path / "m.jsonl") if "lm_loss" in record]
    ran_lsh = [[rate is not None for rate in record["lsh_compression_rate_per_layer"]] for record in records]
    assert [layers[0] for layers in ran_lsh] == [False] * 14  # below --lsh-start-layer
    assert [layers[1] for layers in ran_lsh] == [layers[2] for layers in ran_lsh]
    # Warm-up; measuring from 1, and from 3 again after the resume: two settling and two measured pairs, so decided at 11.
    assert [layers[1] for layers in ran_lsh] == [False, False, True, *[False, True] * 4, *[chosen] * 3]
