"""Exported tokenizers give the ids of training, or say that they do not; checkpoints hold their tokenizer."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer as Backend
from tokenizers import normalizers

from megatron_lsh.config import DataConfig
from megatron_lsh.convert.tokenizer import compare_ids, export_tokenizer
from tests.data.conftest import TEXTS, gpt2_files, huggingface_folder, sentencepiece_model, vocab_file  # noqa: F401

SENTENCES = [line for text in TEXTS for line in text.splitlines()] + ["naïve café, 日本語 <s> </s> <unk> <0x0A>"] * 3


def write(folder: Path, data: DataConfig) -> str:
    """Export into `folder`; what is said of it."""
    exported = export_tokenizer(data)
    assert exported.missing is None and exported.tokenizer is not None
    folder.mkdir()
    for name, content in exported.files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    assert exported.ids["eos_token_id"] == exported.tokenizer.eod
    return compare_ids(exported.tokenizer, folder)


def train(path: Path, **settings: Any) -> DataConfig:
    model = io.BytesIO()
    facts: dict[str, Any] = {"vocab_size": 400, "byte_fallback": True, "normalization_rule_name": "identity"}
    facts |= {"hard_vocab_limit": False, "character_coverage": 1.0, "pad_id": 3, "minloglevel": 4} | settings
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(SENTENCES), model_writer=model, **facts)
    path.write_bytes(model.getvalue())
    return DataConfig(tokenizer_type="GPTSentencePieceTokenizer", tokenizer_model=str(path))


def settings_of_every_kind(files: dict[str, Any]) -> Iterator[DataConfig]:
    model, folder = str(files["sentencepiece"]), str(files["huggingface"])
    for kind in ("GPTSentencePieceTokenizer", "Llama2Tokenizer", "SentencePieceTokenizer"):
        yield DataConfig(tokenizer_type=kind, tokenizer_model=model)
    yield DataConfig(tokenizer_type="GPT2BPETokenizer", **files["gpt2"])
    yield DataConfig(tokenizer_type="BertWordPieceCase", vocab_file=str(files["vocab"]))
    yield DataConfig(tokenizer_type="BertWordPieceLowerCase", vocab_file=str(files["vocab"]), vocab_extra_ids=3)
    yield DataConfig(tokenizer_type="ByteTokenizer")
    yield DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=folder)
    yield DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=folder + "/tokenizer.json")


@pytest.fixture
def files(
    sentencepiece_model: Path,  # noqa: F811
    huggingface_folder: Path,  # noqa: F811
    gpt2_files: dict[str, str],  # noqa: F811
    vocab_file: Path,  # noqa: F811
) -> dict[str, Any]:
    kinds = {"sentencepiece": sentencepiece_model, "huggingface": huggingface_folder}
    return {**kinds, "gpt2": gpt2_files, "vocab": vocab_file}


def test_every_kind(files: dict[str, Any], tmp_path: Path) -> None:
    """Without a config.json; ids are compared with transformers' AutoTokenizer, if there is that package."""
    for number, data in enumerate(settings_of_every_kind(files)):
        assert write(tmp_path / str(number), data).startswith("verified: "), data


def test_settings_of_sentencepiece(tmp_path: Path) -> None:
    """Byte pairs and unigrams, with and without a first space, further spaces and bytes for unknown characters.

    Unigrams differ in texts that spell their special tokens, and only there (the first of these texts is shown).
    """
    for kind, prefix, strip, fallback in itertools.product(("bpe", "unigram", "char"), *[(True, False)] * 3):
        name = f"{kind}{prefix:d}{strip:d}{fallback:d}"
        data = train(
            tmp_path / f"{name}.model",
            model_type=kind,
            add_dummy_prefix=prefix,
            remove_extra_whitespaces=strip,
            byte_fallback=fallback and kind != "char",
            vocab_size=400 if fallback and kind != "char" else 120,
        )
        said = write(tmp_path / name, data)
        spelled = kind == "unigram" and re.search("for [12] of [0-9]+ difficult texts: '</s> <s> <unk> <pad>' is", said)
        assert said.startswith("verified: ") or spelled, name


def test_what_a_tokenizer_json_cannot_say_is_told(tmp_path: Path) -> None:
    """A space before the first of the user's own symbols; graphemes of which a part is normalized."""
    for number, settings in enumerate(({"user_defined_symbols": ["import"]}, {"normalization_rule_name": "nmt_nfkc"})):
        data = train(tmp_path / f"{number}.model", model_type="bpe", **settings)
        said = write(tmp_path / str(number), data)
        assert said.startswith("WARNING: tokenizer.json gives other ids than training used for "), said


@pytest.mark.parametrize("model_type", ["qwen3_moe", "olmoe", "llama", "mixtral", "mistral", "qwen2_moe", "qwen2"])
def test_whatever_the_architecture(model_type: str, files: dict[str, Any], tmp_path: Path) -> None:
    """Transformers takes the tokenizer of tokenizer.json, or, for one architecture, the warning says what to do."""
    transformers = pytest.importorskip("transformers")
    data = next(settings_of_every_kind(files))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    exported = export_tokenizer(data)
    tokenizer = exported.tokenizer
    assert tokenizer is not None
    for name, content in exported.files.items():
        assert isinstance(content, bytes)
        (tmp_path / name).write_bytes(content)
    said = compare_ids(tokenizer, tmp_path)
    if model_type == "qwen2":
        assert said.startswith("WARNING: AutoTokenizer ") and "PreTrainedTokenizerFast.from_pretrained" in said
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
        assert all(theirs(text).input_ids == tokenizer.tokenize(text) for text in TEXTS)
    else:
        assert said.startswith("verified: "), said


def test_a_tokenizer_of_another_class_keeps_its_ids(huggingface_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """Training takes tokenizer.json as it stands; transformers would build another one of the class that is named."""
    folder = tmp_path / "source"
    folder.mkdir()
    backend = Backend.from_file(str(huggingface_folder / "tokenizer.json"))
    backend.normalizer = normalizers.Replace("o", "0")
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "eos_token": "<|endoftext|>",
        "add_bos_token": True,
        "auto_map": ["x.Y"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{{ x }}")
    data = DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder))
    assert write(tmp_path / "hf", data).startswith("verified: ")
    assert (tmp_path / "hf/chat_template.jinja").exists()
    assert "auto_map" not in json.loads((tmp_path / "hf/tokenizer_config.json").read_text())


def test_none_where_there_is_none(tmp_path: Path) -> None:
    assert export_tokenizer(DataConfig()).missing is None
    null = export_tokenizer(DataConfig(tokenizer_type="NullTokenizer"))
    assert null.files == {} and null.missing is not None and null.ids["eos_token_id"] is None
    gone = DataConfig(tokenizer_type="GPTSentencePieceTokenizer", tokenizer_model=str(tmp_path / "gone.model"))
    assert "gone.model does not exist" in str(export_tokenizer(gone).missing)
