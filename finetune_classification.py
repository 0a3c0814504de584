"""Fine-tune a pretrained GPT, BERT or T5 encoder, dense or with experts, to classify texts; see docs/finetuning.md.

    torchrun --nproc-per-node 2 finetune_classification.py --config runs/gpt/checkpoints/config.json \\
        --pretrained-checkpoint runs/gpt/checkpoints --train-data train.jsonl --valid-data valid.jsonl ...
"""

from __future__ import annotations

import os
import sys

from megatron_lsh.config import assumed_world_size, validate
from megatron_lsh.config.finetune import FinetuneConfig, parse_finetune_args
from megatron_lsh.parallel.launcher import place_of
from megatron_lsh.training.dry_run import dry_run
from megatron_lsh.training.faults import launch
from megatron_lsh.training.finetune import Prepared, finetune_task, with_data
from megatron_lsh.training.startup import refuse_to_overwrite
from megatron_lsh.training.train import train


def configure() -> tuple[FinetuneConfig, Prepared | None]:
    """The checked configuration and the data, which decides the length of the run; nothing is started yet."""
    written = parse_finetune_args()
    cfg = validate(written, assumed_world_size(written))
    if cfg.training.dry_run:
        return cfg, None
    if not cfg.training.skip_train:
        refuse_to_overwrite(cfg.checkpoint)
    return with_data(written, assumed_world_size(written))


def run(prepared: tuple[FinetuneConfig, Prepared | None]) -> None:
    """Describe the run, or do it."""
    cfg, data = prepared
    if data is None:
        if place_of(os.environ).rank == 0:
            print(dry_run(cfg))
        return
    train(cfg, finetune_task(cfg, data))


if __name__ == "__main__":
    sys.exit(launch(configure, run))
