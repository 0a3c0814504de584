"""Pretrain or fine-tune a Swin or Swin-MoE on labelled pictures. Flags are Megatron-LM's; see --help and docs/vision.md.

torchrun --nproc-per-node 8 -m megatron_lsh pretrain_swin_moe --preset swin-moe-s32 --data-path FOLDER ...
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from megatron_lsh.families import SWIN
from megatron_lsh.training.main import main as train


def main(words: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return train(partial(SWIN.parse, words))
