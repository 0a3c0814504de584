"""Tokenizers: text to token ids and back.

The ids of the special tokens follow Megatron-LM's classes of the same name, so data tokenized there can be used here and
the reverse. One deliberate difference: text is only ever text. Megatron's SentencePieceTokenizer turns a literal
``<EOD>`` in a document into the end-of-document id; here it is spelled out like any other word.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_lsh.data.tokenizers.gpt2 import GPT2BPETokenizer
from megatron_lsh.data.tokenizers.huggingface import HuggingFaceTokenizer
from megatron_lsh.data.tokenizers.special_tokens import SpecialTokens, digest
from megatron_lsh.data.tokenizers.wordpiece import BertWordPieceTokenizer
from megatron_lsh.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megatron_lsh.config.data import DataConfig

WORDPIECE_TYPES = ("BertWordPieceLowerCase", "BertWordPieceCase")
MOCK_VOCAB_SIZE = 1023  # of --mock-data without --vocab-size; the NullTokenizer adds an end-of-document id


class Tokenizer(Protocol):
    """What the framework asks of a tokenizer.

    Attributes:
        name: value of --tokenizer-type.
        vocab_size, eod, cls, sep, mask, pad, bos, eos, sentinels: see `SpecialTokens`.
    """

    name: str
    vocab_size: int
    eod: int
    cls: int | None
    sep: int | None
    mask: int | None
    pad: int | None
    bos: int | None
    eos: int | None
    sentinels: Sequence[int]

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text.

        Args:
            add_special_tokens: whether to add the tokenizer's own special tokens around the text (most have none).
        """
        ...

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens give no text."""
        ...

    def text_ids(self) -> npt.NDArray[np.int64]:
        """All ids that are not special, ascending."""
        ...

    def continues_word(self) -> npt.NDArray[np.bool_] | None:
        """bool [vocab_size]: tokens that continue the word of the token before; None if that is not known."""
        ...

    def fingerprint(self) -> str:
        """Hash that differs whenever the same text could give other ids."""
        ...


class SentencePieceTokenizer(SpecialTokens):
    """A SentencePiece model with Megatron's special tokens after (unless already among) its own pieces.

    <CLS>, <SEP>, <EOD>, <MASK>, then <PAD>, <BOS>, <EOS> where the model has no such id, then the sentinels.
    """

    name = "SentencePieceTokenizer"

    def __init__(self, model_file: str, vocab_extra_ids: int = 0) -> None:
        self._model, self._ids, self._hash = _load_sentencepiece(model_file)
        self.cls, self.sep = self._special("<CLS>"), self._special("<SEP>")
        self.eod, self.mask = self._special("<EOD>"), self._special("<MASK>")
        self.pad = self._own_or_special(self._model.pad_id(), "<PAD>")
        self.bos = self._own_or_special(self._model.bos_id(), "<BOS>")
        self.eos = self._own_or_special(self._model.eos_id(), "<EOS>")
        self.vocab_size = len(self._ids)
        self._find_sentinels(self._ids.get, vocab_extra_ids)

    @property
    def content(self) -> bytes:
        """The model's file."""
        return bytes(self._model.serialized_model_proto())

    @property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the special tokens by name."""
        own, pieces = self._model, self._model.get_piece_size()
        named = {
            own.id_to_piece(number): number
            for number in (self.bos, self.eos, self.pad)
            if number is not None and number < pieces
        }
        added = {name: number for name, number in self._ids.items() if number >= pieces}
        return {**named, **{name: self._ids[name] for name in ("<CLS>", "<SEP>", "<EOD>", "<MASK>")}, **added}

    def _special(self, token: str) -> int:
        return self._ids.setdefault(token, len(self._ids))

    def _own_or_special(self, own: int, token: str) -> int:
        return own if own >= 0 else self._special(token)

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(self._model.encode(text))

    def detokenize(self, ids: Sequence[int]) -> str:
        return _decode_pieces(self._model, ids)

    def fingerprint(self) -> str:
        return digest(self.name, self._hash)


class GPTSentencePieceTokenizer(SpecialTokens):
    """A SentencePiece model as it is; a document ends with its end-of-sentence piece."""

    name = "GPTSentencePieceTokenizer"
    starts_with_bos = False

    def __init__(self, model_file: str, vocab_extra_ids: int = 0) -> None:
        self._model, pieces, self._hash = _load_sentencepiece(model_file)
        self.vocab_size = self._model.get_piece_size()
        model = self._model
        bos, eos, pad = (i if i >= 0 else None for i in (model.bos_id(), model.eos_id(), model.pad_id()))
        for name, value, use in (("eos", eos, True), ("bos", bos, self.starts_with_bos)):
            if use and value is None:
                raise DataError(
                    f"{model_file} has no {name} piece, which {self.name} needs: train the model with an {name}_id, or "
                    "use --tokenizer-type SentencePieceTokenizer, which adds its own special tokens"
                )
        self.bos, self.eos, self.pad, self.eod = bos, eos, pad, model.eos_id()
        self._find_sentinels(pieces.get, vocab_extra_ids)

    @property
    def content(self) -> bytes:
        """The model's file."""
        return bytes(self._model.serialized_model_proto())

    @property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the special tokens by name."""
        return {
            self._model.id_to_piece(number): number for number in (self.bos, self.eos, self.pad) if number is not None
        }

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = list(self._model.encode(text))
        return [self._model.bos_id(), *ids] if self.starts_with_bos and add_special_tokens else ids

    def detokenize(self, ids: Sequence[int]) -> str:
        return _decode_pieces(self._model, ids)

    def fingerprint(self) -> str:
        return digest(self.name, self._hash)


class Llama2Tokenizer(GPTSentencePieceTokenizer):
    """A SentencePiece model as it is; every text starts with its beginning-of-sentence piece."""

    name = "Llama2Tokenizer"
    starts_with_bos = True


class ByteTokenizer(SpecialTokens):
    """UTF-8 bytes as ids 0 to 255, and 256 for the end of a document."""

    name = "ByteTokenizer"

    def __init__(self, vocab_extra_ids: int = 0) -> None:
        self.vocab_size = 257
        self.eod = self.eos = 256
        self._find_sentinels(lambda _: None, vocab_extra_ids)

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode("utf-8"))

    def detokenize(self, ids: Sequence[int]) -> str:
        return bytes(int(i) for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")

    def fingerprint(self) -> str:
        return digest(self.name)


class NullTokenizer(SpecialTokens):
    """Input is ids, not text: decimal numbers. Id ``vocab_size`` (as given) ends a document.

    For models that need them, the six highest numbers stand for BERT's three marks, padding, beginning and end; the data of
    such a model should not contain them otherwise. (A vocabulary under 16 has none.)
    """

    name = "NullTokenizer"

    def __init__(self, vocab_size: int, vocab_extra_ids: int = 0) -> None:
        self.vocab_size = self._numbers = vocab_size + 1
        self.eod = vocab_size
        if vocab_size >= 16:
            self.cls, self.sep, self.mask, self.pad, self.bos, self.eos = range(vocab_size - 6, vocab_size)
        self._find_sentinels(lambda _: None, vocab_extra_ids)

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        try:
            ids = [int(word) for word in text.split()]
        except ValueError as error:
            raise DataError(
                f"NullTokenizer takes numbers separated by spaces ({error}): choose another --tokenizer-type"
            ) from error
        wrong = [i for i in ids if not 0 <= i < self._numbers]
        if wrong:
            raise DataError(
                f"token id {wrong[0]} must be in [0, {self._numbers}): raise --vocab-size or correct the text"
            )
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        return " ".join(str(int(i)) for i in ids)

    def fingerprint(self) -> str:
        return digest(self.name, self._numbers)


def build_tokenizer(data: DataConfig, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer that --tokenizer-type, --tokenizer-model, --vocab-file and --vocab-extra-ids describe.

    Args:
        vocab_size: --vocab-size. The NullTokenizer needs it; for the others it must not be below their own size.

    Raises:
        ConfigError: if the flags do not belong together.
        DataError: if the file is missing or cannot be used.
    """
    kind = data.tokenizer_type
    if kind is None and data.mock_data:
        kind, vocab_size = "NullTokenizer", MOCK_VOCAB_SIZE if vocab_size is None else vocab_size
    if kind is None:
        raise ConfigError("data.tokenizer_type (None) must be set: give --tokenizer-type, e.g. SentencePieceTokenizer")
    if kind == "NullTokenizer":
        if vocab_size is None:
            raise ConfigError(
                "model.vocab_size (None) must be set with --tokenizer-type NullTokenizer: give --vocab-size"
            )
        return NullTokenizer(vocab_size, data.vocab_extra_ids)
    tokenizer = _build_with_text(kind, data)
    if vocab_size is not None and vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size ({vocab_size}) must be at least {tokenizer.vocab_size}, the size of "
            f"{data.tokenizer_model or data.vocab_file or kind}: leave out --vocab-size"
        )
    return tokenizer


