"""Labelled texts, read from files (jsonl, csv, tsv, Orange's tab) and from Hugging Face data sets."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from megatron_lsh.config.classification import GLUE, ClassificationSettings
from megatron_lsh.data.preparation.sources import load_split, require_datasets
from megatron_lsh.data.preparation.text_lines import FileLines, encodable, parse_json_line, utf8_lines
from megatron_lsh.errors import DataError

GLUE_ON_THE_HUB = "nyu-mll/glue"
_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "tsv", ".tab": "tab"}
_LONGEST_FIELD = 2**31 - 1  # characters; Python's csv stops at 131,072 by default


class Example(NamedTuple):
    """One text, or pair of texts, and its class."""

    texts: tuple[str, ...]
    label: str
    where: str
    """file and line, or data set and row, for messages"""


@dataclass(frozen=True)
class Labelled:
    """The examples of one set, in the order of their source. `names`: all classes in order, where the source says so."""

    what: str
    examples: list[Example]
    names: list[str] | None = None


@dataclass(frozen=True)
class Columns:
    """Where text and class are. None: ``text`` and ``label``, or what an Orange file's third row says."""

    texts: tuple[str, ...] | None
    label: str | None

    @classmethod
    def of(cls, settings: ClassificationSettings) -> Columns:
        texts = tuple(settings.text_keys) if settings.text_keys is not None else None
        if texts is None and settings.task is not None:
            texts = GLUE[settings.task].text_keys
        return cls(texts, settings.label_key)


def read_sets(settings: ClassificationSettings, *, train: bool = True) -> dict[str, Labelled]:
    """The sets ``train``, ``valid`` and ``test`` that the settings name, in this order; absent ones have no entry.

    Args:
        train: whether the training texts are needed. Files of them are read even so if nothing else says which classes
            there are.

    Raises:
        DataError: a file, column, label or package is missing, a text is empty, or a download failed.
    """
    columns = Columns.of(settings)
    files = {"train": settings.train_data, "valid": settings.valid_data, "test": settings.test_data}
    if settings.hf_dataset is None and any(files.values()):
        return {
            name: _read_files(paths, columns, f"--{name}-data")
            for name, paths in files.items()
            if paths and (train or name != "train" or settings.classes is None)
        }
    glue = GLUE[settings.task] if settings.task is not None else None
    valid = settings.hf_valid_split or (glue.validation if glue is not None else "validation")
    splits = {"train": settings.hf_train_split, "valid": valid, "test": settings.hf_test_split}
    name, config = settings.hf_dataset, settings.hf_config
    if name is None:
        name, config = GLUE_ON_THE_HUB, settings.task
    return {
        key: _read_hub(name, config, split, columns)
        for key, split in splits.items()
        if split is not None and (train or key != "train")
    }


def read_file(path: str | Path, columns: Columns) -> Labelled:
    """The examples of one file, by its ending. Raises DataError, see `read_sets`."""
    path = Path(path)
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    kind = _FORMATS.get(plain.suffix.lower())
    if kind is None:
        raise DataError(f"{path} has an unknown ending; known are {', '.join(_FORMATS)}, also with .gz: rename it")
    if not path.is_file():
        raise DataError(f"{path} does not exist, or is not a file: check the path")
    rows = {"jsonl": _json_rows, "csv": _table_rows, "tsv": _table_rows, "tab": _orange_rows}[kind]
    csv.field_size_limit(_LONGEST_FIELD)
    return Labelled(str(path), list(rows(utf8_lines(FileLines(path), str(path)), str(path), columns)))


def _read_files(paths: Sequence[str], columns: Columns, flag: str) -> Labelled:
    examples = [example for path in paths for example in read_file(path, columns).examples]
    if not examples:
        raise DataError(f"{flag} {' '.join(paths)} holds no texts: give other files")
    return Labelled(" ".join(paths), examples)


def _json_rows(lines: Iterator[str], name: str, columns: Columns) -> Iterator[Example]:
    texts, label = columns.texts or ("text",), columns.label or "label"
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        row = parse_json_line(line, where)
        require_columns(where, list(row), [*texts, label])
        yield make_example([row[key] for key in texts], row[label], where)


def _table_rows(lines: Iterator[str], name: str, columns: Columns) -> Iterator[Example]:
    tabs = Path(name.removesuffix(".gz")).suffix.lower() == ".tsv"
    # GLUE's .tsv files hold lone quotation marks.
    reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(lines, strict=True)
    rows = _numbered(reader, name)
    header, _ = next(rows, (None, ""))
    if header is None:
        raise DataError(f"{name} is empty: its first line must name the columns")
    texts, label = columns.texts or ("text",), columns.label or "label"
    require_columns(name, header, [*texts, label])
    yield from _cells(rows, header, texts, label)


