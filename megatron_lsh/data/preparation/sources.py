"""Documents from files: JSON lines, plain text, Parquet, and Hugging Face ``datasets``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_lsh.config.saved_paths import HUB_PREFIX
from megatron_lsh.data.preparation.input_files import FORMATS, format_of, input_files
from megatron_lsh.data.preparation.text_lines import FileLines, parse_json_line, utf8_lines
from megatron_lsh.errors import DataError, first_line

TEXT_UNITS = ("file", "paragraph", "line")
CHUNK_BYTES, CHUNK_RECORDS = 1 << 18, 512

Record = dict[str, Any]


@dataclass(frozen=True)
class Chunk:
    """Some consecutive documents, the unit of work of a process.

    Attributes:
        source: where they come from, for messages.
        unit: what a document is there: a line, row or document.
        first: number of the first of them in the source, from 1.
        records: JSON lines, or the values by key.
        size: bytes of input.
        position: how much of the source is read after them, in units of its ``size``.
    """

    source: str
    unit: str
    first: int
    records: Sequence[bytes | Record]
    size: int
    position: int

    def parsed(self) -> Iterator[tuple[str, Record]]:
        """(place for messages, values by key) of each document; blank lines are none.

        Raises:
            DataError: if a line is not a JSON object.
        """
        for number, record in enumerate(self.records, start=self.first):
            where = f"{self.source}, {self.unit} {number}"
            if isinstance(record, dict):
                yield where, record
            elif record.strip():
                yield where, parse_json_line(record, where)


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
        lines, batch, first, size = FileLines(self.path), list[bytes](), 1, 0
        for line in lines:
            batch.append(line)
            size += len(line)
            if size >= CHUNK_BYTES or len(batch) >= CHUNK_RECORDS:
                yield Chunk(self.name, "line", first, batch, size, lines.position)
                first, batch, size = first + len(batch), [], 0
        yield Chunk(self.name, "line", first, batch, size, self.size)


class Text:
    """UTF-8 text; a document is the whole file, a paragraph (up to a blank line) or a line."""

    def __init__(self, path: Path, key: str, unit: str) -> None:
        self.path, self.name, self.size, self.key, self.unit = path, str(path), path.stat().st_size, key, unit

    def chunks(self) -> Iterator[Chunk]:
        unit = "document" if self.unit == "file" else self.unit
        records: list[Record] = []
        first, size, done = 1, 0, 0
        for text in _text_documents(utf8_lines(FileLines(self.path), self.name), self.unit):
            records.append({self.key: text})
            size += len(text.encode())
            if size >= CHUNK_BYTES or len(records) >= CHUNK_RECORDS:
                done += size
                yield Chunk(self.name, unit, first, records, size, done)
                first, records, size = first + len(records), [], 0
        yield Chunk(self.name, unit, first, records, size, self.size)


def _text_documents(lines: Iterator[str], unit: str) -> Iterator[str]:
    if unit == "file":
        yield "".join(lines)
        return
    paragraph: list[str] = []
    for line in lines:
        if unit == "line":
            yield line.rstrip("\r\n")
        elif line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph)
            paragraph = []
    if paragraph:
        yield "".join(paragraph)


class Parquet:
    """Columns of a Parquet file."""

    def __init__(self, path: Path, keys: Sequence[str]) -> None:
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise DataError(f"{path} needs the package pyarrow, which is not installed: pip install pyarrow") from error
        self.path, self.name, self.keys = path, str(path), list(keys)
        try:
            self._file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
            names = self._file.schema_arrow.names
        except Exception as error:  # of a damaged file the package raises about anything
            raise DataError(
                f"{path} is not a Parquet file ({first_line(error)}): copy it again or give its --input-format"
            ) from error
        _require_columns(self.name, names, keys)
        self.size = path.stat().st_size

    def chunks(self) -> Iterator[Chunk]:
        first, rows = 1, self._file.metadata.num_rows
        for records, size in _until_damage(self._batches(), self.name):
            yield Chunk(self.name, "row", first, records, size, self.size * (first - 1 + len(records)) // max(rows, 1))
            first += len(records)
        if first - 1 != rows:  # pages with a damaged header are passed over without a word
            raise DataError(f"{self.name} has {first - 1} rows that can be read, not {rows}: copy it again")

    def _batches(self) -> Iterator[tuple[list[Record], int]]:
        for batch in self._file.iter_batches(batch_size=CHUNK_RECORDS, columns=self.keys):
            yield batch.to_pylist(), batch.nbytes


def _until_damage(batches: Iterator[tuple[list[Record], int]], name: str) -> Iterator[tuple[list[Record], int]]:
    """The batches; whatever goes wrong in reading them is a DataError that names the last row that was read."""
    row = 0
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:
            raise DataError(f"{name} cannot be read after row {row} ({first_line(error)}): copy it again") from error
        if batch is None:
            return
        row += len(batch[0])
        yield batch


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
        raise DataError(f"{what} cannot be loaded ({first_line(error)}): {advice}") from error


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
        for records, size in _until_damage(self._batches(), self.name):
            yield Chunk(self.name, "row", first, records, size, first - 1 + len(records))
            first += len(records)

    def _batches(self) -> Iterator[tuple[list[Record], int]]:
        for columns in self._dataset.iter(batch_size=CHUNK_RECORDS):
            rows = range(len(columns[self.keys[0]]))
            records = [{key: columns[key][row] for key in self.keys} for row in rows]
            yield records, sum(len(v) for record in records for v in record.values() if isinstance(v, str))


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
    notify: Callable[[str], None] = print,
) -> list[Source]:
    """The sources that ``--input`` names: files, globs, folders (see `input_files`), or ``hf:NAME``.

    Raises:
        DataError: if one does not exist, is empty of documents, or is of an unknown format.
    """
    sources: list[Source] = []
    taken: dict[tuple[int, int], Path] = {}
    for word in inputs:
        if word.startswith(HUB_PREFIX):
            sources.append(HubDataset(word.removeprefix(HUB_PREFIX), hf_config, hf_split, keys))
            continue
        for path in input_files(word, taken, notify):
            kind = format_of(path) if input_format == "auto" else input_format
            sources.append(_open_file(path, kind, keys, text_unit))
    return sources


def _open_file(path: Path, kind: str | None, keys: Sequence[str], text_unit: str) -> Source:
    if kind == "text" and len(keys) != 1:
        raise DataError(f"{path} is plain text and gives one key, but --json-keys names {' '.join(keys)}: give one")
    if kind is None:
        raise DataError(
            f"{path} has an unknown ending; known are {', '.join(FORMATS)} (.jsonl.gz too): rename it or give "
            "--input-format"
        )
    if kind == "jsonl":
        return JsonLines(path)
    return Parquet(path, keys) if kind == "parquet" else Text(path, keys[0], text_unit)
