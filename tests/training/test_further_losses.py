"""Losses beside the lm loss: minimized, and in the log line, JSON lines and TensorBoard under their own names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from megatron_lsh.config import BertConfig, validate
from megatron_lsh.families import BERT, Batch, Family, Losses
from megatron_lsh.observing.writers import read_jsonl
from megatron_lsh.training.train import train
from tests.training.helpers import TINY


def run(flags: str, family: Family = BERT) -> None:
    train(validate(BERT.parse([*TINY.split(), *flags.split()]), 1), family)


def test_sentence_order_loss_of_bert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics, board_folder = tmp_path / "m.jsonl", tmp_path / "tb"
    flags = f"--train-iters 6 --log-interval 3 --metrics-jsonl {metrics} --save {tmp_path}/ckpt"
    run(f"{flags} --tensorboard-dir {board_folder}")
    out = capsys.readouterr().out
    first, second = [record for record in read_jsonl(metrics) if "lm_loss" in record]
    assert f"| lm loss: {first['lm_loss']:.6E} | sop loss: {first['sop_loss']:.6E} | load_balancing_loss" in out
    assert first["sop_loss"] != second["sop_loss"] and 0.3 < first["sop_loss"] < 1.5  # ln 2 for a coin

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(board_folder))
    board.Reload()
    points = [event.value for event in board.Scalars("sop loss")]
    assert len(points) == 6 and sum(points[:3]) / 3 == pytest.approx(first["sop_loss"])

    # Stopped in the middle of an interval and resumed, the interval's mean is the same.
    parts = f"{flags} --save {tmp_path}/parts --metrics-jsonl {tmp_path}/p.jsonl"
    run(f"{parts} --exit-interval 4")
    run(f"{parts} --load {tmp_path}/parts")
    assert [r["sop_loss"] for r in read_jsonl(tmp_path / "p.jsonl") if "lm_loss" in r] == [
        first["sop_loss"],
        second["sop_loss"],
    ]


def test_it_is_minimized(tmp_path: Path) -> None:
    def added_by_hand(cfg: BertConfig, model: nn.Module, batch: Batch) -> Losses:
        losses = BERT.losses(cfg, model, batch)
        aux_loss = losses.auxiliary.value + losses.further["sop loss"].value
        return Losses(losses.main, replace(losses.auxiliary, value=aux_loss))

    found = []
    for name, losses in (("named", BERT.losses), ("by-hand", added_by_hand)):
        run(f"--train-iters 3 --metrics-jsonl {tmp_path}/{name}.jsonl", replace(BERT, losses=losses))
        found.append([r["grad_norm"] for r in read_jsonl(tmp_path / f"{name}.jsonl") if "lm_loss" in r])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_roberta_has_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(f"--train-iters 1 --bert-no-binary-head --metrics-jsonl {tmp_path}/m.jsonl")
    assert "sop" not in capsys.readouterr().out
    assert "sop_loss" not in read_jsonl(tmp_path / "m.jsonl")[0]
