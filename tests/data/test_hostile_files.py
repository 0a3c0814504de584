"""Files of any content, given to every reader of data: the right value, or a DataError that names file and place."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_lsh.data.indexed import IndexedDataset
from megatron_lsh.data.preparation.encoder import Encoder
from megatron_lsh.data.preparation.sentences import SentenceSplitter
from megatron_lsh.data.preparation.sources import open_sources
from megatron_lsh.data.samples.labelled_texts import Columns, read_file
from megatron_lsh.data.tokenizers import ByteTokenizer, SentencePieceTokenizer
from megatron_lsh.data.tokenizers.gpt2 import GPT2BPETokenizer
from megatron_lsh.data.tokenizers.huggingface import HuggingFaceTokenizer
from megatron_lsh.data.tokenizers.wordpiece import BertWordPieceTokenizer
from megatron_lsh.data.vocabulary import read_description, write_description
from megatron_lsh.errors import DataError
from tests.data.helpers import numbered, write_dataset

fuzz = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])

DEEP = b"[" * 3000
LINES = st.lists(
    st.sampled_from(
        [
            *(
                b'{"text": %s}' % v
                for v in (b'"a"', b'["b", "c"]', b"null", b'"\\ud800x"', b"5", b'"a\r"', b'"\xff"', b'"\x00"')
            ),
            *(b'{"text": "\xc3\xa9"}', b'{"text": {"text": 1}}', b"{}", DEEP, b'{"text": ' + DEEP, b"9" * 5000, b"NaN"),
            *(b"null", b"", b"  ", b"\r", b"\xef\xbb\xbf", b"1e999"),
        ]
    ),
    max_size=6,
).map(b"\n".join)
FLIPS = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=3)


def flipped(content: bytes, flips: list[tuple[int, int]]) -> bytes:
    """Some bytes replaced."""
    damaged = bytearray(content)
    for place, value in flips:
        damaged[place % len(damaged)] = value
    return bytes(damaged)


def texts_of(
    path: Path, key: str = "text", unit: str = "file", splitter: SentenceSplitter | None = None
) -> list[bytes]:
    """What preprocessing makes of a file, documents joined from their sequences."""
    encoder, documents = Encoder(ByteTokenizer(), [key], append_eod=False, splitter=splitter), []
    for source in open_sources([str(path)], [key], text_unit=unit):
        for chunk in source.chunks():
            column = encoder.encode(chunk).columns[key]
            ends = np.cumsum([0, *column.lengths])[np.cumsum([0, *column.sequences])]
            documents += [bytes(column.tokens[a:b].tolist()) for a, b in pairwise(ends)]
    return documents


def outcome(read: Callable[[], Any], path: Path, place: str = "") -> Any:
    """What is read; None for a DataError, which must name the file and match `place`."""
    try:
        return read()
    except DataError as error:
        assert re.search(re.escape(str(path)) + place, str(error)), error
        return None


@fuzz
@given(LINES | st.binary(max_size=50))
def test_json_lines(tmp_path: Path, content: bytes) -> None:
    (path := tmp_path / "in.jsonl").write_bytes(content)
    found = outcome(lambda: texts_of(path), path, ", line [1-9]")
    if found is not None:
        expected = []
        for line in content.split(b"\n"):
            value = json.loads(line)["text"] if line.strip() else None
            joined = "".join(value if isinstance(value, list) else [value or ""])
            expected += [joined.encode(errors="replace")] if joined else []
        assert found == expected


@fuzz
@given(st.binary(max_size=40) | st.text(max_size=30).map(str.encode), st.sampled_from(["file", "line", "paragraph"]))
def test_texts(tmp_path: Path, content: bytes, unit: str) -> None:
    (path := tmp_path / "in.txt").write_bytes(content)
    found = outcome(lambda: texts_of(path, unit=unit), path, ", line [1-9].* is not UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        assert found is None
        return
    pieces = list(io.StringIO(text, newline=""))
    if unit == "paragraph":
        pieces = ["".join(pieces[a:b]) for a, b in _runs([bool(piece.strip()) for piece in pieces])]
    elif unit == "line":
        pieces = [piece.rstrip("\r\n") for piece in pieces]
    else:
        pieces = [text]
    assert found == [piece.encode() for piece in pieces if piece]


def _runs(full: list[bool]) -> list[tuple[int, int]]:
    """Bounds of the runs of true values."""
    edges = np.flatnonzero(np.diff([0, *map(int, full), 0])).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


@fuzz
@given(FLIPS, st.integers(0, 60))
def test_damaged_gzip(tmp_path: Path, flips: list[tuple[int, int]], cut: int) -> None:
    """Compressed JSON lines and tables with bytes replaced or cut off."""
    text = "".join(json.dumps({"text": f"text {i * i}", "label": i % 3}) + "\n" for i in range(300))
    whole = gzip.compress(text.encode(), mtime=0)
    damaged = flipped(whole, flips)[: len(whole) - max(cut - 20, 0)]
    (path := tmp_path / "in.jsonl.gz").write_bytes(damaged)
    expected = [f"text {i * i}".encode() for i in range(300)]
    assert outcome(lambda: texts_of(path), path, ".*(is damaged or cannot be read|is not)") in (None, expected)
    examples = outcome(lambda: read_file(path, Columns(None, None)).examples, path)
    assert examples is None or [example.texts[0].encode() for example in examples] == expected


@fuzz
@given(flips=FLIPS, cut=st.integers(0, 40))
def test_damaged_parquet(tmp_path: Path, flips: list[tuple[int, int]], cut: int) -> None:
    """With checksums in the file, no damage of its pages goes unnoticed."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": [f"text {i * i}" for i in range(2000)]})
    buffer = io.BytesIO()
    parquet.write_table(table, buffer, row_group_size=700, write_page_checksum=True, use_dictionary=False)
    content = buffer.getvalue()
    body = content.rindex(b"text 3996001") + 100  # the pages, before the footer
    damaged = flipped(content[:body], flips) + content[body:]
    (path := tmp_path / "in.parquet").write_bytes(damaged[: len(damaged) - max(cut - 30, 0)])
    expected = [f"text {i * i}".encode() for i in range(2000)]
    place = " (is not a Parquet file|cannot be read after row [0-9]|has [0-9]+ rows that can be read, not 2000)"
    assert outcome(lambda: texts_of(path), path, place) in (None, expected)


