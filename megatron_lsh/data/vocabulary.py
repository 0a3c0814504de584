"""Does a dataset fit the tokenizer of the run?

`tools/preprocess_data.py` leaves ``PREFIX.json`` beside the two files: which tokenizer wrote them. With it a wrong
tokenizer is found even if all ids happen to be in range. Files of other origin are scanned for their highest id.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lsh.data.cache import ArrayCache, cache_key
from megatron_lsh.data.indexed import IndexedDataset, bin_path
from megatron_lsh.data.tokenizers import Tokenizer
from megatron_lsh.errors import DataError

SCAN_BLOCKS, SCAN_TOKENS = 512, 1 << 19  # at most 2^28 tokens are read, evenly spaced in a larger file


def description_path(prefix: str | os.PathLike[str]) -> Path:
    """The file that says how a dataset was written."""
    return Path(os.fspath(prefix) + ".json")


def write_description(
    dataset: IndexedDataset, tokenizer: Tokenizer, tokenizer_model: str | None, split_sentences: bool = False
) -> None:
    """Record the tokenizer of a finished dataset, and whether each of its sequences is a sentence."""
    facts = {
        "content": dataset.fingerprint,
        "documents": dataset.num_documents,
        "tokens": dataset.num_tokens,
        "split_sentences": split_sentences,
        "tokenizer_type": tokenizer.name,
        "tokenizer_model": os.path.basename(tokenizer_model) if tokenizer_model else None,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "tokenizer": tokenizer.fingerprint(),
    }
    path = description_path(dataset.prefix)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error}): free some space or choose another folder") from error


def read_description(dataset: IndexedDataset) -> dict[str, Any] | None:
    """What `write_description` recorded; None if there is no such file or it is of other data.

    Raises:
        DataError: if the data is damaged: as large as what was described, and not the same.
    """
    path = description_path(dataset.prefix)
    try:
        facts = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(facts, dict) or facts.get("content") == dataset.fingerprint:
        return facts if isinstance(facts, dict) else None
    if (facts.get("documents"), facts.get("tokens")) == (dataset.num_documents, dataset.num_tokens):
        raise DataError(
            f"{bin_path(dataset.prefix)} or its .idx is damaged: {path} describes as many documents and tokens with another "
            f"content. Copy or write them again (if another tool wrote them, delete {path})"
        )
    return None


def check_vocabulary(dataset: IndexedDataset, tokenizer: Tokenizer, cache: ArrayCache) -> None:
    """Refuse data that another tokenizer wrote.

    Raises:
        DataError: if the recorded tokenizer is not this one, or a token id is not of its vocabulary.
    """
    facts = read_description(dataset)
    if facts is not None and facts.get("tokenizer") != tokenizer.fingerprint():
        raise DataError(
            f"{dataset.prefix} was written with {facts.get('tokenizer_type')} {facts.get('tokenizer_model') or ''} "
            f"(vocabulary {facts.get('vocab_size')}), but the run uses {tokenizer.name} (vocabulary "
            f"{tokenizer.vocab_size}), which is not the same: give the same --tokenizer-type and --tokenizer-model, or "
            f"write the data again (if you know better, delete {description_path(dataset.prefix)})"
        )
    if facts is not None or dataset.num_tokens == 0:
        return
    lowest, highest = _extremes(dataset, cache)
    if highest >= tokenizer.vocab_size or lowest < 0:
        raise DataError(
            f"{bin_path(dataset.prefix)} holds token id {highest if lowest >= 0 else lowest}, but {tokenizer.name} has the "
            f"ids 0 to {tokenizer.vocab_size - 1}: give the tokenizer the data was written with, or write the data again"
        )


def _extremes(dataset: IndexedDataset, cache: ArrayCache) -> tuple[int, int]:
    """Lowest and highest token id (of an evenly spaced part of a very large file)."""

    def scan() -> Any:
        total, budget = dataset.num_tokens, SCAN_BLOCKS * SCAN_TOKENS
        step = SCAN_TOKENS if total <= budget else total // SCAN_BLOCKS
        blocks = [dataset.tokens[start : start + SCAN_TOKENS] for start in range(0, total, step)]
        yield (np.array(min(int(block.min()) for block in blocks)),)
        yield (np.array(max(int(block.max()) for block in blocks)),)

    modified = bin_path(dataset.prefix).stat().st_mtime_ns
    key = cache_key(extremes=dataset.fingerprint, modified=modified)
    values = cache.get(key, {"extremes": ((2,), np.dtype("<i8"))}, scan)["extremes"]
    return int(values[0]), int(values[1])
