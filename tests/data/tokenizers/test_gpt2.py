"""GPT2BPETokenizer: vocab.json and merges.txt."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lsh.data.indexed import IndexedDataset
from megatron_lsh.data.preparation.preprocess import main
from megatron_lsh.data.tokenizers.gpt2 import GPT2BPETokenizer
from megatron_lsh.errors import DataError

TEXTS = [
    "x = 1",
    "  two  spaces\n\n\ttab",
    "it's we'll I'VE 12345",
    "é中😀\u2028\ufeff\x00",
    "a<|endoftext|>b",
    "<|endoftext|>",
    "",
]


def test_words_and_merges_by_hand(tmp_path: Path) -> None:
    """Merges work inside a word and its leading space, the first of the list first; unknown bytes give nothing."""
    tokens = ["l", "o", "w", "e", "r", "Ġ", "lo", "low", "er", "Ġlow", "ow"]
    (tmp_path / "v").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (tmp_path / "m").write_text("#version: 0.2\nl o\nlo w\ne r\nĠ low\no w\n", encoding="utf-8")
    tokenizer = GPT2BPETokenizer(str(tmp_path / "v"), str(tmp_path / "m"))
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.eos) == (12, 11, 11)  # the end token follows the vocabulary
    assert tokenizer.tokenize("low lower wow") == [7, 9, 8, 5, 2, 10]
    assert tokenizer.tokenize("l?ow<|endoftext|>") == [0, 10, 11]
    assert tokenizer.detokenize([7, 9, 8, 11]) == "low lower"


@given(st.lists(st.sampled_from(["def", " f", "(x", "):\n", "\t", "é", "中", "12", "'s", "\x00", "  "])))
@settings(deadline=None)
def test_round_trip(gpt2_files: dict[str, str], words: list[str]) -> None:
    tokenizer = GPT2BPETokenizer(**gpt2_files)
    ids = tokenizer.tokenize("".join(words))
    assert tokenizer.detokenize([*ids, tokenizer.eod]) == "".join(words) and tokenizer.eod not in ids


@pytest.mark.slow
def test_ids_equal_transformers(gpt2_files: dict[str, str], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2Tokenizer.from_pretrained(Path(gpt2_files["vocab_file"]).parent)
    ours = GPT2BPETokenizer(**gpt2_files)
    assert ours.vocab_size == len(theirs) and ours.eod == theirs.eos_token_id
    state = np.random.RandomState(0)
    drawn = [
        "".join(chr(state.choice([32, 10, 39, 65, 97, 49, 233, 0x4E2D, 0x1F600])) for _ in range(40))
        for _ in range(200)
    ]
    for text in [*TEXTS, *drawn]:
        assert ours.tokenize(text) == theirs(text).input_ids, text


def test_preprocess(gpt2_files: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "x = 1"}\n{"text": "import os"}\n')
    flags = [
        "--input",
        tmp_path / "in.jsonl",
        "--output-prefix",
        tmp_path / "out",
        "--tokenizer-type",
        "GPT2BPETokenizer",
    ]
    files = ["--vocab-file", gpt2_files["vocab_file"], "--merge-file", gpt2_files["merge_file"]]
    assert main(list(map(str, [*flags, *files, "--append-eod", "--workers", 1]))) == 0
    tokenizer, dataset = GPT2BPETokenizer(**gpt2_files), IndexedDataset(tmp_path / "out_text_document")
    assert [dataset[i].tolist() for i in range(2)] == [
        [*tokenizer.tokenize(text), tokenizer.eod] for text in ("x = 1", "import os")
    ]


@pytest.mark.parametrize(
    ("vocab", "merges", "message"),
    [
        (None, "", "--vocab-file .*v does not exist"),
        ("{", "", "--vocab-file .*v is not JSON"),
        ("[" * 100_000, "", "--vocab-file .*v is not JSON"),
        ("[1]", "", "must map tokens to different ids"),
        ('{"a": -1}', "", "must map tokens to different ids"),
        ('{"a": 1, "b": 1}', "", "must map tokens to different ids"),
        ('{"a": true}', "", "must map tokens to different ids"),
        ('{"a": 1}', None, "--merge-file .*m does not exist"),
        ('{"a": 1}', b"#version\n\xff a\n", "line 2 is not UTF-8"),
        ('{"a": 1}', "a\n", "line 1 must be two tokens"),
        ('{"a": 1}', "#version: 0.2\na a\n", "line 2: aa is not in --vocab-file"),
    ],
)
def test_damaged_files(tmp_path: Path, vocab: str | None, merges: str | bytes | None, message: str) -> None:
    for name, content in (("v", vocab), ("m", merges)):
        if content is not None:
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        GPT2BPETokenizer(str(tmp_path / "v"), str(tmp_path / "m"))
