"""Tokenize documents into the .bin/.idx files that training reads: the command line of megatron_lsh/data/preparation."""

from __future__ import annotations

from megatron_lsh.data.preparation.preprocess import main

__all__ = ["main"]
