from __future__ import annotations

import gzip
import io
import json
import signal
import time
from contextlib import redirect_stderr
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megatron_lsh.data.indexed import IndexedDataset
from megatron_lsh.data.preparation.preprocess import main
from megatron_lsh.data.tokenizers import ByteTokenizer, GPTSentencePieceTokenizer
from tests.data.helpers import run_script, run_tool, start_tool

TEXTS = ["first document", "", "zweites: ä中", "line one\nline two\n", "x" * 1000]


def write_jsonl(path: Path, texts: list[object], **more: object) -> Path:
    path.write_text("".join(json.dumps({"text": text, **more}) + "\n" for text in texts))
    return path


def convert(folder: Path, *arguments: object) -> int:
    flags = ["--output-prefix", folder / "out", "--tokenizer-type", "ByteTokenizer", "--workers", 1, *arguments]
    return main([str(flag) for flag in flags])


def documents(folder: Path, name: str = "out_text_document") -> list[str]:
    """Text of each document of a dataset made with the ByteTokenizer; | stands for the end-of-document token."""
    dataset, tokenizer = IndexedDataset(folder / name), ByteTokenizer()
    texts = []
    for begin, end in pairwise(dataset.document_bounds(0, dataset.num_documents)):
        ids = dataset.tokens[begin:end].tolist()
        texts.append(tokenizer.detokenize(ids) + ("|" if ids[-1] == tokenizer.eod else ""))
    return texts


def test_jsonl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "in.jsonl", [*TEXTS, None])
    with open(tmp_path / "in.jsonl", "a") as stream:
        stream.write('\n  \n{"text": "no newline at the end"}')
    assert convert(tmp_path, "--input", tmp_path / "in.jsonl", "--append-eod") == 0
    expected = [f"{text}|" for text in [*TEXTS, "no newline at the end"] if text]
    assert documents(tmp_path) == expected
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == [
        "out_text_document.bin",
        "out_text_document.idx",
        "out_text_document.json",
    ]
    output = capsys.readouterr().out
    assert "7 documents" in output and "2 without text left out" in output
    assert f"--data-path {tmp_path}/out_text_document --tokenizer-type ByteTokenizer" in output


def test_keys_and_sentence_lists(tmp_path: Path) -> None:
    lines = [{"a": ["one", "", "two"], "b": "x"}, {"a": "three", "b": ["y"]}]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    assert convert(tmp_path, "--input", tmp_path / "in.jsonl", "--json-keys", "a", "b") == 0
    assert documents(tmp_path, "out_a_document") == ["onetwo", "three"]
    assert documents(tmp_path, "out_b_document") == ["x", "y"]
    assert IndexedDataset(tmp_path / "out_a_document").lengths.tolist() == [3, 3, 5]


def test_globs_folders_and_gzip(tmp_path: Path) -> None:
    source = tmp_path / "in"
    (source / "deep").mkdir(parents=True)
    write_jsonl(source / "b.jsonl", ["b"])
    (source / "a.json.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    (source / "deep" / "c.txt").write_text("c")
    (source / "ignored.csv").write_text("d")
    assert convert(tmp_path, "--input", source) == 0
    assert documents(tmp_path) == ["a", "b", "c"]
    assert convert(tmp_path, "--input", f"{source}/*.jsonl", f"{source}/**/*.txt") == 0
    assert documents(tmp_path) == ["b", "c"]
    assert convert(tmp_path, "--input", source / "ignored.csv", "--input-format", "text") == 0
    assert documents(tmp_path) == ["d"]


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("file", ["a\r\nb\n\n\nc\n d"]),
        ("paragraph", ["a\r\nb\n", "c\n d"]),
        ("line", ["a", "b", "c", " d"]),
    ],
)
def test_text(tmp_path: Path, unit: str, expected: list[str]) -> None:
    (tmp_path / "in.txt").write_bytes(b"a\r\nb\n\n\nc\n d")
    assert convert(tmp_path, "--input", tmp_path / "in.txt", "--text-documents", unit) == 0
    assert documents(tmp_path) == expected


