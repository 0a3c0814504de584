"""Data sets and the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_lsh.config.flag import flag

TOKENIZER_TYPES = (
    "GPT2BPETokenizer",
    "BertWordPieceLowerCase",
    "BertWordPieceCase",
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "HuggingFaceTokenizer",
    "ByteTokenizer",
    "NullTokenizer",
)

# Settings that name its files, and all that say which tokenizer it is.
TOKENIZER_FILES = ("tokenizer_model", "vocab_file", "merge_file")
TOKENIZER_SETTINGS = ("tokenizer_type", *TOKENIZER_FILES, "vocab_extra_ids")


def _split_text(value: Any) -> Any:
    """YAML may hold a list where the command line has ``969,30,1``; scripts of Megatron-LM's quote it twice."""
    return (
        ",".join(map(str, value))
        if isinstance(value, list)
        else value.strip("'\"")
        if isinstance(value, str)
        else value
    )


@dataclass
class DataConfig:
    """Data sets and tokenizer."""

    data_path: list[str] | None = flag(None, "PREFIX, or W1 PREFIX1 W2 PREFIX2 ... for a blend")
    train_data_path: list[str] | None = flag(None, "As --data-path, for training only")
    valid_data_path: list[str] | None = flag(None, "As --data-path, for validation only")
    test_data_path: list[str] | None = flag(None, "As --data-path, for the final test only")
    split: str | None = flag(
        None, "Shares of train, valid and test documents of --data-path (default: 969,30,1)", parse=_split_text
    )
    data_cache_path: str | None = flag(None, "Where index files are cached (default: beside the data)")
    mock_data: bool = flag(False, "Train on synthetic tokens; no files needed")
    num_workers: int = flag(2, "Data-loading threads per rank; 0 loads in the training thread", at_least=0)
    eod_mask_loss: bool = flag(False, "No loss on end-of-document tokens")
    reset_position_ids: bool = flag(False, "Restart positions after an end-of-document token")
    reset_attention_mask: bool = flag(False, "No attention across end-of-document tokens")
    tokenizer_type: str | None = flag(
        None,
        "Kind of tokenizer (default with --vocab-file: GPT2BPETokenizer, for BERT and T5 BertWordPieceLowerCase)",
        choices=TOKENIZER_TYPES,
    )
    tokenizer_model: str | None = flag(None, "Tokenizer file, or folder of a Hugging Face tokenizer")
    vocab_file: str | None = flag(
        None,
        "Vocabulary of a BertWordPiece tokenizer, one token per line (vocab.txt), or of GPT2BPETokenizer (vocab.json)",
    )
    merge_file: str | None = flag(None, "Merges of GPT2BPETokenizer, one pair per line (merges.txt)")
    vocab_extra_ids: int = flag(
        0, "Sentinel tokens <extra_id_0>, ... of T5, appended to the vocabulary unless it has them", at_least=0
    )
