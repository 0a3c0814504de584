"""The tokenizer of a training run, as files that transformers reads, to go with an exported model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from megatron_lsh.config import DataConfig
from megatron_lsh.convert import sentencepiece
from megatron_lsh.convert.files import read_json
from megatron_lsh.data.tokenizers import (
    BertWordPieceTokenizer,
    ByteTokenizer,
    GPT2BPETokenizer,
    GPTSentencePieceTokenizer,
    HuggingFaceTokenizer,
    NullTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    build_tokenizer,
)
from megatron_lsh.errors import MegatronLSHError

CONFIG, CONTENT = "tokenizer_config.json", "tokenizer.json"
# With this class transformers takes tokenizer.json as it stands; by others, or by none, it builds the tokenizer of the
# model's architecture anew from the vocabulary, with another normalizer.
_CLASS = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
# What of a tokenizer_config.json has its effect in tokenizer.json already, or would have one that training did not see.
_APPLIED = (
    "add_bos_token", "add_eos_token", "add_prefix_space", "auto_map", "do_lower_case", "legacy", "split_special_tokens",
    "strip_accents", "tokenize_chinese_chars", "tokenizer_file",
)  # fmt: skip
_ALONG = ("special_tokens_map", "chat_template")  # beginnings of the names of files that go along as they are
_TOKENS = ("bos", "eos", "pad")


@dataclass(frozen=True)
class ExportedTokenizer:
    """What an exported model says about its tokenizer.

    Attributes:
        files: file name -> content. Empty if there is none.
        ids: ids of special tokens as in config.json. None says that there is no such token, where a missing entry would
            leave transformers with a default.
        tokenizer: the one that training used.
        missing: why there are no files.
    """

    files: dict[str, Path | bytes] = field(default_factory=dict)
    ids: dict[str, Any] = field(default_factory=lambda: {f"{token}_token_id": None for token in _TOKENS})
    tokenizer: Tokenizer | None = None
    missing: str | None = None


def export_tokenizer(data: DataConfig) -> ExportedTokenizer:
    """The tokenizer that the settings of a run describe, as a tokenizer.json that gives the same ids, if there is one."""
    if data.tokenizer_type is None:
        return ExportedTokenizer()
    if data.tokenizer_type == NullTokenizer.name:
        return ExportedTokenizer(missing="a NullTokenizer reads no text")
    try:
        tokenizer = build_tokenizer(data)
        backend, config = _backend(tokenizer)
    except MegatronLSHError as error:
        return ExportedTokenizer(missing=str(error))
    if backend is None:
        return ExportedTokenizer(missing=f"no tokenizer.json can give the ids of this {tokenizer.name}")
    ids = {"eos": tokenizer.eod, "bos": tokenizer.bos, "pad": tokenizer.pad}
    names = {f"{token}_token": backend.id_to_token(number) for token, number in ids.items() if number is not None}
    document = {**_CLASS, **names, **config, "eos_token": names["eos_token"]}
    files = _further_files(data) if isinstance(tokenizer, HuggingFaceTokenizer) else {}
    if isinstance(tokenizer, SentencePieceTokenizer | GPTSentencePieceTokenizer):
        files["tokenizer.model"] = tokenizer.content  # for other software; transformers prefers tokenizer.json
    files |= {CONTENT: backend.to_str(pretty=True).encode(), CONFIG: (json.dumps(document, indent=2) + "\n").encode()}
    return ExportedTokenizer(files, {f"{token}_token_id": number for token, number in ids.items()}, tokenizer)


def _backend(tokenizer: Tokenizer) -> tuple[Backend | None, dict[str, Any]]:
    """A tokenizer of the library ``tokenizers`` with the same ids, and what else tokenizer_config.json has to say.

    None if its ids cannot be had.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.backend, _config_beside(tokenizer.folder)
    if isinstance(tokenizer, GPT2BPETokenizer):
        return tokenizer.backend, {}
    # The others take a text that spells a special token as the text that it is.
    config: dict[str, Any] = {"split_special_tokens": True}
    if isinstance(tokenizer, SentencePieceTokenizer | GPTSentencePieceTokenizer):
        backend = sentencepiece.tokenizer_of(tokenizer.content)
        return _with_special(backend, tokenizer, tokenizer.special_tokens), config
    if isinstance(tokenizer, BertWordPieceTokenizer):
        return _with_special(Backend.from_str(tokenizer.backend.to_str()), tokenizer, tokenizer.special_tokens), config
    assert isinstance(tokenizer, ByteTokenizer)
    return _with_special(_bytes(), tokenizer, {"<|endoftext|>": tokenizer.eod}), config


