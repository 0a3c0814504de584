"""Padding of the vocabulary."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lsh.config import padded_vocab_size
from megatron_lsh.errors import ConfigError


def test_known_sizes() -> None:
    assert padded_vocab_size(50257, 128, 1) == 50304  # GPT-2
    assert padded_vocab_size(50257, 128, 8) == 51200
    assert padded_vocab_size(32000, 128, 2) == 32000
    assert padded_vocab_size(1, 128, 1) == 128


@given(st.integers(1, 10**6), st.integers(1, 512), st.integers(1, 64))
def test_smallest_multiple_that_holds_all(vocab: int, divisible_by: int, tp: int) -> None:
    padded = padded_vocab_size(vocab, divisible_by, tp)
    assert padded % (divisible_by * tp) == 0 and vocab <= padded < vocab + divisible_by * tp


@pytest.mark.parametrize("sizes", [(0, 128, 1), (5, 0, 1), (5, 128, -1)])
def test_sizes_must_be_positive(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="must be at least 1"):
        padded_vocab_size(*sizes)
