"""Tokenizers in Hugging Face's formats."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from megatron_lsh.data.tokenizers.huggingface_files import FilesBeside
from megatron_lsh.data.tokenizers.special_tokens import SpecialTokens, digest
from megatron_lsh.errors import DataError, first_line

# End-of-text tokens of well-known models, for a tokenizer.json that comes without the file that names its own.
USUAL_END_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|im_end|>", "[SEP]")
# Spellings of the other special tokens, looked for among the added tokens in the same case.
USUAL_TOKENS = {
    "cls": ("[CLS]", "<cls>"),
    "sep": ("[SEP]", "<sep>"),
    "mask": ("[MASK]", "<mask>"),
    "pad": ("[PAD]", "<pad>"),
    "bos": ("[BOS]", "<bos>"),
    "eos": ("[EOS]", "<eos>"),
}


class HuggingFaceTokenizer(SpecialTokens):
    """A tokenizer in Hugging Face's format.

    A ``tokenizer.json`` (the file, or a folder with one) is read by the ``tokenizers`` package. Any other folder, or a name
    on the hub, goes through ``transformers``. Special tokens that the tokenizer itself puts around
    a text (a leading <s>, say) are kept, as in Megatron, unless `tokenize` is told otherwise.
    """

    name = "HuggingFaceTokenizer"

    def __init__(self, model: str, vocab_extra_ids: int = 0) -> None:
        path = Path(model)
        self.folder = path if path.is_dir() else path.parent if path.is_file() else None
        """of its files; None for a name on the hub"""
        file = path / "tokenizer.json" if path.is_dir() else path
        if file.is_file():
            self._backend: _TokenizersBackend | _TransformersBackend = _TokenizersBackend(file)
        elif not path.is_dir() and (path.is_absolute() or model.startswith(".") or file.suffix == ".json"):
            raise DataError(f"--tokenizer-model {model} does not exist: give a tokenizer.json or a folder with one")
        else:
            self._backend = _TransformersBackend(model)
        self._size = self.vocab_size = self._backend.vocab_size
        self.eod = self._backend.eod
        for name in USUAL_TOKENS:
            setattr(self, name, self._backend.special(name))
        self._find_sentinels(self._backend.id_of, vocab_extra_ids)

    @property
    def backend(self) -> Tokenizer | None:
        """What does the work, with what the files beside it add; None where that is no ``tokenizers.Tokenizer``."""
        return self._backend.backend

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._backend.encode(text, add_special_tokens)

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._backend.decode([int(i) for i in ids if i < self._size])

    def fingerprint(self) -> str:
        return digest(self.name, self._backend.content(), self.eod)


class _TokenizersBackend:
    """tokenizer.json, with the tokens and options that the files beside it add, as ``transformers`` reads them."""

    def __init__(self, file: Path) -> None:
        try:
            self.backend = Tokenizer.from_file(str(file))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the Rust side raises plain Exception, or panics
            raise DataError(
                f"{file} is not a tokenizer.json ({error}): --tokenizer-type HuggingFaceTokenizer takes that "
                "file or its folder"
            ) from error
        self.backend.no_truncation()
        self.backend.no_padding()
        self._file = file
        self._beside = FilesBeside(file.parent)
        self._changes = self._beside.apply(self.backend)
        vocabulary = self.backend.get_vocab()
        self.vocab_size = 1 + max(vocabulary.values(), default=-1)  # ids may have gaps
        end = self._beside.named("eos_token") or self._beside.named("sep_token")
        candidates = [end] if end else [token for token in USUAL_END_TOKENS if token in vocabulary]
        if not candidates or candidates[0] not in vocabulary:
            raise DataError(
                f"{file} does not say which token ends a document{f' ({end} is not in it)' if end else ''}: put a "
                'tokenizer_config.json with an "eos_token" beside it'
            )
        self.eod: int = vocabulary[candidates[0]]
        self._added = {token.content: number for number, token in self.backend.get_added_tokens_decoder().items()}

    def id_of(self, token: str) -> int | None:
        found: int | None = self.backend.token_to_id(token)
        return found

    def special(self, name: str) -> int | None:
        """Id of the token that the files beside it name, or else of one that is usually called so."""
        named = self._beside.named(f"{name}_token")
        if named is not None:
            return self.id_of(named)
        return next((self._added[token] for token in USUAL_TOKENS[name] if token in self._added), None)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: list[int]) -> str:
        return str(self.backend.decode(ids))

    def content(self) -> str:
        content = hashlib.sha256(self._file.read_bytes()).hexdigest()
        return f"{content} {self._changes}" if self._changes else content


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
            self._backend = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        except Exception as error:
            raise DataError(
                f"--tokenizer-model {model} cannot be loaded by transformers ({first_line(error)}): give a "
                "folder with a tokenizer.json, or the name of a tokenizer that can be downloaded or is in the cache"
            ) from error
        self.vocab_size = 1 + max(self._backend.get_vocab().values())  # ids may have gaps
        eod = self._backend.eos_token_id if self._backend.eos_token_id is not None else self._backend.sep_token_id
        if eod is None:
            raise DataError(
                f"--tokenizer-model {model} has no eos_token, which ends a document: name one in its tokenizer_config.json"
            )
        self.eod = int(eod)
        self.backend: Tokenizer | None = getattr(self._backend, "backend_tokenizer", None)
        self._vocabulary: dict[str, int] = self._backend.get_vocab()

    def id_of(self, token: str) -> int | None:
        return self._vocabulary.get(token)

    def special(self, name: str) -> int | None:
        number = getattr(self._backend, f"{name}_token_id", None)
        return None if number is None else int(number)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self._backend(text, add_special_tokens=add_special_tokens).input_ids)

    def decode(self, ids: list[int]) -> str:
        return str(self._backend.decode(ids, skip_special_tokens=True))

    def content(self) -> str:
        return json.dumps(sorted(self._backend.get_vocab().items()))
