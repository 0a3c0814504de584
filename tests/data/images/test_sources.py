"""Where pictures are read: each layout, the order of classes and parts, and everything that is wrong with one."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_lsh.data.images.decode import decode, pixels
from megatron_lsh.data.images.idx import read_idx, write_idx
from megatron_lsh.data.images.sources import ImageSets, open_sets
from megatron_lsh.errors import DataError
from tests.data.images.pictures import gratings, write_gratings


def sets_at(place: Path | str, **more: object) -> ImageSets:
    return open_sets({"all": str(place)}, "image", "label", **more)  # type: ignore[arg-type]


def write_tree(folder: Path, classes: tuple[str, ...] = ("cat", "Dog", "10", "9"), per_class: int = 2) -> Path:
    images, _ = gratings(len(classes) * per_class)
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for copy in range(per_class):
            Image.fromarray(images[number * per_class + copy]).save(folder / name / f"{copy}.png")
        (folder / name / "notes.txt").write_text("no picture")
    return folder


def test_idx_files_come_back_and_their_parts_have_names(tmp_path: Path) -> None:
    write_gratings(tmp_path, train=8, valid=4)
    found = sets_at(tmp_path)
    assert found.classes == ["0", "1", "2", "3"] and {name: len(part) for name, part in found.parts.items()} == {
        "train": 8,
        "valid": 4,
    }
    images, labels = gratings(8, seed=1)
    part = found.parts["train"]
    assert part.labels.tolist() == labels.tolist()
    for index in (0, 7):
        shown = pixels(decode(part.pictures.content(index), "x", 1, 10**6))
        assert np.array_equal(shown[0], images[index])
    for name in ("images-idx3", "labels-idx1"):
        (next(tmp_path.glob(f"valid-{name}*"))).rename(
            tmp_path / f"t10k-{name}-ubyte{'.gz' if 'images' in name else ''}"
        )
    moved = sets_at(tmp_path)
    assert len(moved.parts["valid"]) == 4 and "test" not in moved.parts and "validation set" in moved.notices[0]


def test_one_part_is_divided_the_same_way_every_time(tmp_path: Path) -> None:
    write_gratings(tmp_path, train=40)
    for path in tmp_path.glob("valid-*"):
        path.unlink()
    found = sets_at(tmp_path, split="3,1")
    train, valid = (found.parts[name].indices.tolist() for name in ("train", "valid"))
    assert (len(train), len(valid)) == (30, 10) and sorted(train + valid) == list(range(40))
    assert valid == sets_at(tmp_path, split="3,1").parts["valid"].indices.tolist()
    assert valid != list(range(30, 40))
    assert len(sets_at(tmp_path).parts["valid"]) == 4


@pytest.mark.parametrize("split", ["90,10", "50,25,25", "1,1,1", "70,15,15"])
def test_every_picture_falls_to_one_part(split: str, tmp_path: Path) -> None:
    for count in (6, 11, 14, 25, 30):
        folder = tmp_path / str(count)
        write_gratings(folder, train=count)
        for path in folder.glob("valid-*"):
            path.unlink()
        parts = sets_at(folder, split=split).parts
        assert sorted(index for part in parts.values() for index in part.indices.tolist()) == list(range(count))


def test_a_folder_per_class_sorted_by_name(tmp_path: Path) -> None:
    write_tree(tmp_path / "one")
    found = sets_at(tmp_path / "one", split="1,1")
    assert found.classes == ["10", "9", "Dog", "cat"]
    write_tree(tmp_path / "two" / "train")
    write_tree(tmp_path / "two" / "val", ("9", "cat"), 3)
    parts = sets_at(tmp_path / "two").parts
    assert len(parts["train"]) == 8 and parts["valid"].labels.tolist() == [1] * 3 + [3] * 3
    assert parts["train"].pictures.where(0) == str(tmp_path / "two/train/10/0.png")
    again = open_sets(
        {"train": str(tmp_path / "one"), "test": str(tmp_path / "two/val")},
        "image",
        "label",
        classes=["cat", "9", "10", "Dog"],
    )
    assert again.classes == ["cat", "9", "10", "Dog"] and again.parts["test"].labels.tolist() == [1] * 3 + [0] * 3


def test_huggingface_sets_that_were_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    images, labels = gratings(6)
    columns = {"image": [Image.fromarray(image) for image in images], "label": labels.tolist()}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("abcd"))})
    train = datasets.Dataset.from_dict(columns, features=features)
    words = [("x", "y")[label % 2] for label in labels.tolist()]
    test = datasets.Dataset.from_dict({"picture": columns["image"], "word": words})
    datasets.DatasetDict({"train": train, "test": train.select(range(3))}).save_to_disk(tmp_path / "named")
    test.save_to_disk(tmp_path / "plain")
    named = sets_at(f"hf:{tmp_path}/named")
    assert named.classes == list("abcd") and len(named.parts["valid"]) == 3
    shown = pixels(decode(named.parts["train"].pictures.content(2), "x", 1, 10**6))
    assert np.array_equal(shown[0], images[2])
    plain = open_sets({"all": f"hf:{tmp_path}/plain"}, "picture", "word", "1,1")
    assert plain.classes == ["x", "y"]
    with pytest.raises(DataError, match="has no column image, only picture, word: choose with --hf-image-key"):
        sets_at(f"hf:{tmp_path}/plain")
    with pytest.raises(DataError, match="cannot be loaded"):
        sets_at(f"hf:{tmp_path}/nothing")
    for name, labels in (("none", [None, 1, 2, 3, 0, 1]), ("words", [*words[:5], None])):
        column = {"label": labels} if name == "none" else {"label": [str(word) if word else None for word in labels]}
        kinds = features if name == "none" else None
        datasets.Dataset.from_dict({"image": columns["image"], **column}, features=kinds).save_to_disk(tmp_path / name)
        with pytest.raises(DataError, match=rf"has rows without a class \(row {labels.index(None)}\): leave them out"):
            sets_at(f"hf:{tmp_path}/{name}")
    datasets.DatasetDict({"foo": train}).save_to_disk(tmp_path / "foo")
    with pytest.raises(DataError, match="has none of the parts train, valid, test: rename one"):
        open_sets({"all": None, "train": f"hf:{tmp_path}/named", "valid": f"hf:{tmp_path}/foo"}, "image", "label")


def broken_places(folder: Path) -> dict[str, tuple[Path, str]]:
    """name -> (place, what the error says)."""
    found = {}
    write_gratings(folder / "cut", 8, 4)
    images = folder / "cut" / "train-images-idx3-ubyte"
    content = gzip.decompress((folder / "cut" / "train-images-idx3-ubyte.gz").read_bytes())
    (folder / "cut" / "train-images-idx3-ubyte.gz").unlink()
    images.write_bytes(content[:-5])
    found["cut"] = (folder / "cut", r"must hold 8 x 16 x 16 bytes, and holds 2043: it was cut off or damaged")
    write_gratings(folder / "fewer", 8, 4)
    write_idx(folder / "fewer" / "train-labels-idx1-ubyte", np.zeros(7))
    found["fewer"] = (folder / "fewer", r"has 8 pictures and train-labels-idx1-ubyte 7 labels")
    write_gratings(folder / "lonely", 8, 4)
    (folder / "lonely" / "train-labels-idx1-ubyte").unlink()
    found["lonely"] = (folder / "lonely", r"and no train-labels-idx1-ubyte: add it")
    write_tree(folder / "empty")
    (folder / "empty" / "zebra").mkdir()
    found["empty"] = (folder / "empty", r"zebra has no picture")
    (folder / "nothing").mkdir()
    found["nothing"] = (folder / "nothing", r"a folder with pictures for each of at least 2 classes")
    found["absent"] = (folder / "absent", r"must be a folder with pictures, or hf:NAME")
    write_tree(folder / "strange" / "train", ("a", "b"))
    write_tree(folder / "strange" / "val", ("a", "c"))
    found["strange"] = (folder / "strange", r"has a class \(c\) that is none of the 2 that are learned \(a, b\)")
    return found


def test_what_is_wrong_with_a_place_is_said_with_its_name(tmp_path: Path) -> None:
    for place, message in broken_places(tmp_path).values():
        with pytest.raises(DataError, match=message) as error:
            sets_at(place)
        assert str(tmp_path) in str(error.value) and ": " in str(error.value)
    write_tree(tmp_path / "fine" / "train")
    write_tree(tmp_path / "fine" / "val")
    with pytest.raises(DataError, match=r"data.split \(9,1\) must not be given"):
        sets_at(tmp_path / "fine", split="9,1")


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.binary(max_size=40), st.booleans())
def test_any_bytes_are_an_idx_file_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, header: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.idx"
    path.write_bytes(b"\0\0\x08\x01" + content if header else content)
    try:
        values = read_idx(path, (1, 3))
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert values.nbytes == len(content) - 4
