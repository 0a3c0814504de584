"""Runs of Swin-MoE on pictures made from a seed: it learns, is judged on each picture once, and resumes to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_lsh.config import validate
from megatron_lsh.errors import ConfigError, DataError
from megatron_lsh.families import SWIN, family_of
from megatron_lsh.families.scores import TopJudge
from megatron_lsh.observing.writers import read_jsonl
from megatron_lsh.training.main import configure
from megatron_lsh.training.train import train
from tests.data.images.pictures import gratings, write_gratings
from tests.data.images.test_sources import write_tree

FLAGS = (
    "--img-h 16 --patch-dim 2 --num-channels 1 --swin-depths 1 2 --hidden-size 16 --num-attention-heads 2 "
    "--swin-window-size 4 --image-mean 0.5 --image-std 0.3 --eval-crop-ratio 1 --crop-scale 1 1 --hflip 0 "
    "--randaugment-ops 0 --random-erasing 0 --drop-path-rate 0.1 --num-experts 4 --moe-aux-loss-coeff 1e-2 "
    "--moe-token-dispatcher-type lsh --moe-router-gate-noise 1 --moe-expert-dropout 0.1 --micro-batch-size 8 "
    "--lr 4e-3 --lr-decay-style constant --clip-grad 3 --log-interval 1 --no-progress --peak-tflops 1 --device cpu "
)


def run(folder: Path, flags: str, world_size: int = 1) -> None:
    cfg, family = configure(SWIN.parse((FLAGS + f"--data-path {folder} " + flags).split()))
    train(cfg, family)


def test_it_learns_and_says_how_often_it_is_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_gratings(tmp_path / "data", train=64, valid=21)
    run(
        tmp_path / "data",
        "--train-iters 60 --global-batch-size 16 --eval-interval 30 --lsh-eval both --mixup 0 --cutmix 0 --num-workers 0 "
        f"--save {tmp_path}/run --metrics-jsonl {tmp_path}/m.jsonl --picture-sheet {tmp_path}/sheet.png",
    )
    out = capsys.readouterr().out
    records = [record for record in read_jsonl(tmp_path / "m.jsonl") if "validation_top1" in record]
    last = records[-1]
    assert last["validation_top1"] > 0.9 and last["validation_top5"] == 1.0 and last["validation_top1_exact"] > 0.8
    assert last["validation_top1"] * 21 == pytest.approx(
        round(last["validation_top1"] * 21)
    )  # of 21 pictures, each once
    assert f"validation top-1: {last['validation_top1']:.1%}, top-5: 100.0%" in out
    trained = [record for record in read_jsonl(tmp_path / "m.jsonl") if "lm_loss" in record]
    speed = 16 * 1000 / trained[-1]["iteration_time_ms"]
    assert trained[-1]["images_per_second"] == pytest.approx(speed)
    assert "validation without compression top-1: " in out and "vocabulary" not in out
    with Image.open(tmp_path / "sheet.png") as sheet:  # 21 pictures in three rows of eight
        assert sheet.width > 8 * 96 and 3 * 96 < sheet.height < 5 * 96 and len(sheet.getcolors(10**6) or ()) > 20
    newest = (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text().strip()
    kept = tmp_path / "run" / f"iter_{int(newest):07d}" / "classes.json"
    assert json.loads(kept.read_text()) == ["0", "1", "2", "3"]


def losses_of(path: Path) -> dict[int, float]:
    return {record["iteration"]: record["lm_loss"] for record in read_jsonl(path) if "lm_loss" in record}


def test_a_run_goes_on_to_the_bit_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    """With everything that is random, and threads that read ahead."""
    write_gratings(tmp_path / "data", train=66, valid=9)
    changes = "--crop-scale 0.3 1 --hflip 0.5 --randaugment-ops 2 --random-erasing 0.25 --num-workers 2 "
    for name, parts in {"whole": ("",), "halves": ("--exit-interval 3", "")}.items():
        place = f"--save {tmp_path}/{name} --load {tmp_path}/{name} --metrics-jsonl {tmp_path}/{name}.jsonl "
        for part in parts:
            run(tmp_path / "data", f"{changes} --train-iters 6 --global-batch-size 16 {place} {part}")
    whole = losses_of(tmp_path / "whole.jsonl")
    assert len(whole) == 6 and losses_of(tmp_path / "halves.jsonl") == whole


def test_an_epoch_is_counted_by_the_pictures(tmp_path: Path) -> None:
    write_gratings(tmp_path, train=50)
    written = SWIN.parse((FLAGS + f"--data-path {tmp_path} --epochs 3 --global-batch-size 16").split())
    cfg, family = SWIN.prepare(SWIN, written, 1)  # type: ignore[misc]
    assert (cfg.training.train_samples, cfg.training.train_iters, cfg.swin.num_classes) == (150, 9, 4)
    assert family_of(cfg) is SWIN and family.files["classes.json"] == b'["0", "1", "2", "3"]\n'
    assert validate(cfg, 1) == cfg
    with pytest.raises(
        ConfigError, match=r"num_classes \(3\) must be at least the number of classes in the data \(4\)"
    ):
        SWIN.prepare(SWIN, SWIN.parse((FLAGS + f"--data-path {tmp_path} --epochs 3 --num-classes 3").split()), 1)  # type: ignore[misc]


def test_new_classes_get_a_new_head_and_old_ones_keep_their_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fine-tuning at another resolution and window, with frozen experts; then an evaluation by the numbers of the run."""
    write_gratings(tmp_path / "old")
    save = f"--save {tmp_path}/a"
    run(tmp_path / "old", f"--train-iters 1 --num-workers 0 --swin-position-bias table {save}")
    write_tree(tmp_path / "new" / "train", ("x", "a", "y"), 4)
    write_tree(tmp_path / "new" / "test", ("y", "x"), 3)
    flags = "--img-h 24 --swin-window-size 6 --num-workers 0 --lr 1e-3 --swin-position-bias table "
    run(
        tmp_path / "new",
        flags
        + f"--train-iters 2 --pretrained-checkpoint {tmp_path}/a --freeze-experts --save {tmp_path}/b --load {tmp_path}/b",
    )
    out = capsys.readouterr().out
    assert "afresh" in out and "head" in out, [
        line for line in out.splitlines() if "head" in line or "checkpoint" in line
    ]
    assert "of another size in the checkpoint, and resized: stages" in out
    assert "6 pictures of 3 classes" in out
    run(tmp_path / "new", flags + f"--skip-train --load {tmp_path}/b --train-iters 1")
    assert "validation top-1: " in capsys.readouterr().out
    write_tree(tmp_path / "as_many", ("x", "b", "y"), 4)
    places = f"--pretrained-checkpoint {tmp_path}/b --save {tmp_path}/c"
    run(tmp_path / "as_many", flags + f"--train-iters 1 {places}")
    assert "so they start afresh: head" in capsys.readouterr().out  # a class of another name, and as many
    run(tmp_path / "new", flags + f"--train-iters 1 {places}".replace("/c", "/d"))
    assert "afresh" not in capsys.readouterr().out  # the same classes
    write_tree(tmp_path / "other", ("x", "z"), 3)
    with pytest.raises(DataError, match=r"has a class \(z\) that is none of the 3 that are learned \(a, x, y\)"):
        run(tmp_path / "other", flags + f"--skip-train --load {tmp_path}/b --train-iters 1")