TABLES = st.lists(
    st.sampled_from(
        ["text", "label", ",", "\t", "\n", "\r\n", "\r", '"', '""', "a", "é", "\x00", "1", " ", "\ufeff", "\ud7ff"]
    ),
    max_size=25,
).map(lambda cells: ("text,label\n" + "".join(cells)).encode())


@fuzz
@given(TABLES | st.binary(max_size=40), st.sampled_from(["csv", "tsv", "tab", "jsonl"]))
def test_labelled_texts(tmp_path: Path, content: bytes, kind: str) -> None:
    content = content.replace(b",", b"\t", 1) if kind == "tsv" else content
    (path := tmp_path / f"in.{kind}").write_bytes(content)
    examples = outcome(lambda: read_file(path, Columns(("text",), "label")).examples, path)
    if examples is None or kind == "jsonl":
        return
    text = content.decode("utf-8-sig")
    style: dict[str, Any] = {"quoting": csv.QUOTE_NONE} if kind == "tsv" else {"strict": True}
    rows = list(csv.reader(io.StringIO(text, newline=""), delimiter="," if kind == "csv" else "\t", **style))
    expected = [row for row in rows[3 if kind == "tab" else 1 :] if row]
    columns = [rows[0].index("text"), rows[0].index("label")]
    assert [(e.texts[0], e.label) for e in examples] == [(row[columns[0]], row[columns[1]].strip()) for row in expected]


@fuzz
@given(st.data())
def test_files_of_tokenizers(tmp_path: Path, tokenizer_files: dict[str, Path], data: st.DataObject) -> None:
    """Damaged, a tokenizer is refused by the name of its file, or is one that can be used."""
    kind = data.draw(st.sampled_from(sorted(tokenizer_files)))
    content = tokenizer_files[kind].read_bytes()
    damage = data.draw(st.sampled_from(["flip", "cut", "insert", "nest"]))
    if damage == "flip":
        content = flipped(content, data.draw(FLIPS))
    elif damage == "cut":
        content = content[: data.draw(st.integers(0, len(content)))]
    elif damage == "insert":
        place = data.draw(st.integers(0, len(content)))
        content = content[:place] + data.draw(st.binary(min_size=1, max_size=8)) + content[place:]
    else:
        content = b"[" * 100_000
    for name, file in tokenizer_files.items():
        (tmp_path / name).write_bytes(content if name == kind else file.read_bytes())
    build: dict[str, Callable[[], Any]] = {
        "tokenizer.json": lambda: HuggingFaceTokenizer(str(tmp_path)),
        "tokenizer_config.json": lambda: HuggingFaceTokenizer(str(tmp_path)),
        "special_tokens_map.json": lambda: HuggingFaceTokenizer(str(tmp_path)),
        "added_tokens.json": lambda: HuggingFaceTokenizer(str(tmp_path)),
        "vocab.json": lambda: GPT2BPETokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")),
        "merges.txt": lambda: GPT2BPETokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")),
        "vocab.txt": lambda: BertWordPieceTokenizer(str(tmp_path / "vocab.txt"), lower_case=False),
        "tokenizer.model": lambda: SentencePieceTokenizer(str(tmp_path / "tokenizer.model")),
    }
    tokenizer = outcome(build[kind], tmp_path)
    if tokenizer is not None:
        ids = outcome(lambda: tokenizer.tokenize("def f(x): é"), tmp_path) or []
        assert all(0 <= i < tokenizer.vocab_size for i in ids) and 0 <= tokenizer.eod < tokenizer.vocab_size