def _orange_rows(lines: Iterator[str], name: str, columns: Columns) -> Iterator[Example]:
    """Three rows of header: names, types, roles (https://orange3.readthedocs.io/projects/orange-data-mining-library,
    "Header with attribute type information")."""
    rows = _numbered(csv.reader(lines, delimiter="\t", strict=True), name)
    (header, _), (types, _), (roles, _) = (next(rows, (None, "")) for _ in range(3))
    if header is None or types is None or roles is None:
        raise DataError(
            f"{name} must begin with three rows, the names, types and roles of the columns: see Orange's format"
        )
    label, texts = columns.label, columns.texts
    if label is None:
        label = next((key for key, role in zip(header, roles, strict=False) if "class" in role.split()), None)
    if texts is None:
        strings = (key for key, kind in zip(header, types, strict=False) if kind.lower() in ("string", "s", "text"))
        texts = tuple(islice(strings, 1))
    if label is None or not texts:
        missing, flag = ("class", "--label-key") if label is None else ("string", "--text-keys")
        raise DataError(f"{name} marks no {missing} column among {', '.join(header)}: name it with {flag}")
    require_columns(name, header, [*texts, label])
    yield from _cells(rows, header, texts, label)


def _numbered(reader: Any, name: str) -> Iterator[tuple[list[str], str]]:
    """(cells, place for messages) of each row. Raises DataError for what is no table."""
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{name}, line {reader.line_num} is no row of a table ({error}): correct it") from error
        if row is None:
            return
        yield row, f"{name}, line {reader.line_num}"


def _cells(
    rows: Iterator[tuple[list[str], str]], header: list[str], texts: Sequence[str], label: str
) -> Iterator[Example]:
    wanted = [header.index(key) for key in (*texts, label)]
    for row, where in rows:
        if not row:
            continue
        if len(row) <= max(wanted):
            raise DataError(f"{where} has {len(row)} columns, fewer than the header's {len(header)}: correct the line")
        *cells, name_of_class = (row[column] for column in wanted)
        yield make_example(cells, name_of_class, where)


def _read_hub(name: str, config: str | None, split: str, columns: Columns) -> Labelled:
    what = f"{name}{'/' + config if config else ''}, split {split}"
    advice = (
        "check the name and --hf-config; without a network, save it elsewhere with "
        "load_dataset(...).save_to_disk(FOLDER) and give --hf-dataset FOLDER"
    )
    loaded = load_split(require_datasets(what), name, config, split, what, advice)
    texts, label = columns.texts or ("text",), columns.label or "label"
    require_columns(what, loaded.column_names, [*texts, label])
    names = getattr(loaded.features[label], "names", None)
    examples = []
    for number, row in enumerate(loaded.select_columns([*texts, label]), start=1):
        value = row[label]
        where = f"{what}, row {number}"
        if names is not None and value is not None:
            if not 0 <= value < len(names):  # the hidden labels of GLUE's test sets
                raise DataError(f"{where} has no label ({value}): choose another split")
            value = names[value]
        examples.append(make_example([row[key] for key in texts], value, where))
    if not examples:
        raise DataError(f"{what} holds no texts: choose another split")
    return Labelled(what, examples, [encodable(str(name)).strip() for name in names] if names is not None else None)


def require_columns(where: str, columns: Sequence[str], keys: Sequence[str]) -> None:
    """Raises DataError if one of `keys` is not among `columns`."""
    for key in keys:
        if key not in columns:
            flag = "--label-key" if key == keys[-1] else "--text-keys"
            raise DataError(f"{where} has no column {key}, only {', '.join(columns)}: name it with {flag}")


def make_example(texts: Sequence[Any], label: Any, where: str) -> Example:
    """Check the values of one row. Raises DataError for an empty text, and for a label that is missing or no class."""
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            kind = "empty" if isinstance(text, str) or text is None else f"a {type(text).__name__}, not a string"
            raise DataError(f"{where}: the text is {kind}: correct or remove it")
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if not isinstance(label, str | int) or not str(label).strip():
        raise DataError(
            f"{where}: the label ({label}) must be a name or a whole number: correct it, or see --label-key"
        )
    return Example(tuple(map(encodable, texts)), encodable(str(label).strip()), where)
