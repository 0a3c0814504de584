"""Which files ``--input`` names: each once, and none that only lies beside the data."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_lsh.config.saved_paths import HUB_PREFIX
from megatron_lsh.errors import DataError

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".parquet": "parquet",
}
# Files of a data set's folder that describe it.
ABOUT_THE_DATA = ("readme", "license", "licence", "notice", "changelog", "citation", "dataset_info", "dataset_dict")


def format_of(path: Path) -> str | None:
    """The format that a file's ending stands for; None if it is not known."""
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    kind = FORMATS.get(suffix.lower())
    return kind if kind == "jsonl" or path.suffix != ".gz" else None


def input_files(word: str, taken: dict[tuple[int, int], Path], notify: Callable[[str], None]) -> Iterator[Path]:
    """The files that a word of ``--input`` names, those of a glob or folder sorted by name.

    Of a folder, hidden files (of editors, notebooks and version control) and those about the data are left out. A file
    that is named twice, or by two names (links), is taken once. `notify` is told of both.

    Args:
        taken: device and inode of the files that were taken before, which is brought up to date.

    Raises:
        DataError: if the word matches nothing, a file cannot be looked at, or one lies beside its own compressed copy.
    """
    for path in _files(word, notify):
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
        first = taken.setdefault((status.st_dev, status.st_ino), path)
        if first is path:
            yield path
        else:
            notify(f"taken once: {first}" + (f", which is also {path}" if path != first else ""))


def _files(word: str, notify: Callable[[str], None]) -> list[Path]:
    path = Path(word)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = []
        for file in sorted(file for file in path.rglob("*") if file.is_file() and format_of(file)):
            if _beside_the_data(file.relative_to(path)):
                notify(f"left out: {file} is hidden, or about the data; name it to take it")
            else:
                found.append(file)
        if not found:
            raise DataError(
                f"--input {word} is a folder without {', '.join(FORMATS)} files: give files of another ending by name"
            )
    else:
        found = sorted(file for match in glob.glob(word, recursive=True) if (file := Path(match)).is_file())
        if not found:
            hint = f"; for a data set of the Hugging Face hub, write {HUB_PREFIX}{word}" if "*" not in word else ""
            raise DataError(f"--input {word} matches no file: check the path{hint}")
    names = set(found)
    twin = next((file for file in found if file.suffix == ".gz" and file.with_suffix("") in names), None)
    if twin is not None:
        raise DataError(f"--input {word} names {twin.with_suffix('')} and its copy {twin.name}: name one of them")
    return found


def _beside_the_data(path: Path) -> bool:
    """Whether a file of a folder, by its path in it, is no part of the data."""
    return any(part.startswith(".") for part in path.parts) or path.name.lower().startswith(ABOUT_THE_DATA)
