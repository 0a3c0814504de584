"""Tiny runs for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from megatron_lsh.config import Config, parse_args, validate
from megatron_lsh.families import GPT, Family, Losses

TINY = (
    "--num-layers 2 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --seq-length 32 --vocab-size 63 "
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
    "--attention-dropout 0 --hidden-dropout 0 --make-vocab-size-divisible-by 32 "
    "--num-experts 4 --moe-ffn-hidden-size 32 --moe-aux-loss-coeff 1e-2 --moe-z-loss-coeff 1e-3 "
    "--micro-batch-size 2 --global-batch-size 8 --lr 1e-3 --lr-decay-style constant "
    "--mock-data --num-workers 0 --eval-iters 1 --log-interval 1 --no-progress --peak-tflops 1 --device cpu"
)


def tiny_config(flags: str = "", world_size: int = 1) -> Config:
    """A validated configuration; the last value of a flag wins."""
    length = [] if "--train-" in flags else ["--train-iters", "10"]
    return validate(parse_args([*TINY.split(), *length, *flags.split()]), world_size)


def gpt_with(losses: Callable[..., Losses]) -> Family:
    """GPT with a saboteur that wraps the real losses."""
    return replace(GPT, losses=losses)


def copy_state(value: Any) -> Any:
    """Local tensors of a nested state, cloned."""
    if isinstance(value, dict):
        return {key: copy_state(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [copy_state(item) for item in value]
    if isinstance(value, Tensor):
        return (value.to_local() if hasattr(value, "to_local") else value).detach().clone()
    return value
