from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lsh.config.data import TOKENIZER_TYPES, DataConfig
from megatron_lsh.data.tokenizers import (
    ByteTokenizer,
    GPTSentencePieceTokenizer,
    HuggingFaceTokenizer,
    Llama2Tokenizer,
    NullTokenizer,
    SentencePieceTokenizer,
    build_tokenizer,
)
from megatron_lsh.data.tokenizers.pieces import pieces
from megatron_lsh.errors import ConfigError, DataError
from tests.data.conftest import TEXTS

ODD_TEXTS = [*TEXTS, "", " ", "\n\n\t \r\n", "é中\U0001f600\x00", "</s><s><EOD><unk>", "  a  b  "]


def test_gpt_sentencepiece(sentencepiece_model: Path) -> None:
    tokenizer = GPTSentencePieceTokenizer(str(sentencepiece_model))
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad) == (320, 2, 3)
    for text in ODD_TEXTS:
        ids = tokenizer.tokenize(text)
        assert tokenizer.detokenize(ids) == text
        assert all(3 < i < 320 for i in ids)  # special tokens do not come from text
    assert tokenizer.detokenize([*tokenizer.tokenize("a b"), tokenizer.eod]) == "a b"


def test_llama2_starts_with_bos(sentencepiece_model: Path) -> None:
    plain, llama = GPTSentencePieceTokenizer(str(sentencepiece_model)), Llama2Tokenizer(str(sentencepiece_model))
    assert llama.tokenize("x = 1") == [1, *plain.tokenize("x = 1")]
    assert (llama.eod, llama.vocab_size) == (2, 320)
    assert llama.detokenize(llama.tokenize("x = 1")) == "x = 1"
    assert llama.fingerprint() != plain.fingerprint()


def test_sentencepiece_special_tokens(sentencepiece_model: Path) -> None:
    """<CLS> <SEP> <EOD> <MASK> follow the model's own pieces, which already have pad, bos and eos; then extra ids."""
    tokenizer = SentencePieceTokenizer(str(sentencepiece_model), vocab_extra_ids=3)
    assert (tokenizer.eod, tokenizer.pad, tokenizer.bos, tokenizer.eos) == (322, 3, 1, 2)
    assert tokenizer.sentinels == [324, 325, 326]
    assert (tokenizer.cls, tokenizer.sep, tokenizer.mask) == (320, 321, 323)
    assert tokenizer.vocab_size == 327
    for text in ODD_TEXTS:
        assert tokenizer.detokenize([*tokenizer.tokenize(text), tokenizer.eod]) == text
    # Extra ids do not change what text becomes.
    assert tokenizer.fingerprint() == SentencePieceTokenizer(str(sentencepiece_model)).fingerprint()


def test_huggingface_file_and_folder(huggingface_folder: Path) -> None:
    by_folder = HuggingFaceTokenizer(str(huggingface_folder))
    by_file = HuggingFaceTokenizer(str(huggingface_folder / "tokenizer.json"))
    assert (by_folder.vocab_size, by_folder.eod, by_folder.pad) == (300, 299, None)
    for text in ODD_TEXTS:
        assert by_folder.tokenize(text) == by_file.tokenize(text)
        assert by_folder.detokenize(by_folder.tokenize(text)) == text
    assert by_folder.fingerprint() == by_file.fingerprint()


