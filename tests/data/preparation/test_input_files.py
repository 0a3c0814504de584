"""Which files are read, and that what is read is the text and nothing else."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from megatron_lsh.data.indexed import IndexedDataset
from megatron_lsh.data.preparation.input_files import input_files
from megatron_lsh.errors import DataError
from tests.data.preparation.test_preprocess import convert, documents


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two documents in a.jsonl, and what commonly lies beside data."""
    folder = tmp_path / "in"
    for hidden in (".ipynb_checkpoints", ".git/objects"):
        (folder / hidden).mkdir(parents=True)
    text = '{"text": "one"}\n{"text": "two"}\n'
    for name in ("a.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", ".hidden.jsonl", ".git/objects/x.txt"):
        (folder / name).write_text(text)
    for name in ("README.md", "readme.txt", "LICENSE.txt", "dataset_infos.json", "a.jsonl~", "notes.csv"):
        (folder / name).write_text("# about the data")
    return folder


def test_a_folder_is_read_without_what_lies_beside_its_data(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.link(folder / "a.jsonl", folder / "b.jsonl")
    (folder / "newest.jsonl").symlink_to("a.jsonl")
    assert convert(tmp_path, "--input", folder) == 0
    assert documents(tmp_path) == ["one", "two"]
    told = capsys.readouterr().out
    assert told.count("left out: ") == 7 and f"left out: {folder}/README.md" in told
    for name in ("b.jsonl", "newest.jsonl"):
        assert f"taken once: {folder}/a.jsonl, which is also {folder}/{name}" in told


def test_a_file_is_read_once(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["a.jsonl", "*.jsonl"], [".", "a.jsonl"], ["a.jsonl", "a.jsonl", "../in/a.jsonl"]):
        assert convert(tmp_path, "--input", *(f"{folder}/{word}" for word in words)) == 0
        assert documents(tmp_path) == ["one", "two"]
        assert f"taken once: {folder}/a.jsonl" in capsys.readouterr().out


def test_what_is_named_is_taken(tmp_path: Path, folder: Path) -> None:
    hidden = folder / ".ipynb_checkpoints" / "a-checkpoint.jsonl"
    assert convert(tmp_path, "--input", folder / "README.md", hidden) == 0
    assert documents(tmp_path) == ["# about the data", "one", "two"]


def test_a_text_beside_its_compressed_copy_is_refused(folder: Path) -> None:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes()))
    for word in (str(folder), f"{folder}/a*"):
        with pytest.raises(DataError, match=r"a\.jsonl and its copy a\.jsonl\.gz: name one of them"):
            list(input_files(word, {}, print))
    assert len(list(input_files(str(folder / "a.jsonl.gz"), {}, print))) == 1


@pytest.mark.parametrize("unit", ["file", "paragraph", "line"])
def test_byte_order_marks_are_no_text(tmp_path: Path, unit: str) -> None:
    (tmp_path / "in.txt").write_bytes("\ufeffone\ufeff".encode())
    assert convert(tmp_path, "--input", tmp_path / "in.txt", "--text-documents", unit) == 0
    assert documents(tmp_path) == ["one\ufeff"]
    (tmp_path / "in.jsonl").write_bytes("\ufeff".encode() + b'{"text": "one"}\n')
    assert convert(tmp_path, "--input", tmp_path / "in.jsonl") == 0
    assert documents(tmp_path) == ["one"]


def test_an_end_token_of_the_tokenizer_itself_is_not_doubled(tmp_path: Path, huggingface_folder: Path) -> None:
    """A template puts <|endoftext|> (299) behind every text, with and without --append-eod."""
    from tokenizers import Tokenizer, processors

    backend = Tokenizer.from_file(str(huggingface_folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 299)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "in.jsonl").write_text('{"text": "x = 1"}\n{"text": ["x", "y"]}\n')
    model = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tmp_path / "tokenizer.json"]
    written = []
    for flags in ([], ["--append-eod"], ["--append-eod", "--split-sentences"]):
        assert convert(tmp_path, "--input", tmp_path / "in.jsonl", *model, *flags) == 0
        written.append(IndexedDataset(tmp_path / f"out_text_{'sentence' if len(flags) > 1 else 'document'}"))
    plain, appended, sentences = ([dataset[i].tolist() for i in range(3)] for dataset in written)
    assert plain == appended and all(ids.count(299) == 1 and ids[-1] == 299 for ids in plain)
    assert sentences == [plain[0], plain[1][:-1], plain[2]]


def test_places_in_errors(tmp_path: Path) -> None:
    """A text that cannot be tokenized is named by file and line."""
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("1 2", "3", "4 x")))
    null = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "10"]
    for workers in (1, 2):
        assert convert_fails_with(tmp_path, "in.jsonl, line 3: NullTokenizer takes numbers", workers, *null)


def convert_fails_with(folder: Path, message: str, workers: int, *flags: str) -> bool:
    from tests.data.preparation.test_preprocess import convert_fails

    return convert_fails(folder, message, "--input", folder / "in.jsonl", "--workers", workers, *flags)