def test_parquet(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"body": ["one", None, "two"] * 400, "id": [1, 2, 3] * 400})
    parquet.write_table(table, tmp_path / "in.parquet", row_group_size=100)
    assert convert(tmp_path, "--input", tmp_path / "in.parquet", "--json-keys", "body") == 0
    assert documents(tmp_path, "out_body_document") == ["one", "two"] * 400
    for keys, message in ((["text"], "no column text, only body, id"), (["id"], "is a int, it must be text")):
        assert convert_fails(tmp_path, message, "--input", tmp_path / "in.parquet", "--json-keys", *keys)
    (tmp_path / "bad.parquet").write_text("no")
    assert convert_fails(tmp_path, "is not a Parquet file", "--input", tmp_path / "bad.parquet")


@pytest.mark.slow
def test_hugging_face_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_dict({"text": ["one", "two"] * 300, "id": [1, 2] * 300})
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "saved")
    assert convert(tmp_path, "--input", f"hf:{tmp_path}/saved") == 0
    assert documents(tmp_path) == ["one", "two"] * 300
    (tmp_path / "files").mkdir()
    write_jsonl(tmp_path / "files" / "validation.jsonl", ["three"])
    assert convert(tmp_path, "--input", f"hf:{tmp_path}/files", "--hf-split", "validation") == 0
    assert documents(tmp_path) == ["three"]
    assert convert_fails(
        tmp_path, "split nowhere cannot be loaded", "--input", f"hf:{tmp_path}/files", "--hf-split", "nowhere"
    )


def convert_fails(folder: Path, message: str, *arguments: object) -> bool:
    """Does it fail with this message on stderr?"""
    stream = io.StringIO()
    with redirect_stderr(stream):
        status = convert(folder, *arguments)
    assert status == 1 and message in stream.getvalue() and stream.getvalue().startswith("error: "), stream.getvalue()
    return True


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ('{"text": "a"}\n{"text": \n', [], "in.jsonl, line 2 is not JSON"),
        ('{"text": "a"}\n["text"]\n', [], "line 2 is a JSON list"),
        ('{"text": "a"}\n{"body": "a"}\n', [], "line 2 has no key text, only body"),
        ('{"text": 5}\n', [], "the value of text is a int"),
        ('{"text": ""}\n', [], "has no text under the key text"),
        ("", [], "has no text under the key text"),
        ('{"text": "a"}\n', ["--keep-newlines"], "--keep-newlines must not be given without --split-sentences"),
        ('{"text": "a"}\n', ["--sentence-unit", "line"], "must not be given without --split-sentences"),
        ('{"text": "a"}\n', ["--split-sentences", "--lang", "!"], "--lang (!) must be an ISO 639 code"),
        ('{"text": " "}\n', ["--split-sentences"], "has no text under the key text"),
        ('{"text": "a"}\n', ["--tokenizer-type", "BertWordPieceCase"], "give --vocab-file"),
        ('{"text": "a"}\n', ["--tokenizer-type", "GPT2BPETokenizer"], "GPT2BPETokenizer: set --vocab-file"),
        ('{"text": "a"}\n', ["--tokenizer-type", "Llama2Tokenizer"], "give --tokenizer-model"),
        ('{"text": "a"}\n', ["--workers", "0"], "--workers (0) must be at least 1"),
        ('{"text": "a"}\n', ["--json-keys", "text", "text"], "more than once"),
        ('{"text": "a"}\n', ["--input", "/no/such/*.jsonl"], "matches no file"),
        ('{"text": "a"}\n', ["--input", "stas/c4"], "write hf:stas/c4"),
        ('{"text": "a"}\n', ["--input", __file__], "has an unknown ending"),
    ],
)
def test_bad_input_leaves_nothing(tmp_path: Path, content: str, arguments: list[str], message: str) -> None:
    (tmp_path / "in.jsonl").write_text(content)
    assert convert_fails(tmp_path, message, "--input", tmp_path / "in.jsonl", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    assert convert_fails(tmp_path, "is damaged", "--input", tmp_path / "in.jsonl.gz")
    (tmp_path / "in.txt").write_bytes(b"\xff\xfe")
    assert convert_fails(tmp_path, "in.txt, line 1 is not UTF-8", "--input", tmp_path / "in.txt")
    (tmp_path / "empty").mkdir()
    assert convert_fails(tmp_path, "is a folder without", "--input", tmp_path / "empty")


def test_unknown_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        convert(tmp_path, "--input", "in.jsonl", "--json-key", "text")
    assert "unknown argument --json-key: did you mean --json-keys?" in capsys.readouterr().err


def test_megatron_flags_without_effect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "in.jsonl", ["a"])
    assert convert(tmp_path, "--input", tmp_path / "in.jsonl", "--partitions", 4, "--dataset-impl", "mmap") == 0
    assert "no effect here: --partitions, --dataset-impl" in capsys.readouterr().out