def _bytes() -> Backend:
    """Bytes as their own ids."""
    letters = {_letter(byte): byte for byte in range(256)}
    backend = Backend(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _letter(byte: int) -> str:
    """How byte-level tokenizers write a byte: itself if it is a visible character of Latin-1, else one behind those."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [number for number in range(256) if number not in visible]
    return chr(byte) if byte in visible else chr(256 + hidden.index(byte))


def _with_special(backend: Backend, tokenizer: Tokenizer, special: dict[str, int]) -> Backend | None:
    """With tokens by their names and ids, and the beginning that the tokenizer puts before a text; None if ids differ."""
    for token in sorted(special, key=special.__getitem__):
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        if backend.token_to_id(token) != special[token]:
            return None
    if getattr(tokenizer, "starts_with_bos", False) and tokenizer.bos is not None:
        begin = backend.id_to_token(tokenizer.bos)
        backend.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, tokenizer.bos)]
        )
    return backend


def _config_beside(folder: Path | None) -> dict[str, Any]:
    path = folder / CONFIG if folder is not None else None
    if path is None or not path.is_file():
        return {}
    return {name: value for name, value in read_json(path).items() if name not in _APPLIED} | _CLASS


def _further_files(data: DataConfig) -> dict[str, Path | bytes]:
    model = Path(data.tokenizer_model or "")
    folder = model if model.is_dir() else model.parent
    there = sorted(folder.iterdir()) if model.exists() else []
    return {path.name: path for path in there if path.name.startswith(_ALONG) and path.is_file()}


def compare_ids(tokenizer: Tokenizer, folder: Path) -> str:
    """One line: whether the tokenizer in a folder gives the ids that training used, by tokenizer.json and transformers."""
    texts = [*_TEXTS, *_pieces(tokenizer)]
    own = Backend.from_file(str(folder / CONTENT))
    own.encode_special_tokens = bool(read_json(folder / CONFIG).get("split_special_tokens"))
    found = _differing(tokenizer, texts, lambda text: list(own.encode(text).ids))
    if found:
        return (
            f"WARNING: tokenizer.json gives other ids than training used for {len(found)} of {len(texts)} difficult texts: "
            f"{_first(found)}. Its format cannot say what this {tokenizer.name} does there: where such texts matter, "
            "tokenize as in training"
        )
    theirs = _automatic(folder)
    if theirs is None:
        return f"verified: tokenizer.json gives the ids of training for {len(texts)} texts"
    found = _differing(tokenizer, texts, theirs)
    if found:
        return (
            f"WARNING: AutoTokenizer of transformers gives other ids than training used for {len(found)} of {len(texts)} "
            f"texts: {_first(found)}. Read it with transformers.PreTrainedTokenizerFast.from_pretrained, whose ids are equal"
        )
    return f"verified: the tokenizer gives the ids of training in transformers, too, for {len(texts)} texts"


def _differing(
    tokenizer: Tokenizer, texts: Iterable[str], theirs: Callable[[str], list[int]]
) -> list[tuple[str, list[int], list[int]]]:
    pairs = ((text, tokenizer.tokenize(text), theirs(text)) for text in texts)
    return [(text, ours, other) for text, ours, other in pairs if ours != other]


def _first(found: Sequence[tuple[str, list[int], list[int]]]) -> str:
    text, ours, theirs = found[0]
    return f"{text!r} is {theirs!s:.60}, and was {ours!s:.60}"


def _automatic(folder: Path) -> Callable[[str], list[int]] | None:
    """How transformers' AutoTokenizer reads a text; None without that package. Runs no code of the folder."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        return None
    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    return lambda text: list(tokenizer(text).input_ids)


def _pieces(tokenizer: Tokenizer) -> list[str]:
    """Texts of single tokens, from all over the vocabulary, alone and behind a word."""
    step = max(tokenizer.vocab_size // 200, 1)
    pieces = [tokenizer.detokenize([number]) for number in tokenizer.text_ids()[::step].tolist()]
    return [text for piece in pieces if "\ufffd" not in piece for text in (piece, f"a{piece}{piece} b")]


# Ordinary ones first: the first that differs is shown.
_TEXTS = (
    "Hello world", "The quick brown fox, 12345 times.", "def main(argv):\n    return x + 1  # add one\n\n\n",
    "import numpy", "a  b\nc", " leading", "trailing ", "two  spaces   three", "\ttab\tand\r\nline ends\r", "   ", "\n\n",
    "it's we'll I'M", "", "UPPER lower Ünïcödé", "naïve café œuvre straße", "日本語のテキスト", "中文 English 混合",
    "한국어", "हिन्दी", "العربية", "русский текст", "ﬁne ﬀ ½ ① ™ \uff12\uff10", "e\u0301 日\u0301 ﬁ\u0301",
    "a\u00a0b\u3000c\u200be", "😀 👩\u200d💻 🇩🇪", "\u2581a \u2581\u2581b", "x = [[1, 2], {'k': \"v\"}]", "https://example.org/a?b=c&d=%20",
    "0 00 000 1000000", "aaaaaaaaaaaaaaaaaaaaa", "((((((((((", "                 deep indent", "-------- ======== ........",
    "</s> <s> <unk> <pad>", "<|endoftext|> [SEP] [CLS] [MASK]", "<0x0A> <EOD> <extra_id_0>", "\x00\x01\x7f",
    "a\ufeffb", "\u0130 \u1e9e", "x" * 300,
)  # fmt: skip
