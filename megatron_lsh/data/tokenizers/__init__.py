"""Tokenizers: text to token ids and back, in the formats of SentencePiece, Hugging Face, GPT-2 and BERT."""

from megatron_lsh.data.tokenizers.gpt2 import GPT2BPETokenizer
from megatron_lsh.data.tokenizers.huggingface import HuggingFaceTokenizer
from megatron_lsh.data.tokenizers.tokenizer import (
    ByteTokenizer,
    GPTSentencePieceTokenizer,
    Llama2Tokenizer,
    NullTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    build_tokenizer,
)
from megatron_lsh.data.tokenizers.wordpiece import BertWordPieceTokenizer

__all__ = [
    "BertWordPieceTokenizer",
    "ByteTokenizer",
    "GPT2BPETokenizer",
    "GPTSentencePieceTokenizer",
    "HuggingFaceTokenizer",
    "Llama2Tokenizer",
    "NullTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "build_tokenizer",
]
