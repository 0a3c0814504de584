"""Padding of the vocabulary."""

from __future__ import annotations

from megatron_lsh.errors import ConfigError


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_parallel_size: int) -> int:
    """``vocab_size`` rounded up to a multiple of ``divisible_by`` x ``tensor_parallel_size``, Megatron-LM's rule.

    Raises:
        ConfigError: if an argument is not positive.
    """
    if min(vocab_size, divisible_by, tensor_parallel_size) < 1:
        raise ConfigError(
            f"model.vocab_size ({vocab_size}), model.make_vocab_size_divisible_by ({divisible_by}) and "
            f"parallel.tensor_model_parallel_size ({tensor_parallel_size}) must be at least 1: change the smallest"
        )
    multiple = divisible_by * tensor_parallel_size
    return -(-vocab_size // multiple) * multiple
