from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lsh.data.indexed import IndexedDataset
from megatron_lsh.data.preparation.preprocess import main
from megatron_lsh.data.preparation.sentences import LANGUAGES, UNITS, SentenceSplitter
from megatron_lsh.data.tokenizers import ByteTokenizer, Llama2Tokenizer
from megatron_lsh.data.vocabulary import read_description
from megatron_lsh.errors import ConfigError
from tests.data.helpers import run_script, run_tool

pytest.importorskip("sentencex")

ENGLISH = 'Dr. Smith met Mrs. Jones at 5 p.m. yesterday. It cost $3.50!\n"Why?" he asked.\n\n  A new paragraph.  '
CODE = "def f(x):\n\n    # One. Two.\n    return x\n"


def test_english() -> None:
    assert SentenceSplitter().split(ENGLISH) == [
        "Dr. Smith met Mrs. Jones at 5 p.m. yesterday.",
        "It cost $3.50!",
        '"Why?" he asked.',
        "A new paragraph.",
    ]
    assert SentenceSplitter(language="german").split("Das ist z.B. so. Am 3. Mai auch.") == [
        "Das ist z.B. so.",
        "Am 3. Mai auch.",
    ]
    assert SentenceSplitter(language="zh").split("你好。世界!") == ["你好。", "世界!"]
    assert all(SentenceSplitter(language=name).split("A b. C d.") for name in LANGUAGES)


def test_lines_and_paragraphs() -> None:
    assert SentenceSplitter("line").split(CODE) == ["def f(x):", "# One. Two.", "return x"]
    assert SentenceSplitter("paragraph").split(CODE) == ["def f(x):", "# One. Two.\n    return x"]
    # The indentation of a line stays with it, blank lines with the line before.
    assert SentenceSplitter("line", keep_white_space=True).split(CODE) == [
        "def f(x):\n\n",
        "    # One. Two.\n",
        "    return x\n",
    ]


@pytest.mark.parametrize("unit", UNITS)
@settings(deadline=None, max_examples=80)
@given(text=st.text(alphabet="aB. \n\t\r\"'!?é中\u3002\u00a0)", max_size=60))
def test_nothing_is_lost(unit: str, text: str) -> None:
    kept = SentenceSplitter(unit, keep_white_space=True).split(text)
    assert "".join(kept) == (text if text.strip() else "")
    assert all(part.strip() for part in kept)
    stripped = SentenceSplitter(unit).split(text)
    assert all(part == part.strip() for part in stripped)
    assert "".join("".join(stripped).split()) == "".join(text.split())


def test_line_breaks_that_sentencex_drops() -> None:
    text = "class A:\n    '''Doc.'''\n\n    def f(self):\n        self.g('a.')\n\n        # Comment. Second!\n" * 5
    assert "".join(SentenceSplitter(keep_white_space=True).split(text)) == text


def test_bad_language_and_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"--lang \(klingonisch\) must be an ISO 639 code such as en, or one of czech"
    ):
        SentenceSplitter(language="klingonisch")
    monkeypatch.setitem(sys.modules, "sentencex", None)
    with pytest.raises(ConfigError, match=r"pip install sentencex, or .* --sentence-unit line"):
        SentenceSplitter()
    assert SentenceSplitter("line").split("a\nb") == ["a", "b"]


def sequences(prefix: Path) -> list[list[str]]:
    """Text of each sentence of each document."""
    dataset, tokenizer = IndexedDataset(prefix), ByteTokenizer()
    texts = [tokenizer.detokenize(dataset[i].tolist()) for i in range(len(dataset))]
    return [texts[begin:end] for begin, end in pairwise(dataset.document_index.tolist())]


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [ENGLISH, "", "One sentence", None, ["As", "given. Here."], ["Single. List."], "\ud800. B."]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    common = ["--input", f"{tmp_path}/in.jsonl", "--tokenizer-type", "ByteTokenizer", "--workers", "1"]
    assert main([*common, "--output-prefix", f"{tmp_path}/out", "--split-sentences"]) == 0
    expected = [SentenceSplitter().split(ENGLISH), ["One sentence"], ["As", "given. Here."], ["Single. List."]]
    assert sequences(tmp_path / "out_text_sentence") == [*expected, ["?.", "B."]]
    output = capsys.readouterr().out
    assert "5 documents, 10 sentences" in output and "2 without text left out" in output
    description = read_description(IndexedDataset(tmp_path / "out_text_sentence"))
    assert description is not None and description["split_sentences"] is True
    assert not list(tmp_path.glob("*_document.*"))
    flags = ["--split-sentences", "--keep-newlines", "--append-eod"]
    assert main([*common, "--output-prefix", f"{tmp_path}/kept", *flags]) == 0
    dataset = IndexedDataset(tmp_path / "kept_text_sentence")
    assert "".join(sequences(tmp_path / "kept_text_sentence")[0]) == ENGLISH
    ends = dataset.document_index[1:] - 1
    assert [i for i in range(len(dataset)) if dataset[i][-1] == 256] == ends.tolist()


def test_workers_and_special_tokens(tmp_path: Path, sentencepiece_model: Path) -> None:
    """Several processes write the same; a tokenizer's own mark does not begin every sentence."""
    texts = [f"{ENGLISH} Number {i}." for i in range(1200)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flags = ["--input", tmp_path / "in.jsonl", "--tokenizer-type", "Llama2Tokenizer", "--split-sentences"]
    flags += ["--tokenizer-model", sentencepiece_model, "--lang", "en"]
    for workers in (1, 2):
        run = run_tool if workers == 1 else run_script
        done = run("preprocess_data", *flags, "--output-prefix", tmp_path / str(workers), "--workers", workers)
        assert done.returncode == 0, done.stderr
    one, two = (tmp_path / f"{workers}_text_sentence" for workers in (1, 2))
    for suffix in (".bin", ".idx", ".json"):
        assert Path(f"{one}{suffix}").read_bytes() == Path(f"{two}{suffix}").read_bytes()
    dataset, tokenizer = IndexedDataset(two), Llama2Tokenizer(str(sentencepiece_model))
    assert (dataset.num_documents, len(dataset)) == (1200, 6000)
    assert tokenizer.detokenize(dataset[-1].tolist()) == "Number 1199." and tokenizer.bos not in dataset[-1]
