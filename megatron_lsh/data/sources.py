"""Documents from files: JSON lines, plain text, Parquet, and Hugging Face ``datasets``."""

from __future__ import annotations

import glob
import gzip
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

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
TEXT_UNITS = ("file", "paragraph", "line")
CHUNK_BYTES, CHUNK_RECORDS = 1 << 18, 512
HUB_PREFIX = "hf:"

Record = dict[str, Any]


@dataclass(frozen=True)
class Chunk:
    """Some consecutive documents, the unit of work of a process.

    Attributes:
        source: where they come from, for messages.
        first: number of the first of them in the source, from 1.
        records: JSON lines, or the values by key.
        size: bytes of input.
        position: how much of the source is read after them, in units of its ``size``.
    """

    source: str
    first: int
    records: Sequence[bytes | Record]
    size: int
    position: int

    def parsed(self) -> Iterator[tuple[int, Record]]:
        """(number, values by key) of each document; blank lines are none.

        Raises:
            DataError: if a line is not a JSON object.
        """
        for number, record in enumerate(self.records, start=self.first):
            if isinstance(record, dict):
                yield number, record
            elif record.strip():
                yield number, parse_json_line(record, f"{self.source}, line {number}")


def parse_json_line(line: bytes | str, where: str) -> Record:
    """The object on a line; `where` names the line in the DataError for anything else."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error}): put one JSON object on each line") from error
    if not isinstance(record, dict):
        raise DataError(f"{where} is a JSON {type(record).__name__}: put one JSON object on each line")
    return record


class Source(Protocol):
    """A file or data set.

    Attributes:
        name: for messages.
        size: of the whole, in any unit; for progress only.
    """

    name: str
    size: int

    def chunks(self) -> Iterator[Chunk]: ...


class JsonLines:
    """One JSON object per line, plain or gzip-compressed. Parsed by the worker processes."""

    def __init__(self, path: Path) -> None:
        self.path, self.name, self.size = path, str(path), path.stat().st_size

    def chunks(self) -> Iterator[Chunk]:
        packed = self.path.suffix == ".gz"
        with open(self.path, "rb") as raw, gzip.open(raw) if packed else nullcontext(raw) as stream:
            lines: list[bytes] = []
            first, size, done = 1, 0, 0
            try:
                for line in stream:
                    lines.append(line)
                    size += len(line)
                    if size >= CHUNK_BYTES or len(lines) >= CHUNK_RECORDS:
                        done += size
                        yield Chunk(self.name, first, lines, size, raw.tell() if packed else done)
                        first, lines, size = first + len(lines), [], 0
            except (EOFError, gzip.BadGzipFile) as error:
                raise DataError(f"{self.name} is damaged ({error}): copy or compress it again") from error
            yield Chunk(self.name, first, lines, size, self.size)


class Text:
    """UTF-8 text; a document is the whole file, a paragraph (up to a blank line) or a line."""

    def __init__(self, path: Path, key: str, unit: str) -> None:
        self.path, self.name, self.size, self.key, self.unit = path, str(path), path.stat().st_size, key, unit

    def chunks(self) -> Iterator[Chunk]:
        try:
            with open(self.path, encoding="utf-8", newline="") as stream:
                yield from self._in_chunks(_text_documents(stream, self.unit))
        except UnicodeDecodeError as error:
            raise DataError(f"{self.name} is not UTF-8 ({error}): convert it, e.g. with iconv") from error

    def _in_chunks(self, texts: Iterable[str]) -> Iterator[Chunk]:
        records: list[Record] = []
        first, size, done = 1, 0, 0
        for text in texts:
            records.append({self.key: text})
            size += len(text.encode())
            if size >= CHUNK_BYTES or len(records) >= CHUNK_RECORDS:
                done += size
                yield Chunk(self.name, first, records, size, done)
                first, records, size = first + len(records), [], 0
        yield Chunk(self.name, first, records, size, self.size)


def _text_documents(stream: IO[str], unit: str) -> Iterator[str]:
    if unit == "file":
        yield stream.read()
        return
    lines: list[str] = []
    for line in stream:
        if unit == "line":
            yield line.rstrip("\r\n")
        elif line.strip():
            lines.append(line)
        elif lines:
            yield "".join(lines)
            lines = []
    if lines:
        yield "".join(lines)


class Parquet:
    """Columns of a Parquet file."""

    def __init__(self, path: Path, keys: Sequence[str]) -> None:
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise DataError(f"{path} needs the package pyarrow, which is not installed: pip install pyarrow") from error
        self.path, self.name, self.keys = path, str(path), list(keys)
        try:
            self._file = pyarrow.parquet.ParquetFile(path)
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(
                f"{path} is not a Parquet file ({error}): copy it again or give its --input-format"
            ) from error
        _require_columns(self.name, self._file.schema_arrow.names, keys)
        self.size = path.stat().st_size

    def chunks(self) -> Iterator[Chunk]:
        first, rows = 1, max(self._file.metadata.num_rows, 1)
        for batch in self._file.iter_batches(batch_size=CHUNK_RECORDS, columns=self.keys):
            records = batch.to_pylist()
            yield Chunk(self.name, first, records, batch.nbytes, self.size * (first - 1 + len(records)) // rows)
            first += len(records)


def require_datasets(what: str) -> Any:
    """The package ``datasets``. Raises DataError, naming `what` needs it, where it is not installed."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{what} needs the package datasets, which is not installed: pip install datasets") from error
    return datasets


