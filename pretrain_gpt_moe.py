"""Pretrain a GPT with mixture-of-experts layers. Flags are Megatron-LM's; see --help and the README.

    torchrun --nproc-per-node 2 pretrain_gpt_moe.py --num-layers 4 --hidden-size 128 ... --moe-token-dispatcher-type lsh
"""

from __future__ import annotations

import os
import sys
from functools import partial

import torch.distributed as dist
from torch import nn

from megatron_lsh.config import Config, assumed_world_size, parse_args, validate
from megatron_lsh.data.loader import Datasets, build_train_valid_test
from megatron_lsh.data.tokenizers import Tokenizer
from megatron_lsh.models.attention import document_attention_mask
from megatron_lsh.models.gpt import build_gpt
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.launcher import place_of
from megatron_lsh.training.dry_run import dry_run
from megatron_lsh.training.faults import launch
from megatron_lsh.training.losses import Losses, Mean
from megatron_lsh.training.run import Task, required
from megatron_lsh.training.startup import refuse_to_overwrite
from megatron_lsh.training.step import Batch
from megatron_lsh.training.train import train


def build_data(cfg: Config, tokenizer: Tokenizer, ctx: ParallelContext, num_samples: tuple[int, int, int]) -> Datasets:
    """Training, validation and test samples of --data-path, or synthetic ones."""
    return build_train_valid_test(
        cfg.data,
        required(cfg.model.seq_length),
        cfg.training.seed,
        num_samples,
        tokenizer,
        is_builder=ctx.local_rank == 0,
        barrier=partial(dist.barrier, group=ctx.world.process_group),
    )


def forward_step(cfg: Config, model: nn.Module, batch: Batch) -> Losses:
    """Losses of one micro-batch: next-token cross-entropy where the loss mask is 1, and the routers' auxiliary losses."""
    position_ids_BS = batch["position_ids"] if cfg.data.reset_position_ids else None
    mask_B1SS = None
    if cfg.data.reset_attention_mask:
        mask_B1SS = document_attention_mask(batch["document_ids"])
    loss_BS, aux_loss = model(batch["tokens"], batch["labels"], position_ids_BS, mask_B1SS)
    return Losses(Mean.of(loss_BS, batch["loss_mask"]), Mean(aux_loss, loss_BS.numel()))


def configure() -> Config:
    """The checked configuration; nothing is started yet."""
    cfg: Config = parse_args()
    cfg = validate(cfg, assumed_world_size(cfg))
    if not cfg.training.dry_run and not cfg.training.skip_train:
        refuse_to_overwrite(cfg.checkpoint)
    return cfg


def run(cfg: Config) -> None:
    """Describe the run, or do it."""
    if cfg.training.dry_run:
        if place_of(os.environ).rank == 0:
            print(dry_run(cfg))
        return
    train(cfg, Task(build_gpt, build_data, partial(forward_step, cfg)))


if __name__ == "__main__":
    sys.exit(launch(configure, run))