def _build_with_text(kind: str, data: DataConfig) -> Tokenizer:
    extra = data.vocab_extra_ids
    if kind == "ByteTokenizer":
        return ByteTokenizer(extra)
    if kind in WORDPIECE_TYPES:
        if data.vocab_file is None:
            raise ConfigError(f"data.vocab_file (None) must be set with --tokenizer-type {kind}: give --vocab-file")
        return BertWordPieceTokenizer(data.vocab_file, kind == "BertWordPieceLowerCase", extra)
    if kind == "GPT2BPETokenizer":
        for name in ("vocab_file", "merge_file"):
            if getattr(data, name) is None:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"data.{name} (absent) must be given with --tokenizer-type {kind}: set {flag}")
        return GPT2BPETokenizer(str(data.vocab_file), str(data.merge_file), extra)
    if data.vocab_file is not None:
        raise ConfigError(
            f"data.vocab_file ({data.vocab_file}) belongs to {' and '.join(WORDPIECE_TYPES)} and GPT2BPETokenizer, not to "
            f"{kind}: give --tokenizer-model instead"
        )
    model = data.tokenizer_model
    if model is None:
        raise ConfigError(
            f"data.tokenizer_model (None) must be set with --tokenizer-type {kind}: give --tokenizer-model"
        )
    if kind == "SentencePieceTokenizer":
        return SentencePieceTokenizer(model, extra)
    if kind == "GPTSentencePieceTokenizer":
        return GPTSentencePieceTokenizer(model, extra)
    if kind == "Llama2Tokenizer":
        return Llama2Tokenizer(model, extra)
    if kind == "HuggingFaceTokenizer":
        return HuggingFaceTokenizer(model, extra)
    raise ConfigError(f"data.tokenizer_type ({kind}) is not known: see --help for the kinds there are")


