"""Sets of labelled pictures: IDX files, a folder per class, Hugging Face data sets.

A place (--data-path and its siblings) is one of

    a folder with ``train-images-idx3-ubyte`` and ``train-labels-idx1-ubyte``, and perhaps ``valid-...`` and ``t10k-...``
    (the test part), each perhaps with ``.gz``;
    a folder of folders ``train``, perhaps ``val`` (``valid``, ``validation``) and ``test``, each with a folder per class;
    a folder with a folder per class;
    ``hf:NAME``: a data set of the hub, or ``hf:FOLDER`` that ``datasets`` saved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_lsh.config.data_paths import SPLITS, parse_split
from megatron_lsh.config.saved_paths import HUB_PREFIX
from megatron_lsh.data.images.decode import ENDINGS, pillow
from megatron_lsh.data.images.idx import read_idx
from megatron_lsh.data.preparation.sources import load_split, require_datasets
from megatron_lsh.data.samples.classification import numbers_first, some_names
from megatron_lsh.data.splits import split_documents
from megatron_lsh.errors import DataError, first_line

DEFAULT_SPLIT = "90,10"
"""of pictures that come in one part"""
_NAMES: Mapping[str, tuple[str, ...]] = {
    "train": ("train",),
    "valid": ("valid", "val", "validation"),
    "test": ("test", "t10k"),
}
_ORDER_SEED = 20_210_325  # which pictures --split sets aside does not depend on --seed


class Pictures(Protocol):
    """One part of a set: pictures by number, with the number of the class of each."""

    what: str
    classes: list[str]
    labels: np.ndarray
    """int64 [number of pictures]"""

    def content(self, index: int) -> Any:
        """A file, its bytes or a picture of Pillow's; see `decode`."""
        ...

    def where(self, index: int) -> str:
        """Names a picture in errors."""
        ...


class IdxPictures:
    """A pair of IDX files; classes are the numbers from 0 to the largest label."""

    def __init__(self, folder: Path, part: str) -> None:
        images, labels = (_idx_file(folder, part, kind) for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
        assert images is not None  # the caller found it
        if labels is None:
            raise DataError(f"{folder} has {images.name} and no {part}-labels-idx1-ubyte: add it")
        self.what = str(images)
        self._images = read_idx(images, (3, 4))
        self.labels = read_idx(labels, (1,)).astype(np.int64)
        if len(self._images) != len(self.labels):
            raise DataError(
                f"{images} has {len(self._images)} pictures and {labels.name} {len(self.labels)} labels: they must be of "
                "one set"
            )
        if self._images.ndim == 4 and self._images.shape[3] not in (1, 3):
            raise DataError(f"{images} must have 1 or 3 channels in its last dimension, not {self._images.shape[3]}")
        self.classes = [str(number) for number in range(int(self.labels.max(initial=0)) + 1)]

    def content(self, index: int) -> Any:
        image = self._images[index]
        return pillow().fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)

    def where(self, index: int) -> str:
        return f"{self.what}, picture {index}"


