"""GPT, BERT and T5 over two nodes of two ranks: train, resume to the bit, probe, evaluate exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_lsh.config import validate
from megatron_lsh.families import BERT, GPT, T5
from megatron_lsh.observing.writers import read_jsonl
from megatron_lsh.parallel.testing import run_distributed_test
from megatron_lsh.training.train import train
from tests.training.helpers import TINY

NODES = (
    "--expert-model-parallel-size 4 --moe-node-size 2 --train-iters 4 --eval-interval 4 --lsh-eval both "
    "--micro-batch-size 1 --global-batch-size 8 --moe-layer-freq ([0]+[1])"
)
WAYS = {
    "node scope": "--moe-token-dispatcher-type lsh --lsh-target-rate 0.3,0.5@2 --lsh-target-energy 0.1 --lsh-least-rate 0.1 "
    "--lsh-probe-interval 1 --lsh-wire-dtype int4x32 --lsh-wire-dtype-backward fp8 "
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "de-duplicated": "--moe-overlap-chunks 2",
}
FAMILIES = {"gpt": GPT, "bert": BERT, "t5": T5}
OF_T5 = (
    "--encoder-num-layers 2 --decoder-num-layers 2 --encoder-seq-length 32 --decoder-seq-length 16 --vocab-extra-ids 10"
)


def on_every_rank(name: str, place: str, flags: str) -> None:
    """Train, from the checkpoint in ``place`` if there is one."""
    family = FAMILIES[name]
    files = f"--save {place}/c --load {place}/c --metrics-jsonl {place}/m.jsonl"
    train(validate(family.parse(f"{TINY} {NODES} {OF_T5 if name == 't5' else ''} {flags} {files}".split()), 4), family)


def go(name: str, place: Path, flags: str) -> list[dict[str, Any]]:
    """What a run of four processes wrote."""
    run_distributed_test(on_every_rank, 4, name, str(place), flags, timeout_s=300.0)
    return read_jsonl(place / "m.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_over_two_nodes(name: str, way: str, tmp_path: Path) -> None:
    flags = WAYS[way]
    whole = go(name, tmp_path / "one", flags)
    go(name, tmp_path / "two", f"{flags} --exit-interval 2")
    parts = go(name, tmp_path / "two", flags)
    steps, again = ([r for r in records if "lm_loss" in r] for records in (whole, parts))
    for key in ("lm_loss", "grad_norm", "alltoall_bytes_network", "lsh_restored_error", "expert_rows_rate"):
        assert [r.get(key) for r in steps] == [r.get(key) for r in again], key
    assert all(0 < r["alltoall_bytes_network"] < r["alltoall_bytes_network_uncompressed"] for r in steps)
    evaluated = [r for r in whole if "validation_loss" in r][-1]
    assert evaluated["validation_loss"] > 0
    if way == "node scope":
        assert all(0 < r["lsh_restored_error"] < 1 and 0.5 < r["expert_rows_rate"] < 1 for r in steps)
        assert 0 < abs(evaluated["validation_loss"] - evaluated["validation_loss_exact"]) < 0.5
