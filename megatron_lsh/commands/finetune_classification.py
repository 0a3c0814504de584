"""Fine-tune a pretrained GPT, BERT or T5 encoder, dense or with experts, to classify texts; see docs/finetuning.md.

    torchrun --nproc-per-node 2 -m megatron_lsh finetune_classification --config runs/gpt/checkpoints/config.json \\
        --pretrained-checkpoint runs/gpt/checkpoints --train-data train.jsonl --valid-data valid.jsonl ...
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from megatron_lsh.config import parse_classification_args
from megatron_lsh.training.main import main as train


def main(words: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return train(partial(parse_classification_args, words))