class FolderPictures:
    """A folder per class; classes in the order of their sorted names, pictures of a class too."""

    def __init__(self, folder: Path) -> None:
        self.what = str(folder)
        places = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        if len(places) < 2:
            raise DataError(
                f"{folder} must hold IDX files, or a folder with pictures for each of at least 2 classes: check --data-path"
            )
        self.classes = [place.name for place in places]
        self._files: list[Path] = []
        labels: list[int] = []
        for label, place in enumerate(places):
            files = sorted(path for path in place.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
            if not files:
                raise DataError(f"{place} has no picture ({', '.join(ENDINGS)}): remove the folder, or add some")
            self._files += files
            labels += [label] * len(files)
        self.labels = np.asarray(labels, dtype=np.int64)

    def content(self, index: int) -> Any:
        return self._files[index]

    def where(self, index: int) -> str:
        return str(self._files[index])


class HubPictures:
    """A split of a Hugging Face data set; classes as the data set names them, or sorted."""

    def __init__(self, name: str, split: str, image_key: str, label_key: str) -> None:
        self.what = f"{HUB_PREFIX}{name}, split {split}"
        datasets = require_datasets(self.what)
        loaded = load_split(datasets, name, None, split, self.what, "check the name in --data-path")
        for key, flag in ((image_key, "--hf-image-key"), (label_key, "--hf-label-key")):
            if key not in loaded.column_names:
                raise DataError(
                    f"{self.what} has no column {key}, only {', '.join(loaded.column_names)}: choose with {flag}"
                )
        names = getattr(loaded.features[label_key], "names", None)
        labels = loaded[label_key][:]
        if None in labels:
            raise DataError(f"{self.what} has rows without a class (row {labels.index(None)}): leave them out")
        self.classes = list(names) if names else sorted({str(label) for label in labels}, key=numbers_first)
        if names:
            self.labels = np.asarray(labels, dtype=np.int64)
            if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(names):
                raise DataError(
                    f"{self.what} has rows without a class (label {int(self.labels.min())}): leave them out"
                )
        else:
            number = {name: place for place, name in enumerate(self.classes)}
            self.labels = np.asarray([number[str(label)] for label in labels], dtype=np.int64)
        try:
            loaded = loaded.cast_column(image_key, datasets.Image(decode=False))
        except Exception as error:  # a column that holds no pictures; the package raises about anything
            raise DataError(
                f"{self.what}: column {image_key} holds no pictures ({error}): choose with --hf-image-key"
            ) from error
        self._images, self._key = loaded.select_columns([image_key]), image_key

    def content(self, index: int) -> Any:
        found = self._images[index][self._key]
        if found is None or (found.get("bytes") is None and found.get("path") is None):
            raise DataError(f"{self.where(index)} is empty: leave it out, or give --skip-broken-images")
        return found["bytes"] if found.get("bytes") is not None else Path(found["path"])

    def where(self, index: int) -> str:
        return f"{self.what}, row {index}"


@dataclass(frozen=True)
class Part:
    """Some of the pictures of one part: of a set that --split divides, those that fell to it."""

    pictures: Pictures
    indices: np.ndarray
    """int64, into the pictures"""
    labels: np.ndarray
    """int64, in the order of the run's classes"""

    def __len__(self) -> int:
        return len(self.indices)

    def fingerprint(self) -> str:
        """Of names, order and labels; the pixels are not read for it."""
        facts = hashlib.sha256(self.indices.tobytes() + self.labels.tobytes())
        facts.update(repr((len(self.pictures.labels), self.pictures.classes)).encode())
        for index in self.indices[:: max(len(self.indices) // 64, 1)]:
            facts.update(Path(self.pictures.where(int(index))).name.encode())
        return facts.hexdigest()


@dataclass(frozen=True)
class ImageSets:
    """What a run reads: its classes in the order of their numbers, and its parts by name ("train", "valid", "test")."""

    classes: list[str]
    parts: Mapping[str, Part]
    notices: Sequence[str] = ()


def open_sets(
    places: Mapping[str, str | None],
    image_key: str,
    label_key: str,
    split: str | None = None,
    classes: Sequence[str] | None = None,
    wanted: Sequence[str] = SPLITS,
) -> ImageSets:
    """The sets at --data-path ("all"), --train-data-path ("train") and so on.

    Args:
        places: by "all", or by the part of the run.
        split: --split, for pictures that come in one part.
        classes: the order of the classes that a checkpoint has learned; by default that of the training pictures.
        wanted: parts of the run to look for.

    Raises:
        DataError: a place that holds no pictures, or a class that the training pictures do not have.
    """
    notices: list[str] = []
    found: dict[str, Pictures] = {}
    whole = places.get("all")
    if whole is not None:
        found = _parts_of(whole, image_key, label_key)
        if "valid" not in found and "test" in found:
            found["valid"] = found.pop("test")
            notices.append(f"{found['valid'].what} is the validation set: there is no other")
    for part in SPLITS:
        place = places.get(part)
        if place is not None:
            inside = _parts_of(place, image_key, label_key)
            if not inside:
                raise DataError(f"{place} has none of the parts {', '.join(SPLITS)}: rename one, or give another place")
            found[part] = inside[part] if part in inside else next(iter(inside.values()))
    indices = {part: np.arange(len(pictures.labels)) for part, pictures in found.items()}
    if whole is not None and set(found) == {"train"}:
        found, indices = _divided(found["train"], split or DEFAULT_SPLIT)
    elif split is not None:
        raise DataError(
            f"data.split ({split}) must not be given for {whole}, which has a {', a '.join(found)} part: drop --split"
        )
    reference = found.get("train") or next(iter(found.values()), None)
    if reference is None:
        raise DataError("there are no pictures to read: set --data-path")
    names = list(classes or reference.classes)
    if len(names) < 2:
        raise DataError(f"{reference.what} has one class ({names[0]}), and there must be at least 2: check --data-path")
    parts = {part: _part(found[part], indices[part], names) for part in SPLITS if part in found and part in wanted}
    for part, some in parts.items():
        if not len(some):
            raise DataError(f"the {part} set of {some.pictures.what} is empty: use more pictures, or another --split")
    return ImageSets(names, parts, notices)


def _part(pictures: Pictures, indices: np.ndarray, names: Sequence[str]) -> Part:
    strange = sorted(set(pictures.classes) - set(names), key=numbers_first)
    if strange:
        raise DataError(
            f"{pictures.what} has a class ({strange[0]}) that is none of the {len(names)} that are learned "
            f"({some_names(names)}): remove it, or train with it"
        )
    number = {name: place for place, name in enumerate(names)}
    ours = np.asarray([number[name] for name in pictures.classes], dtype=np.int64)
    return Part(pictures, indices, ours[pictures.labels[indices]])


def _divided(pictures: Pictures, split: str) -> tuple[dict[str, Pictures], dict[str, np.ndarray]]:
    order = np.random.RandomState(_ORDER_SEED).permutation(len(pictures.labels))
    found, indices, shares = {}, {}, parse_split(split)
    for part, share, (start, stop) in zip(SPLITS, shares, split_documents(len(order), shares), strict=True):
        if share:
            found[part], indices[part] = pictures, np.sort(order[start:stop])
    return found, indices


def _parts_of(place: str, image_key: str, label_key: str) -> dict[str, Pictures]:
    """The parts that lie in one place, by the name that they have in a run."""
    if place.startswith(HUB_PREFIX):
        return _hub_parts(place.removeprefix(HUB_PREFIX), image_key, label_key)
    folder = Path(place)
    if not folder.is_dir():
        raise DataError(f"{place} must be a folder with pictures, or hf:NAME: check --data-path")
    idx = {
        part: IdxPictures(folder, name)
        for part, names in _NAMES.items()
        for name in names
        if _idx_file(folder, name, "images-idx3-ubyte") is not None
    }
    if idx:
        return dict(idx)
    below = {
        part: FolderPictures(folder / name)
        for part, names in _NAMES.items()
        for name in names
        if (folder / name).is_dir() and any(path.is_dir() for path in (folder / name).iterdir())
    }
    if "train" in below:
        return dict(below)
    return {"train": FolderPictures(folder)}


def _hub_parts(name: str, image_key: str, label_key: str) -> dict[str, Pictures]:
    what = f"{HUB_PREFIX}{name}"
    datasets = require_datasets(what)
    try:
        if (Path(name) / "dataset_dict.json").is_file():
            there = list(datasets.load_from_disk(name))
        elif (Path(name) / "state.json").is_file():
            there = ["train"]
        else:
            there = datasets.get_dataset_split_names(name)
    except Exception as error:  # the package raises its own, requests', and plain ones
        raise DataError(f"{what} cannot be loaded ({first_line(error)}): check the name in --data-path") from error
    return {
        part: HubPictures(name, split, image_key, label_key)
        for part, names in _NAMES.items()
        for split in names
        if split in there
    }


def _idx_file(folder: Path, part: str, kind: str) -> Path | None:
    names = (f"{part}-{kind}", f"{part}-{kind}.gz", f"{part}-{kind.replace('-idx', '.idx')}")
    return next((folder / name for name in names if (folder / name).is_file()), None)
