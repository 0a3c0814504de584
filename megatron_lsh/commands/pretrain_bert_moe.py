"""Pretrain a BERT or RoBERTa with mixture-of-experts layers. Flags are Megatron-LM's; see --help and the README.

torchrun --nproc-per-node 2 -m megatron_lsh pretrain_bert_moe --num-layers 4 --hidden-size 128 ... \\
        --moe-token-dispatcher-type lsh
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from megatron_lsh.families import BERT
from megatron_lsh.training.main import main as train


def main(words: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return train(partial(BERT.parse, words))
