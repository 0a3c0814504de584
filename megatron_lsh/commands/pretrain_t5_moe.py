"""Pretrain a T5 with mixture-of-experts layers in encoder and decoder. Flags are Megatron-LM's; see --help and the README.

torchrun --nproc-per-node 2 -m megatron_lsh pretrain_t5_moe --encoder-num-layers 4 --decoder-num-layers 4 \\
        --hidden-size 128 ...
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from megatron_lsh.families import T5
from megatron_lsh.training.main import main as train


def main(words: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return train(partial(T5.parse, words))