def test_lone_surrogate(tmp_path: Path, sentencepiece_model: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a\\ud800b"}\n')
    for kind in (["ByteTokenizer"], ["GPTSentencePieceTokenizer", "--tokenizer-model", sentencepiece_model]):
        assert convert(tmp_path, "--input", tmp_path / "in.jsonl", "--tokenizer-type", *kind) == 0
        assert IndexedDataset(tmp_path / "out_text_document").num_tokens >= 3


def test_output_does_not_depend_on_workers(tmp_path: Path, sentencepiece_model: Path) -> None:
    rng = np.random.RandomState(0)
    words = ["def", "return", "self.x", "  ", "\n", "1234", "ä"]
    texts: list[object] = [" ".join(rng.choice(words, size=rng.randint(0, 400))) for _ in range(1500)]
    write_jsonl(tmp_path / "in.jsonl", texts)
    common = ["--input", tmp_path / "in.jsonl", "--tokenizer-type", "GPTSentencePieceTokenizer"]
    common += ["--tokenizer-model", sentencepiece_model, "--append-eod", "--log-interval", "1"]
    for workers in (1, 2):
        run = run_tool if workers == 1 else run_script
        done = run("preprocess_data", *common, "--output-prefix", tmp_path / str(workers), "--workers", workers)
        assert done.returncode == 0, done.stderr
        assert "100.0% | 1,500 documents" in done.stdout
    for suffix in ("bin", "idx", "json"):
        one, two = (tmp_path / f"{workers}_text_document.{suffix}" for workers in (1, 2))
        assert one.read_bytes() == two.read_bytes()
    dataset, tokenizer = (
        IndexedDataset(tmp_path / "2_text_document"),
        GPTSentencePieceTokenizer(str(sentencepiece_model)),
    )
    kept = [text for text in texts if text]
    assert dataset.num_documents == len(kept)
    for i in range(0, len(kept), 100):
        assert dataset[i][-1] == tokenizer.eod and tokenizer.detokenize(dataset[i].tolist()) == kept[i]


@pytest.mark.parametrize("workers", [1, 2])
def test_interrupt_leaves_nothing(tmp_path: Path, workers: int) -> None:
    write_jsonl(tmp_path / "in.jsonl", ["some words to count " * 5000] * 600)
    flags = ["--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "out", "--tokenizer-type", "ByteTokenizer"]
    process = start_tool("preprocess_data", *flags, "--workers", workers)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out*.tmp")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (
        list(tmp_path.glob("out*.tmp")) and not list(tmp_path.glob("out*.bin")) and not list(tmp_path.glob("out*.idx"))
    )
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "interrupted: nothing was written" in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
