"""Documents to token ids: what a worker process of `preprocess` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from megatron_lsh.config.data import DataConfig
from megatron_lsh.data.indexed import token_dtype
from megatron_lsh.data.preparation.sentences import SentenceSplitter
from megatron_lsh.data.preparation.sources import Chunk
from megatron_lsh.data.preparation.text_lines import encodable
from megatron_lsh.data.tokenizers import Tokenizer, build_tokenizer
from megatron_lsh.errors import DataError, MegatronLSHError


@dataclass(frozen=True)
class EncodedColumn:
    """Tokens of some documents, for one key: flat ids, tokens per sequence, sequences per document."""

    tokens: np.ndarray
    lengths: np.ndarray
    sequences: np.ndarray


@dataclass(frozen=True)
class EncodedChunk:
    """A tokenized `Chunk`; documents without any token are left out and counted."""

    columns: dict[str, EncodedColumn]
    documents: int
    empty: int
    size: int
    position: int


class Encoder:
    """Tokenizes chunks.

    Args:
        keys: which values of a document to tokenize.
        append_eod: end every document with the tokenizer's ``eod``.
        splitter: cuts documents into sentences, each a sequence of its own; None keeps them whole. A document that is
            a list of texts counts as cut already.
    """

    def __init__(
        self, tokenizer: Tokenizer, keys: Sequence[str], append_eod: bool, splitter: SentenceSplitter | None = None
    ) -> None:
        self.tokenizer, self.keys, self.append_eod, self.splitter = tokenizer, keys, append_eod, splitter
        self.dtype = token_dtype(tokenizer.vocab_size)

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """Tokens of a chunk.

        Raises:
            DataError: if a key is missing or its value is no text.
        """
        columns: dict[str, tuple[list[int], list[int], list[int]]] = {key: ([], [], []) for key in self.keys}
        documents = empty = 0
        for where, record in chunk.parsed():
            documents += 1
            for key, (tokens, lengths, sequences) in columns.items():
                parts = self._sequences(record, key, where)
                if not parts:
                    empty += 1
                    continue
                if self.append_eod and parts[-1][-1] != self.tokenizer.eod:  # some tokenizers end texts by themselves
                    parts[-1].append(self.tokenizer.eod)
                for ids in parts:
                    tokens.extend(ids)
                    lengths.append(len(ids))
                sequences.append(len(parts))
        arrays = {
            key: EncodedColumn(np.array(t, dtype=self.dtype), np.array(n, dtype=np.int64), np.array(s, dtype=np.int64))
            for key, (t, n, s) in columns.items()
        }
        return EncodedChunk(arrays, documents, empty, chunk.size, chunk.position)

    def _sequences(self, record: dict[str, Any], key: str, where: str) -> list[list[int]]:
        """Token ids of the texts or sentences of a document, those without any left out."""
        texts = [encodable(text) for text in _texts(record, key, where)]
        try:
            if self.splitter is not None and not isinstance(record[key], list):
                texts = [sentence for text in texts for sentence in self.splitter.split(text)]
            # A mark that a tokenizer puts at the beginning of a text has no place at the beginning of every sentence.
            marks = self.splitter is None
            return [ids for text in texts if (ids := self.tokenizer.tokenize(text, add_special_tokens=marks))]
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except MegatronLSHError as error:
            raise DataError(f"{where}: {error}") from error
        except BaseException as error:  # a panic of the Rust code behind both is no Exception
            step = "tokenized" if self.splitter is None else "split into sentences and tokenized"
            raise DataError(
                f"{where}: the value of {key} cannot be {step} ({type(error).__name__}: {error}): correct or remove it"
            ) from error


def _texts(record: dict[str, Any], key: str, where: str) -> list[str]:
    """The text, or texts if it is already split into sentences, under a key."""
    if key not in record:
        raise DataError(f"{where} has no key {key}, only {', '.join(record)}: choose with --json-keys")
    value = record[key]
    if value is None:
        return []
    texts = value if isinstance(value, list) else [value]
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong:
        raise DataError(
            f"{where}: the value of {key} is a {type(wrong[0]).__name__}, it must be text: choose another of --json-keys"
        )
    return texts


@dataclass(frozen=True)
class EncoderSettings:
    """What a worker process needs to make its own `Encoder`."""

    tokenizer_type: str
    tokenizer_model: str | None
    vocab_file: str | None
    merge_file: str | None
    vocab_size: int | None
    vocab_extra_ids: int
    keys: tuple[str, ...]
    append_eod: bool
    split_sentences: bool
    sentence_unit: str
    lang: str
    keep_newlines: bool


@lru_cache(maxsize=1)
def make_encoder(settings: EncoderSettings) -> Encoder:
    """The encoder for these settings; made once per process."""
    data = DataConfig(
        tokenizer_type=settings.tokenizer_type,
        tokenizer_model=settings.tokenizer_model,
        vocab_file=settings.vocab_file,
        merge_file=settings.merge_file,
        vocab_extra_ids=settings.vocab_extra_ids,
    )
    splitter = None
    if settings.split_sentences:
        splitter = SentenceSplitter(settings.sentence_unit, settings.lang, settings.keep_newlines)
    return Encoder(build_tokenizer(data, settings.vocab_size), settings.keys, settings.append_eod, splitter)
