"""Pretrain a T5 with mixture-of-experts layers in encoder and decoder. Flags are Megatron-LM's; see --help and the README.

    torchrun --nproc-per-node 2 pretrain_t5_moe.py --encoder-num-layers 4 --decoder-num-layers 4 --hidden-size 128 ...
"""

from __future__ import annotations

import os
import sys
from functools import partial

import torch.distributed as dist
from torch import nn

from megatron_lsh.config import T5Config, assumed_world_size, parse_args, validate
from megatron_lsh.data.loader import Datasets, build_t5_datasets
from megatron_lsh.data.tokenizers import Tokenizer
from megatron_lsh.models.t5 import build_t5
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.launcher import place_of
from megatron_lsh.training.dry_run import dry_run
from megatron_lsh.training.faults import launch
from megatron_lsh.training.losses import Losses, Mean
from megatron_lsh.training.run import Task
from megatron_lsh.training.startup import refuse_to_overwrite
from megatron_lsh.training.step import Batch
from megatron_lsh.training.train import train


def build_data(
    cfg: T5Config, tokenizer: Tokenizer, ctx: ParallelContext, num_samples: tuple[int, int, int]
) -> Datasets:
    """Training, validation and test samples of --data-path, whose documents are split into sentences, or synthetic ones."""
    return build_t5_datasets(
        cfg,
        tokenizer,
        num_samples,
        is_builder=ctx.local_rank == 0,
        barrier=partial(dist.barrier, group=ctx.world.process_group),
    )


def forward_step(model: nn.Module, batch: Batch) -> Losses:
    """Losses of one micro-batch: cross-entropy of the spans and their sentinels, and the routers' auxiliary losses."""
    loss_BS, aux_loss = model(
        batch["encoder_tokens"],
        batch["decoder_tokens"],
        batch["encoder_padding_mask"],
        batch["decoder_padding_mask"],
        batch["labels"],
    )
    loss = Mean.of(loss_BS, batch["loss_mask"])
    return Losses(loss, Mean(aux_loss, loss.count))


def configure() -> T5Config:
    """The checked configuration; nothing is started yet."""
    cfg = parse_args(config_class=T5Config)
    cfg = validate(cfg, assumed_world_size(cfg))
    if not cfg.training.dry_run and not cfg.training.skip_train:
        refuse_to_overwrite(cfg.checkpoint)
    return cfg


def run(cfg: T5Config) -> None:
    """Describe the run, or do it."""
    if cfg.training.dry_run:
        if place_of(os.environ).rank == 0:
            print(dry_run(cfg))
        return
    train(cfg, Task(build_t5, build_data, forward_step))


if __name__ == "__main__":
    sys.exit(launch(configure, run))
