"""Tokens and options that files beside a tokenizer.json add: ids equal to those of transformers' AutoTokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from megatron_lsh.data.tokenizers.huggingface import HuggingFaceTokenizer
from megatron_lsh.errors import DataError

IM_START = {
    "content": "<|im_start|>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True,
}  # fmt: skip
CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
TEXTS = ["<|im_start|>hi", "a<tool> b <sep>! <extra>", "hello<|endoftext|> [PAD]x", "  <|im_start|>  <tool>!"]


def write(folder: Path, source: Path, **files: object) -> HuggingFaceTokenizer:
    """The fixture's tokenizer.json, beside it files by their name without .json."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    for name in ("tokenizer_config", "special_tokens_map", "added_tokens"):
        (folder / f"{name}.json").unlink(missing_ok=True)
        if name in files:
            (folder / f"{name}.json").write_text(json.dumps(files[name]))
    return HuggingFaceTokenizer(str(folder))


def test_tokens_of_the_files_beside(tmp_path: Path, huggingface_folder: Path) -> None:
    """The first token after the vocabulary of 300, wherever it is declared."""
    for files in (
        {"tokenizer_config": CONFIG | {"added_tokens_decoder": {"300": IM_START}}},
        {"tokenizer_config": CONFIG | {"additional_special_tokens": ["<|im_start|>"]}},
        {"tokenizer_config": CONFIG | {"extra_special_tokens": {"start_token": "<|im_start|>"}}},
        {"tokenizer_config": CONFIG | {"image_token": "<|im_start|>"}},
        {"tokenizer_config": CONFIG, "added_tokens": {"<|im_start|>": 300}},
        {"tokenizer_config": CONFIG, "special_tokens_map": {"pad_token": {**IM_START}}},
    ):
        tokenizer = write(tmp_path, huggingface_folder, **files)
        assert tokenizer.vocab_size == 301 and tokenizer.eod == 299
        assert tokenizer.tokenize("<|im_start|>a<|im_start|>")[::2] == [300, 300]
        plain = write(tmp_path, huggingface_folder, tokenizer_config=CONFIG)
        assert plain.vocab_size == 300 and 300 not in plain.tokenize("<|im_start|>")
        assert plain.fingerprint() != tokenizer.fingerprint()
    assert plain.fingerprint() == HuggingFaceTokenizer(str(huggingface_folder / "tokenizer.json")).fingerprint()


def test_an_end_token_that_is_new(tmp_path: Path, huggingface_folder: Path) -> None:
    tokenizer = write(tmp_path, huggingface_folder, tokenizer_config={"eos_token": "<new>", "pad_token": "<pad>"})
    assert (tokenizer.eod, tokenizer.eos, tokenizer.pad, tokenizer.vocab_size) == (300, 300, 301, 302)


def test_options_of_classes_that_are_built_anew(tmp_path: Path, huggingface_folder: Path) -> None:
    space = write(tmp_path, huggingface_folder, tokenizer_config=CONFIG | {"add_prefix_space": True})
    assert space.tokenize("def") != space.tokenize(" def")
    gpt2 = CONFIG | {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}
    assert (space := write(tmp_path, huggingface_folder, tokenizer_config=gpt2)).tokenize("def") == space.tokenize(
        " def"
    )
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "É": 1, "e": 2, "[SEP]": 3}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    (tmp_path / "source").mkdir()
    backend.save(str(tmp_path / "source" / "tokenizer.json"))
    bert = {"tokenizer_class": "BertTokenizer", "sep_token": "[SEP]"}
    assert write(tmp_path, tmp_path / "source", tokenizer_config=bert).tokenize("É") == [2]
    cased = write(tmp_path, tmp_path / "source", tokenizer_config=bert | {"do_lower_case": False})
    assert cased.tokenize("É") == [1]


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": []},
        {"tokenizer_config": {"eos_token": 5}},
        {"tokenizer_config": {"eos_token": {"content": ["x"]}}},
        {"tokenizer_config": CONFIG | {"added_tokens_decoder": [1]}},
        {"tokenizer_config": CONFIG | {"added_tokens_decoder": {"x": IM_START}}},
        {"tokenizer_config": CONFIG | {"added_tokens_decoder": {"300": 5}}},
        {"tokenizer_config": CONFIG | {"additional_special_tokens": [5]}},
        {"tokenizer_config": CONFIG, "added_tokens": {"<a>": "300"}},
        {"tokenizer_config": CONFIG, "special_tokens_map": "x"},
    ],
)
def test_damaged_files_beside(tmp_path: Path, huggingface_folder: Path, files: dict[str, object]) -> None:
    with pytest.raises(DataError, match=r"_config\.json|added_tokens\.json|special_tokens_map\.json"):
        write(tmp_path, huggingface_folder, **files)


@pytest.mark.parametrize("cases", [8, pytest.param(150, marks=pytest.mark.slow)])
def test_ids_equal_transformers(cases: int, tmp_path: Path, huggingface_folder: Path) -> None:
    """Random declarations in all three files."""
    transformers = pytest.importorskip("transformers")
    state = np.random.RandomState(0)
    words = ["<|im_start|>", "<tool>", "<sep>", "<extra>", "[PAD]", "!", "hello"]

    def token() -> Any:
        content = str(state.choice(words))
        if state.rand() < 0.5:
            return content
        flags = ("lstrip", "rstrip", "normalized", "single_word", "special")
        return {"content": content, **{flag: bool(state.rand() < 0.5) for flag in flags}}

    for _ in range(cases):
        config, names = dict[str, Any](CONFIG), dict[str, Any]()
        for target in (config, names):
            for name in ("pad_token", "unk_token", "bos_token", "image_token"):
                if state.rand() < 0.3:
                    target[name] = str(state.choice(words))
        if state.rand() < 0.4:
            config["additional_special_tokens"] = [str(state.choice(words)) for _ in range(state.randint(3))]
        files: dict[str, object] = {"tokenizer_config": config}
        if state.rand() < 0.4:
            made = [value for value in (token() for _ in range(3)) if isinstance(value, dict)]
            config["added_tokens_decoder"] = {str(300 + i): value for i, value in enumerate(made)}
        if state.rand() < 0.5:
            files["special_tokens_map"] = names
        if state.rand() < 0.5:
            added = [str(word) for word in state.choice(words[:5], size=2, replace=False)]
            files["added_tokens"] = {content: 300 + i for i, content in enumerate(added)}
        ours = write(tmp_path / "t", huggingface_folder, **files)
        theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "t"))
        assert ours.vocab_size == len(theirs), files
        for text in TEXTS:
            assert ours.tokenize(text) == theirs(text).input_ids, (files, text)
        for name in ("pad", "bos", "eos"):
            named = getattr(theirs, f"{name}_token_id")
            assert named is None or getattr(ours, name) == named, (files, name)