def test_the_judge_counts_first_and_fifth_places() -> None:
    logits = torch.tensor(
        [[9, 1, 2, 3, 4, 5, 6], [9, 1, 2, 3, 4, 5, 6], [9, 1, 2, 3, 4, 5, 6], [1, 1, 1, 1, 1, 1, 1]]
    ).float()
    labels = torch.tensor([0, 3, 1, -1])
    judge = TopJudge(lambda model, batch: logits)
    figures = judge.figures(judge.count(None, {"label": labels}))
    assert (figures["top1"], figures["top5"]) == (1 / 3, 2 / 3)
    expected = torch.nn.functional.cross_entropy(logits[:3], labels[:3]).item()
    assert figures["loss"] == pytest.approx(expected)
    ties = TopJudge(lambda model, batch: torch.ones(2, 7))
    assert ties.figures(ties.count(None, {"label": torch.tensor([0, 6])}))["top1"] == 0.5
    nothing = judge.figures(torch.zeros(4, dtype=torch.float64))
    assert nothing == {"loss": 0.0, "top1": 0.0, "top5": 0.0}


def test_gratings_are_told_apart_by_direction() -> None:
    images, labels = gratings(8)
    assert images.shape == (8, 16, 16) and np.array_equal(labels, np.arange(8) % 4)