@pytest.fixture(scope="module")
def tokenizer_files(
    tmp_path_factory: pytest.TempPathFactory,
    huggingface_folder: Path,
    gpt2_files: dict[str, str],
    vocab_file: Path,
    sentencepiece_model: Path,
) -> dict[str, Path]:
    """A good file of every kind by its name."""
    folder = tmp_path_factory.mktemp("tokenizers")
    token = {"content": "<a>", "special": True, "lstrip": False}
    config = {"eos_token": "<|endoftext|>", "added_tokens_decoder": {"300": token}, "tokenizer_class": "GPT2Tokenizer"}
    for name, content in (
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", {"eos_token": "<|endoftext|>", "pad_token": token}),
        ("added_tokens.json", {"<a>": 300}),
    ):
        (folder / name).write_text(json.dumps(content))
    return {
        "tokenizer.json": huggingface_folder / "tokenizer.json",
        "vocab.json": Path(gpt2_files["vocab_file"]),
        "merges.txt": Path(gpt2_files["merge_file"]),
        "vocab.txt": vocab_file,
        "tokenizer.model": sentencepiece_model,
    } | {path.name: path for path in folder.iterdir()}


@fuzz
@given(st.sampled_from(["bin", "idx", "json"]), FLIPS, st.integers(0, 30), st.booleans())
def test_datasets_with_a_description(
    tmp_path: Path, suffix: str, flips: list[tuple[int, int]], cut: int, longer: bool
) -> None:
    """No damage of the tokens or the index of (small) data that tools/preprocess_data.py wrote goes unnoticed."""
    dataset = write_dataset(tmp_path / "d", numbered([5, 0, 7, 3, 200, 1]))
    before = dataset.tokens.tolist(), dataset.document_index.tolist()
    write_description(dataset, ByteTokenizer(), None)
    path = tmp_path / f"d.{suffix}"
    content = path.read_bytes()
    path.write_bytes(flipped(content, flips)[: len(content) - max(cut - 25, 0)] + b"x" * longer)

    def read() -> tuple[list[int], list[int]]:
        found = IndexedDataset(tmp_path / "d")
        read_description(found)
        return found.tokens.tolist(), found.document_index.tolist()

    assert outcome(read, tmp_path / "d") in (None, before)


def test_a_splitter_that_panics_is_told_with_the_document(tmp_path: Path) -> None:
    """A text on which sentencex 1.0 panics; another version may split it."""
    pytest.importorskip("sentencex")
    text = "\u2028|é😀|\u2028中b.I.\u2028. "
    (path := tmp_path / "in.jsonl").write_text(json.dumps({"text": "ok."}) + "\n" + json.dumps({"text": text}) + "\n")
    found = outcome(
        lambda: texts_of(path, splitter=SentenceSplitter(language="kk")), path, ", line 2: the value of text cannot"
    )
    assert found is None or found[0] == b"ok."


class Panics:
    """A splitter whose Rust code panics: an exception that is no Exception."""

    class Panic(BaseException):
        pass

    def split(self, text: str) -> list[str]:
        raise self.Panic("index out of range")


def test_panics_are_data_errors(tmp_path: Path) -> None:
    (path := tmp_path / "in.jsonl").write_text('\n{"text": "ok."}\n')
    with pytest.raises(
        DataError, match=r"in\.jsonl, line 2: the value of text cannot be split into sentences .* .Panic: index"
    ):
        texts_of(path, splitter=Panics())  # type: ignore[arg-type]


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    """Missing, a folder, or a link to nothing."""
    (tmp_path / "link.jsonl").symlink_to("nowhere")
    (tmp_path / "folder.csv").mkdir()
    for name in ("link.jsonl", "folder.csv", "missing.tsv"):
        path = tmp_path / name
        assert outcome(lambda path=path: read_file(path, Columns(None, None)), path) is None
        with pytest.raises(DataError):
            open_sources([str(path)], ["text"])
