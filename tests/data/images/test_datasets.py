"""Samples of pictures: each once per epoch, in an order and with changes that numbers decide; broken ones left out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from megatron_lsh.config.images import ImageSettings
from megatron_lsh.data.images.datasets import Reader, TrainingPictures
from megatron_lsh.data.images.sources import Part, open_sets
from megatron_lsh.data.loader import BatchIterator
from megatron_lsh.data.samples.classification import EvaluationOrder
from megatron_lsh.errors import DataError
from tests.data.images.pictures import write_gratings
from tests.data.images.test_augment import PLAIN
from tests.data.images.test_sources import write_tree


def part_of(folder: Path, split: str = "train", **more: object) -> Part:
    return open_sets({"all": str(folder)}, "image", "label", **more).parts[split]  # type: ignore[arg-type]


def reader_of(part: Part, cfg: ImageSettings = PLAIN) -> Reader:
    return Reader(part, cfg, (16, 16), 1)


def test_each_picture_once_per_epoch_in_another_order(tmp_path: Path) -> None:
    part = part_of(write_gratings(tmp_path, train=12))
    data = TrainingPictures(reader_of(part), seed=3, num_samples=24)
    images = [data[index]["image"].tobytes() for index in range(24)]
    assert len(set(images[:12])) == 12 and sorted(images[:12]) == sorted(images[12:]) and images[:12] != images[12:]
    other = TrainingPictures(reader_of(part), seed=4, num_samples=12)
    assert [other[index]["image"].tobytes() for index in range(12)] != images[:12]
    assert other.fingerprint() != data.fingerprint() == TrainingPictures(reader_of(part), 3, 99).fingerprint()


def test_changes_depend_on_seed_picture_and_epoch_alone(tmp_path: Path) -> None:
    part = part_of(write_gratings(tmp_path, train=6))
    cfg = dataclasses.replace(PLAIN, random_shift=3, mixup=0.8)
    first = [TrainingPictures(reader_of(part, cfg), 3, 12)[index] for index in range(12)]
    data = TrainingPictures(reader_of(part, cfg), 3, 12)
    for index in (11, 4, 0, 7):  # whatever was read before
        for name, value in data[index].items():
            assert np.array_equal(value, first[index][name]), name
    shares = [float(sample["mix_share"]) for sample in first]
    assert shares[0::2] == shares[1::2] and len(set(shares)) == 6


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_evaluation_sees_every_picture_once_on_any_number_of_ranks(tmp_path: Path, ranks: int) -> None:
    part = part_of(write_gratings(tmp_path, valid=10), "valid")
    data = EvaluationOrder(reader_of(part), 4 * ranks)
    assert len(data) % (4 * ranks) == 0
    seen: list[bytes] = []
    for rank in range(ranks):
        with BatchIterator(data, consumed_samples=0, micro_batch_size=4, dp_rank=rank, dp_size=ranks) as batches:
            for batch in batches:
                seen += [image.numpy().tobytes() for image in batch["image"][batch["label"] >= 0]]
                assert (batch["image"][batch["label"] < 0] == 0).all()
    assert len(seen) == len(set(seen)) == 10


def test_broken_pictures_are_errors_or_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tree(tmp_path, ("a", "b"), per_class=3)
    (tmp_path / "a" / "1.png").write_bytes(b"no picture")
    part = part_of(tmp_path, split="train")
    part = dataclasses.replace(part, indices=np.arange(6), labels=part.pictures.labels)
    data = TrainingPictures(reader_of(part), 0, 6)
    with pytest.raises(DataError, match=r"a/1.png cannot be read"):
        [data[index] for index in range(6)]
    skipping = Reader(part, dataclasses.replace(PLAIN, skip_broken_images=True), (16, 16), 1)
    data = TrainingPictures(skipping, 0, 12)
    labels = [int(data[index]["label"]) for index in range(12)]
    assert len(labels) == 12 and len(skipping.broken) == 1
    assert [record.message for record in caplog.records if "1 so far" in record.message and "a/1.png" in record.message]
    assert len(caplog.records) == 1
    evaluated = EvaluationOrder(skipping, 4)
    assert sorted(int(evaluated[index]["label"]) for index in range(8)) == [-1, -1, -1, 0, 0, 1, 1, 1]
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="has no picture that can be read"):
        data[0]
