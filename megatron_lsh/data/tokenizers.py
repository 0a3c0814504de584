"""Tokenizers: text to token ids and back.

The ids of the special tokens follow Megatron-LM's classes of the same name, so data tokenized there can be used here and
the reverse. One deliberate difference: text is only ever text. Megatron's SentencePieceTokenizer turns a literal
``<EOD>`` in a document into the end-of-document id; here it is spelled out like any other word.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_lsh.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megatron_lsh.config.run import DataConfig

# End-of-text tokens of well-known models, for a tokenizer.json that comes without the file that names its own.
USUAL_END_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|im_end|>", "[SEP]")
MOCK_VOCAB_SIZE = 1023  # of --mock-data without --vocab-size; the NullTokenizer adds an end-of-document id


class Tokenizer(Protocol):
    """What the framework asks of a tokenizer.

    Attributes:
        name: value of --tokenizer-type.
        vocab_size: number of ids, special ones included (before padding for the embedding).
        eod: id that ends a document.
        pad: id for padding, or None if there is none.
    """

    name: str
    vocab_size: int
    eod: int
    pad: int | None

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text."""
        ...

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens give no text."""
        ...

    def fingerprint(self) -> str:
        """Hash that differs whenever the same text could give other ids."""
        ...


class SentencePieceTokenizer:
    """A SentencePiece model with Megatron's special tokens after (unless already among) its own pieces.

    <CLS>, <SEP>, <EOD>, <MASK>, then <PAD>, <BOS>, <EOS> where the model has no such id, then the extra ids.
    """

    name = "SentencePieceTokenizer"

    def __init__(self, model_file: str, vocab_extra_ids: int = 0) -> None:
        self._model, self._hash = _load_sentencepiece(model_file)
        self._ids = {self._model.id_to_piece(i): i for i in range(self._model.get_piece_size())}
        for token in ("<CLS>", "<SEP>", "<EOD>", "<MASK>"):
            self._special(token)
        self.pad: int | None = self._own_or_special(self._model.pad_id(), "<PAD>")
        self.bos = self._own_or_special(self._model.bos_id(), "<BOS>")
        self.eos = self._own_or_special(self._model.eos_id(), "<EOS>")
        self.extra_ids = [self._special(f"<extra_id_{i}>") for i in range(vocab_extra_ids)]
        self.eod = self._ids["<EOD>"]
        self.vocab_size = len(self._ids)

    def _special(self, token: str) -> int:
        return self._ids.setdefault(token, len(self._ids))

    def _own_or_special(self, own: int, token: str) -> int:
        return own if own >= 0 else self._special(token)

    def tokenize(self, text: str) -> list[int]:
        return list(self._model.encode(text))

    def detokenize(self, ids: Sequence[int]) -> str:
        pieces = self._model.get_piece_size()
        return str(self._model.decode([int(i) for i in ids if i < pieces]))

    def fingerprint(self) -> str:
        return _digest(self.name, self._hash)


class GPTSentencePieceTokenizer:
    """A SentencePiece model as it is; a document ends with its end-of-sentence piece."""

    name = "GPTSentencePieceTokenizer"
    starts_with_bos = False

    def __init__(self, model_file: str) -> None:
        self._model, self._hash = _load_sentencepiece(model_file)
        self.vocab_size: int = self._model.get_piece_size()
        self.bos: int = self._model.bos_id()
        self.eod: int = self._model.eos_id()
        self.pad: int | None = self._model.pad_id() if self._model.pad_id() >= 0 else None
        for name, value, use in (("eos", self.eod, True), ("bos", self.bos, self.starts_with_bos)):
            if use and value < 0:
                raise DataError(
                    f"{model_file} has no {name} piece, which {self.name} needs: train the model with an {name}_id, or "
                    "use --tokenizer-type SentencePieceTokenizer, which adds its own special tokens"
                )

    def tokenize(self, text: str) -> list[int]:
        ids = list(self._model.encode(text))
        return [self.bos, *ids] if self.starts_with_bos else ids

    def detokenize(self, ids: Sequence[int]) -> str:
        return str(self._model.decode([int(i) for i in ids if i < self.vocab_size]))

    def fingerprint(self) -> str:
        return _digest(self.name, self._hash)


class Llama2Tokenizer(GPTSentencePieceTokenizer):
    """A SentencePiece model as it is; every text starts with its beginning-of-sentence piece."""

    name = "Llama2Tokenizer"
    starts_with_bos = True


class HuggingFaceTokenizer:
    """A tokenizer in Hugging Face's format.

    A ``tokenizer.json`` (the file, or a folder with one) is taken as it stands by the ``tokenizers`` package. Any other
    folder, or a name on the hub, goes through ``transformers``. Special tokens that the tokenizer itself puts around
    a text (a leading <s>, say) are kept, as in Megatron.
    """

    name = "HuggingFaceTokenizer"

    def __init__(self, model: str) -> None:
        path = Path(model)
        file = path / "tokenizer.json" if path.is_dir() else path
        if file.is_file():
            self._backend: _TokenizersBackend | _TransformersBackend = _TokenizersBackend(file)
        elif not path.is_dir() and (path.is_absolute() or model.startswith(".") or file.suffix == ".json"):
            raise DataError(f"--tokenizer-model {model} does not exist: give a tokenizer.json or a folder with one")
        else:
            self._backend = _TransformersBackend(model)
        self.vocab_size = self._backend.vocab_size
        self.eod = self._backend.eod
        self.pad = self._backend.pad

    def tokenize(self, text: str) -> list[int]:
        return self._backend.encode(text)

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._backend.decode([int(i) for i in ids if i < self.vocab_size])

    def fingerprint(self) -> str:
        return _digest(self.name, self._backend.content(), self.eod)


class _TokenizersBackend:
    """tokenizer.json; the files beside it say which token ends a text."""

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            self._backend = Backend.from_file(str(file))
        except Exception as error:  # the Rust side raises plain Exception
            raise DataError(
                f"{file} is not a tokenizer.json ({error}): --tokenizer-type HuggingFaceTokenizer takes that "
                "file or its folder"
            ) from error
        self._backend.no_truncation()
        self._backend.no_padding()
        self._file = file
        self.vocab_size = 1 + max(self._backend.get_vocab().values())  # ids may have gaps
        end = self._named_token(file.parent, "eos_token") or self._named_token(file.parent, "sep_token")
        candidates = (
            [end] if end else [token for token in USUAL_END_TOKENS if self._backend.token_to_id(token) is not None]
        )
        eod = self._backend.token_to_id(candidates[0]) if candidates else None
        if eod is None:
            raise DataError(
                f"{file} does not say which token ends a document{f' ({end} is not in it)' if end else ''}: put a "
                'tokenizer_config.json with an "eos_token" beside it'
            )
        self.eod: int = eod
        pad = self._named_token(file.parent, "pad_token")
        self.pad: int | None = self._backend.token_to_id(pad) if pad else None

    @staticmethod
    def _named_token(folder: Path, key: str) -> str | None:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            path = folder / name
            if not path.is_file():
                continue
            try:
                value: Any = json.loads(path.read_text(encoding="utf-8")).get(key)
            except (ValueError, AttributeError) as error:
                raise DataError(f"{path} is not a JSON object ({error}): copy the tokenizer's folder again") from error
            if isinstance(value, dict):
                value = value.get("content")
            if value:
                return str(value)
        return None

    def encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text).ids)

    def decode(self, ids: list[int]) -> str:
        return str(self._backend.decode(ids))

    def content(self) -> str:
        return hashlib.sha256(self._file.read_bytes()).hexdigest()


class _TransformersBackend:
    """Whatever ``transformers.AutoTokenizer`` finds."""

    def __init__(self, model: str) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise DataError(
                f"--tokenizer-model {model} has no tokenizer.json, and the package transformers, which reads other "
                "formats, is not installed: pip install transformers, or give a folder with a tokenizer.json"
            ) from error
        try:
            self._backend = AutoTokenizer.from_pretrained(model)
        except Exception as error:
            raise DataError(
                f"--tokenizer-model {model} cannot be loaded by transformers ({str(error).splitlines()[0]}): give a "
                "folder with a tokenizer.json, or the name of a tokenizer that can be downloaded or is in the cache"
            ) from error
        self.vocab_size = 1 + max(self._backend.get_vocab().values())  # ids may have gaps
        eod = self._backend.eos_token_id if self._backend.eos_token_id is not None else self._backend.sep_token_id
        if eod is None:
            raise DataError(
                f"--tokenizer-model {model} has no eos_token, which ends a document: name one in its tokenizer_config.json"
            )
        self.eod = int(eod)
        self.pad: int | None = self._backend.pad_token_id

    def encode(self, text: str) -> list[int]:
        return list(self._backend(text).input_ids)

    def decode(self, ids: list[int]) -> str:
        return str(self._backend.decode(ids, skip_special_tokens=True))

    def content(self) -> str:
        return json.dumps(sorted(self._backend.get_vocab().items()))


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 for the end of a document."""

    name = "ByteTokenizer"
    vocab_size = 257
    eod = 256
    pad: int | None = None

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def detokenize(self, ids: Sequence[int]) -> str:
        return bytes(int(i) for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")

    def fingerprint(self) -> str:
        return _digest(self.name)


class NullTokenizer:
    """No text at all: ids written as decimal numbers. Id ``vocab_size`` (as given) ends a document."""

    name = "NullTokenizer"
    pad: int | None = None

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size + 1
        self.eod = vocab_size

    def tokenize(self, text: str) -> list[int]:
        try:
            ids = [int(word) for word in text.split()]
        except ValueError as error:
            raise DataError(
                f"NullTokenizer takes numbers separated by spaces ({error}): choose another --tokenizer-type"
            ) from error
        wrong = [i for i in ids if not 0 <= i < self.vocab_size]
        if wrong:
            raise DataError(
                f"token id {wrong[0]} must be in [0, {self.vocab_size}): raise --vocab-size or correct the text"
            )
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        return " ".join(str(int(i)) for i in ids)

    def fingerprint(self) -> str:
        return _digest(self.name, self.vocab_size)


def build_tokenizer(data: DataConfig, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer that --tokenizer-type and --tokenizer-model describe.

    Args:
        vocab_size: --vocab-size. The NullTokenizer needs it; for the others it must not be below their own size.

    Raises:
        ConfigError: if the flags do not belong together.
        DataError: if the file is missing or cannot be used.
    """
    kind, model = data.tokenizer_type, data.tokenizer_model
    if kind is None and data.mock_data:
        kind, vocab_size = "NullTokenizer", MOCK_VOCAB_SIZE if vocab_size is None else vocab_size
    if kind is None:
        raise ConfigError("data.tokenizer_type (None) must be set: give --tokenizer-type, e.g. SentencePieceTokenizer")
    if data.vocab_extra_ids and kind != "SentencePieceTokenizer":
        raise ConfigError(
            f"data.vocab_extra_ids ({data.vocab_extra_ids}) needs data.tokenizer_type SentencePieceTokenizer, not {kind}: "
            "leave out --vocab-extra-ids"
        )
    if kind == "NullTokenizer":
        if vocab_size is None:
            raise ConfigError(
                "model.vocab_size (None) must be set with --tokenizer-type NullTokenizer: give --vocab-size"
            )
        return NullTokenizer(vocab_size)
    tokenizer = _build_with_text(kind, model, data.vocab_extra_ids)
    if vocab_size is not None and vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size ({vocab_size}) must be at least {tokenizer.vocab_size}, the size of {model or kind}: "
            "leave out --vocab-size"
        )
    return tokenizer


def _build_with_text(kind: str, model: str | None, vocab_extra_ids: int) -> Tokenizer:
    if kind == "ByteTokenizer":
        return ByteTokenizer()
    if model is None:
        raise ConfigError(
            f"data.tokenizer_model (None) must be set with --tokenizer-type {kind}: give --tokenizer-model"
        )
    if kind == "SentencePieceTokenizer":
        return SentencePieceTokenizer(model, vocab_extra_ids)
    if kind == "GPTSentencePieceTokenizer":
        return GPTSentencePieceTokenizer(model)
    if kind == "Llama2Tokenizer":
        return Llama2Tokenizer(model)
    if kind == "HuggingFaceTokenizer":
        return HuggingFaceTokenizer(model)
    raise ConfigError(f"data.tokenizer_type ({kind}) is not known: see --help for the kinds there are")


def _load_sentencepiece(model_file: str) -> tuple[Any, str]:
    """The processor and a hash of its file."""
    import sentencepiece

    if not os.path.isfile(model_file):
        raise DataError(
            f"--tokenizer-model {model_file} does not exist: give a SentencePiece .model file (a tokenizer.json needs "
            "--tokenizer-type HuggingFaceTokenizer)"
        )
    content = Path(model_file).read_bytes()
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
        pieces = processor.get_piece_size()
    except RuntimeError as error:
        raise DataError(_not_sentencepiece(model_file)) from error
    if pieces == 0:
        raise DataError(_not_sentencepiece(model_file))
    return processor, hashlib.sha256(content).hexdigest()


def _not_sentencepiece(model_file: str) -> str:
    return (
        f"--tokenizer-model {model_file} is not a SentencePiece model: give a .model file (a tokenizer.json needs "
        "--tokenizer-type HuggingFaceTokenizer)"
    )


def _digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(str(part) for part in parts).encode()).hexdigest()
