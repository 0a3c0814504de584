from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lsh.data.tokenizers.wordpiece import SPECIAL, BertWordPieceTokenizer, train_wordpiece
from megatron_lsh.errors import ConfigError, DataError
from tests.data.conftest import TEXTS

VOCABULARY = [*SPECIAL, "un", "##aff", "##able", "a", "##ble", "Un", "é", "e", ",", "[", "]", "mask", "MASK", "."]


@pytest.fixture
def by_hand(tmp_path: Path) -> Path:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(VOCABULARY), encoding="utf-8")
    return path


def pieces(tokenizer: BertWordPieceTokenizer, text: str) -> list[str]:
    return [VOCABULARY[i] for i in tokenizer.tokenize(text)]


def test_longest_pieces_first(by_hand: Path) -> None:
    cased = BertWordPieceTokenizer(str(by_hand), lower_case=False)
    lower = BertWordPieceTokenizer(str(by_hand), lower_case=True)
    assert pieces(cased, "unaffable,  able\n") == ["un", "##aff", "##able", ",", "a", "##ble"]
    assert pieces(cased, "Unaffable é É") == ["Un", "##aff", "##able", "é", "[UNK]"]
    assert pieces(lower, "Unaffable é É") == ["un", "##aff", "##able", "e", "e"]
    assert pieces(cased, "[MASK]") == ["[", "MASK", "]"]  # text is only text
    assert cased.detokenize([2, *cased.tokenize("unaffable, able"), 3, 0]) == "unaffable, able"
    assert (cased.name, lower.name) == ("BertWordPieceCase", "BertWordPieceLowerCase")
    assert cased.fingerprint() != lower.fingerprint()


def test_special_tokens(by_hand: Path, tmp_path: Path) -> None:
    tokenizer, size = BertWordPieceTokenizer(str(by_hand), False, vocab_extra_ids=3), len(VOCABULARY)
    assert (tokenizer.pad, tokenizer.cls, tokenizer.sep, tokenizer.mask) == (0, 2, 3, 4)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.eod) == (size, size + 1, size + 1)
    assert tokenizer.sentinels == [size + 2, size + 3, size + 4] and tokenizer.vocab_size == size + 5
    inside = tokenizer.continues_word()
    assert inside.shape == (size + 5,)
    assert [VOCABULARY[i] for i in inside.nonzero()[0]] == ["##aff", "##able", "##ble"]
    # Where the file lists them, they are taken from there.
    (tmp_path / "own.txt").write_text("[UNK]\n[EOS]\n<extra_id_0>\r\na\n[BOS]\n")
    own = BertWordPieceTokenizer(str(tmp_path / "own.txt"), False, vocab_extra_ids=2)
    assert (own.bos, own.eos, own.sentinels, own.vocab_size) == (4, 1, [2, 5], 6)
    assert (own.cls, own.sep, own.mask, own.pad) == (None,) * 4


def test_agrees_with_transformers(vocab_file: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for lower_case in (False, True):
        reference = transformers.BertTokenizer(str(vocab_file), do_lower_case=lower_case)
        ours = BertWordPieceTokenizer(str(vocab_file), lower_case)
        for text in [*TEXTS, "Some NEW wordswords, über 12.5!", "", "中x"]:
            assert ours.tokenize(text) == reference(text, add_special_tokens=False).input_ids


def test_training(tmp_path: Path) -> None:
    texts = [*TEXTS, "Some words, and other words."]
    lines = train_wordpiece(texts, 150).splitlines()
    assert tuple(lines[:5]) == SPECIAL and len(lines) == len(set(lines)) <= 150
    assert "Some" in "".join(lines).replace("##", "")
    lowered = train_wordpiece(texts, 150, lower_case=True)
    assert lowered[len("".join(SPECIAL)) + 5 :].islower()
    # The same in another process, whose hashes have another seed.
    code = "import json, sys; from megatron_lsh.data.tokenizers.wordpiece import train_wordpiece as t\n"
    code += "print('\\n'.join(t(json.loads(sys.argv[1]), 150).splitlines()))"
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(texts)],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == lines
    with pytest.raises(ConfigError, match=r"--vocab-size \(20\) does not suit the text, whose characters alone"):
        train_wordpiece(texts, 20)


def test_errors(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"[UNK]\n\xe4\n")
    for path, message in ((tmp_path / "gone", "does not exist"), (tmp_path / "latin", "is not UTF-8")):
        with pytest.raises(DataError, match=message):
            BertWordPieceTokenizer(str(path), False)
