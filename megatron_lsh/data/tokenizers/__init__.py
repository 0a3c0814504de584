"""Tokenizers: text to token ids and back, in the formats of SentencePiece, Hugging Face, GPT-2 and BERT."""

from megatron_lsh.data.tokenizers.tokenizer import Tokenizer, build_tokenizer

__all__ = ["Tokenizer", "build_tokenizer"]
