from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lsh.data.indexed import IndexedDataset
from tests.data.helpers import ROOT, run_tool

SOURCE = "import os\n\n\ndef f(x):\n        return x + 1\t# ä中\r\n" * 40


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small standard library, with the oddities of the real one."""
    root = tmp_path / "lib"
    for name in ("site-packages/other", "test", "json"):
        (root / name).mkdir(parents=True)
    for number in range(30):
        (root / "json" / f"module{number}.py").write_bytes(f"# {number}\n{SOURCE}".encode())
    (root / "test" / "latin1.py").write_bytes("# coding: latin-1\nx = 'ä'\n".encode("latin-1"))
    (root / "test" / "mark.py").write_text("x = '\u2581'\n", encoding="utf-8")
    (root / "empty.py").write_text("\n")
    (root / "site-packages" / "other" / "third_party.py").write_text("third = 'party'\n")
    return root


def test_corpus_and_tokenizer(library: Path, tmp_path: Path) -> None:
    flags = ["--stdlib", library, "--vocab-size", "320", "--tokenizer-mb", "0.01"]
    done = run_tool("prepare_stdlib_corpus", *flags, "--output-dir", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert "30 documents" in done.stdout and "(3 files left out)" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "a" / "stdlib.jsonl").read_text(encoding="utf-8").splitlines()]
    paths = [line["path"] for line in lines]
    assert sorted(paths) == sorted(f"json/module{number}.py" for number in range(30)) and paths != sorted(paths)
    assert all(line["text"].encode() == (library / line["path"]).read_bytes() for line in lines)

    # The same inputs give the same files, and files that are there are not made again.
    run_tool("prepare_stdlib_corpus", *flags, "--output-dir", tmp_path / "b")
    for name in ("stdlib.jsonl", "tokenizer.model", "vocab.txt", "stdlib.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    again = run_tool("prepare_stdlib_corpus", *flags, "--output-dir", tmp_path / "a")
    assert again.returncode == 0 and "up to date" in again.stdout
    less = run_tool("prepare_stdlib_corpus", *flags, "--output-dir", tmp_path / "a", "--max-mb", "0.01")
    assert "4 documents" in less.stdout, less.stdout

    vocabulary = (tmp_path / "a" / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert vocabulary[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] and "import" in vocabulary


def test_on_to_training_data(library: Path, tmp_path: Path) -> None:
    """scripts/prepare_readme_data.sh makes the files of each model from the corpus, once."""
    flags = ["--stdlib", library, "--vocab-size", "320", "--tokenizer-mb", "0.01"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PREPARE_FLAGS": " ".join(map(str, flags)), "PATH": path}

    def prepare(model: str) -> str:
        script = [ROOT / "scripts" / "prepare_readme_data.sh", tmp_path, model]
        return subprocess.run(script, env=env, capture_output=True, text=True, check=True).stdout

    for model, files in (
        ("gpt", "stdlib_text_document"),
        ("bert", "stdlib_bert_text_sentence"),
        ("t5", "stdlib_t5_text_sentence"),
    ):
        assert "30 documents" in prepare(model)
        dataset = IndexedDataset(tmp_path / files)
        assert dataset.num_documents == 30 and (len(dataset) > 3000) == (model != "gpt")
    assert f"{files}.idx is up to date" in prepare("t5")
    with pytest.raises(subprocess.CalledProcessError):
        prepare("llama")


def test_errors(library: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for flags, message in (
        (["--stdlib", tmp_path / "nothing"], "is not a folder"),
        (["--stdlib", library, "--max-mb", "0.000001"], "has no Python sources that fit"),
        (["--stdlib", library, "--vocab-size", "100000"], "--vocab-size (100000) does not suit the text"),
        (["--stdlib", library, "--output-dir", tmp_path / "file"], "cannot be written"),
    ):
        done = run_tool("prepare_stdlib_corpus", "--output-dir", tmp_path / "out", *flags)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and message in done.stderr, done.stderr