def load_split(datasets: Any, name: str, config: str | None, split: str, what: str, advice: str) -> Any:
    """A split of a data set on the hub, or of one that ``save_to_disk`` wrote into the folder `name`.

    Raises:
        DataError: naming `what` cannot be loaded, why, and the `advice`.
    """
    try:
        if any(os.path.isfile(os.path.join(name, file)) for file in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(name)
            return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the package raises its own, requests', and plain ones
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{what} cannot be loaded ({reason}): {advice}") from error


class HubDataset:
    """A data set of the Hugging Face ``datasets`` package: a name on the hub, or a folder."""

    def __init__(self, name: str, config: str | None, split: str, keys: Sequence[str]) -> None:
        self.name, self.keys = f"{HUB_PREFIX}{name}", list(keys)
        what, advice = f"{self.name}, split {split}", "check the name, --hf-config and --hf-split"
        loaded = load_split(require_datasets(self.name), name, config, split, what, advice)
        _require_columns(self.name, loaded.column_names, keys)
        self._dataset = loaded.select_columns(self.keys)
        self.size = len(loaded)  # rows: its bytes are not known without reading it

    def chunks(self) -> Iterator[Chunk]:
        first = 1
        for columns in self._dataset.iter(batch_size=CHUNK_RECORDS):
            count = len(columns[self.keys[0]])
            records = [{key: columns[key][row] for key in self.keys} for row in range(count)]
            size = sum(len(value) for record in records for value in record.values() if value is not None)
            yield Chunk(self.name, first, records, size, first - 1 + count)
            first += count


def _require_columns(name: str, columns: Sequence[str], keys: Sequence[str]) -> None:
    missing = [key for key in keys if key not in columns]
    if missing:
        raise DataError(f"{name} has no column {missing[0]}, only {', '.join(columns)}: choose with --json-keys")


def open_sources(
    inputs: Sequence[str],
    keys: Sequence[str],
    input_format: str = "auto",
    text_unit: str = "file",
    hf_config: str | None = None,
    hf_split: str = "train",
) -> list[Source]:
    """The sources that ``--input`` names: files, globs, folders, or ``hf:NAME``; each pattern's files sorted by name.

    Raises:
        DataError: if one does not exist, is empty of documents, or is of an unknown format.
    """
    sources: list[Source] = []
    for word in inputs:
        if word.startswith(HUB_PREFIX):
            sources.append(HubDataset(word[len(HUB_PREFIX) :], hf_config, hf_split, keys))
            continue
        for path in _files(word):
            kind = _format(path) if input_format == "auto" else input_format
            if kind == "text" and len(keys) != 1:
                raise DataError(
                    f"{path} is plain text and gives one key, but --json-keys names {' '.join(keys)}: give one"
                )
            if kind is None:
                raise DataError(
                    f"{path} has an unknown ending; known are {', '.join(FORMATS)} (.jsonl.gz too): rename it or give "
                    "--input-format"
                )
            if kind == "jsonl":
                sources.append(JsonLines(path))
            elif kind == "parquet":
                sources.append(Parquet(path, keys))
            else:
                sources.append(Text(path, keys[0], text_unit))
    return sources


def _format(path: Path) -> str | None:
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    kind = FORMATS.get(suffix.lower())
    return kind if kind == "jsonl" or path.suffix != ".gz" else None


def _files(word: str) -> list[Path]:
    path = Path(word)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and _format(file))
        if not found:
            raise DataError(
                f"--input {word} is a folder without {', '.join(FORMATS)} files: give files of another ending by name"
            )
        return found
    found = sorted(file for match in glob.glob(word, recursive=True) if (file := Path(match)).is_file())
    if not found:
        hint = f"; for a data set of the Hugging Face hub, write {HUB_PREFIX}{word}" if "*" not in word else ""
        raise DataError(f"--input {word} matches no file: check the path{hint}")
    return found