def _load_sentencepiece(model_file: str) -> tuple[Any, dict[str, int], str]:
    """The processor, the id of each piece, and a hash of the file."""
    import sentencepiece

    if not os.path.isfile(model_file):
        raise DataError(
            f"--tokenizer-model {model_file} does not exist: give a SentencePiece .model file (a tokenizer.json needs "
            "--tokenizer-type HuggingFaceTokenizer)"
        )
    processor = sentencepiece.SentencePieceProcessor()
    try:
        content = Path(model_file).read_bytes()
        processor.LoadFromSerializedProto(content)
        pieces = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    except (OSError, RuntimeError, UnicodeDecodeError) as error:
        raise DataError(_not_sentencepiece(model_file)) from error
    if not pieces:
        raise DataError(_not_sentencepiece(model_file))
    return processor, pieces, hashlib.sha256(content).hexdigest()


def _not_sentencepiece(model_file: str) -> str:
    return (
        f"--tokenizer-model {model_file} is not a SentencePiece model: give a .model file (a tokenizer.json needs "
        "--tokenizer-type HuggingFaceTokenizer)"
    )


def _decode_pieces(model: Any, ids: Sequence[int]) -> str:
    """Text of the ids that are the model's own."""
    pieces = model.get_piece_size()
    return str(model.decode([int(i) for i in ids if i < pieces]))