def test_huggingface_end_token_from_config(huggingface_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((huggingface_folder / "tokenizer.json").read_bytes())
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": {"content": "!"}, "pad_token": "A"}))
    tokenizer = HuggingFaceTokenizer(str(tmp_path))
    assert [tokenizer.eod] == tokenizer.tokenize("!")
    assert [tokenizer.pad] == tokenizer.tokenize("A")
    config.write_text(json.dumps({"added_tokens_decoder": {}}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<nowhere>"}))
    with pytest.raises(DataError, match=r"does not say which token ends a document .<nowhere> is not in it"):
        HuggingFaceTokenizer(str(tmp_path))
    config.write_text("[]")
    with pytest.raises(DataError, match="not a JSON object"):
        HuggingFaceTokenizer(str(tmp_path))


@pytest.mark.slow
def test_huggingface_agrees_with_transformers(huggingface_folder: Path, tmp_path: Path) -> None:
    """A tokenizer.json read by `tokenizers` alone, and an old vocab.json and merges.txt through `transformers`."""
    transformers = pytest.importorskip("transformers")
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(huggingface_folder / "tokenizer.json"))
    ours = HuggingFaceTokenizer(str(huggingface_folder))
    assert all(ours.tokenize(text) == reference(text).input_ids for text in TEXTS)
    assert ours.vocab_size == len(reference)
    model = json.loads((huggingface_folder / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps({**model["vocab"], "<|endoftext|>": 299}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    old = HuggingFaceTokenizer(str(tmp_path))
    assert (old.vocab_size, old.eod) == (300, 299)
    assert all(old.tokenize(text) == ours.tokenize(text) for text in TEXTS)


@given(st.text())
def test_byte_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.tokenize(text)
    assert tokenizer.detokenize([*ids, tokenizer.eod]) == text
    assert all(0 <= i < 256 for i in ids) and tokenizer.eod == 256 and tokenizer.vocab_size == 257


def test_the_text_of_each_token_adds_up_to_the_whole(sentencepiece_model: Path, huggingface_folder: Path) -> None:
    for tokenizer in (
        GPTSentencePieceTokenizer(str(sentencepiece_model)),
        HuggingFaceTokenizer(str(huggingface_folder)),
    ):
        for text in TEXTS[:4]:
            found = pieces(tokenizer, tokenizer.tokenize(text))
            assert "".join(found) == text and len(found) == len(tokenizer.tokenize(text))
    found = pieces(ByteTokenizer(), ByteTokenizer().tokenize("aé中"))
    assert (len(found), found[0], found[2], found[5]) == (6, "a", "é", "中")  # the other bytes are no characters


def test_null() -> None:
    tokenizer = NullTokenizer(100)
    assert (tokenizer.vocab_size, tokenizer.eod) == (101, 100)
    assert tokenizer.tokenize("5 99 0") == [5, 99, 0] and tokenizer.detokenize([5, 99, 0]) == "5 99 0"
    for text in ("5 x", "101", "-1"):
        with pytest.raises(DataError):
            tokenizer.tokenize(text)


def test_build_every_type(
    sentencepiece_model: Path, huggingface_folder: Path, vocab_file: Path, gpt2_files: dict[str, str]
) -> None:
    for kind in TOKENIZER_TYPES:
        model = str(huggingface_folder if kind == "HuggingFaceTokenizer" else sentencepiece_model)
        files = {"vocab_file": str(vocab_file)} if kind.startswith("Bert") else {"tokenizer_model": model}
        files = gpt2_files if kind == "GPT2BPETokenizer" else files
        tokenizer = build_tokenizer(DataConfig(tokenizer_type=kind, **files), 1000)  # type: ignore[arg-type]
        assert tokenizer.name == kind
        assert 0 <= tokenizer.eod < tokenizer.vocab_size
        # Sentinels follow the vocabulary, change nothing else, and are no text.
        more = build_tokenizer(DataConfig(tokenizer_type=kind, vocab_extra_ids=7, **files), 1000)  # type: ignore[arg-type]
        size = tokenizer.vocab_size
        assert tokenizer.sentinels == [] and more.sentinels == [*range(size, size + 7)] and more.vocab_size == size + 7
        assert tokenizer.fingerprint() == more.fingerprint() and tokenizer.eod == more.eod
        special = {more.eod, more.cls, more.sep, more.mask, more.pad, more.bos, more.eos, *more.sentinels} - {None}
        assert sorted({*more.text_ids().tolist(), *special}) == [*range(size + 7)]
        assert not special & {*more.text_ids().tolist()}
        text = "12 3" if kind == "NullTokenizer" else "x = 1"
        ids = more.tokenize(text, add_special_tokens=False)
        assert ids and more.detokenize([*ids, *more.sentinels] if kind != "NullTokenizer" else ids) == text


def test_huggingface_special_tokens(huggingface_folder: Path, tmp_path: Path) -> None:
    """Sentinels and marks of the model's own are used; more sentinels than it has follow its vocabulary."""
    from tokenizers import Tokenizer, processors

    backend = Tokenizer.from_file(str(huggingface_folder / "tokenizer.json"))
    backend.add_special_tokens(["[CLS]", "[SEP]", "[MASK]", "<mine>", "<extra_id_1>", "<extra_id_0>"])
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 300), ("[SEP]", 301)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "pad_token": "<mine>"}))
    tokenizer = HuggingFaceTokenizer(str(tmp_path), vocab_extra_ids=1)
    assert (tokenizer.cls, tokenizer.sep, tokenizer.mask, tokenizer.pad) == (300, 301, 302, 303)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.eod) == (None, 299, 299)
    assert (tokenizer.sentinels, tokenizer.vocab_size) == ([305, 304], 306)
    assert HuggingFaceTokenizer(str(tmp_path), vocab_extra_ids=3).sentinels == [305, 304, 306]
    plain = tokenizer.tokenize("x = 1", add_special_tokens=False)
    assert tokenizer.tokenize("x = 1") == [300, *plain, 301]


def test_build_for_mock_data() -> None:
    assert build_tokenizer(DataConfig(mock_data=True)).vocab_size == 1024
    assert build_tokenizer(DataConfig(mock_data=True), 99).eod == 99


@pytest.mark.parametrize(
    ("settings", "vocab_size", "error", "message"),
    [
        ({}, None, ConfigError, "tokenizer_type .None. must be set"),
        ({"tokenizer_type": "NullTokenizer"}, None, ConfigError, "give --vocab-size"),
        ({"tokenizer_type": "Llama2Tokenizer"}, None, ConfigError, "give --tokenizer-model"),
        ({"tokenizer_type": "ByteTokenizer"}, 256, ConfigError, "must be at least 257"),
        ({"tokenizer_type": "BertWordPieceCase"}, None, ConfigError, "give --vocab-file"),
        ({"tokenizer_type": "GPT2BPETokenizer"}, None, ConfigError, "set --vocab-file"),
        ({"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "x"}, None, ConfigError, "set --merge-file"),
        ({"tokenizer_type": "Llama2Tokenizer", "vocab_file": "x"}, None, ConfigError, "give --tokenizer-model instead"),
        (
            {"tokenizer_type": "BertWordPieceCase", "vocab_file": "/no/file"},
            None,
            DataError,
            "/no/file does not exist: give a WordPiece",
        ),
        ({"tokenizer_type": "BertWordPieceCase", "vocab_file": __file__}, None, DataError, r"has no line \[UNK\]"),
        ({"tokenizer_type": "NoTokenizer", "tokenizer_model": "x"}, None, ConfigError, "NoTokenizer. is not known"),
        (
            {"tokenizer_type": "Llama2Tokenizer", "tokenizer_model": "/no/file"},
            None,
            DataError,
            "/no/file does not exist",
        ),
        (
            {"tokenizer_type": "Llama2Tokenizer", "tokenizer_model": __file__},
            None,
            DataError,
            "not a SentencePiece model",
        ),
        (
            {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "./gone"},
            None,
            DataError,
            "gone does not exist",
        ),
        (
            {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": __file__},
            None,
            DataError,
            "not a tokenizer.json",
        ),
    ],
)
def test_errors(settings: dict[str, object], vocab_size: int | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build_tokenizer(DataConfig(**settings), vocab_size)  # type: ignore[arg-type]
