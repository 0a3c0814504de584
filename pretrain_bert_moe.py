"""Pretrain a BERT or RoBERTa with mixture-of-experts layers. Flags are Megatron-LM's; see --help and the README.

    torchrun --nproc-per-node 2 pretrain_bert_moe.py --num-layers 4 --hidden-size 128 ... --moe-token-dispatcher-type lsh
"""

from __future__ import annotations

import os
import sys
from functools import partial

import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from megatron_lsh.config import BertConfig, assumed_world_size, parse_args, validate
from megatron_lsh.data.loader import Datasets, build_bert_datasets
from megatron_lsh.data.tokenizers import Tokenizer
from megatron_lsh.models.bert import build_bert
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
    cfg: BertConfig, tokenizer: Tokenizer, ctx: ParallelContext, num_samples: tuple[int, int, int]
) -> Datasets:
    """Training, validation and test samples of --data-path, whose documents are split into sentences, or synthetic ones."""
    return build_bert_datasets(
        cfg,
        tokenizer,
        num_samples,
        is_builder=ctx.local_rank == 0,
        barrier=partial(dist.barrier, group=ctx.world.process_group),
    )


def forward_step(model: nn.Module, batch: Batch) -> Losses:
    """Losses of one micro-batch: cross-entropy of the masked tokens, which is what the log calls lm loss.

    What is minimized besides it: the routers' auxiliary losses, and the cross-entropy of the sentence order (unless
    --bert-no-binary-head), Megatron-LM's sop loss.
    """
    real_BS = batch["padding_mask"]
    loss_BS, order_B2, aux_loss = model(batch["tokens"], batch["token_types"], real_BS, batch["labels"])
    further = {}
    if order_B2 is not None:
        order_loss_B = F.cross_entropy(order_B2.float(), batch["is_random"], reduction="none")
        further["sop loss"] = Mean.of(order_loss_B, real_BS[:, 0])
    loss = Mean.of(loss_BS, batch["loss_mask"])
    return Losses(loss, Mean(aux_loss, loss.count), further)


def configure() -> BertConfig:
    """The checked configuration; nothing is started yet."""
    cfg = parse_args(config_class=BertConfig)
    cfg = validate(cfg, assumed_world_size(cfg))
    if not cfg.training.dry_run and not cfg.training.skip_train:
        refuse_to_overwrite(cfg.checkpoint)
    return cfg


def run(cfg: BertConfig) -> None:
    """Describe the run, or do it."""
    if cfg.training.dry_run:
        if place_of(os.environ).rank == 0:
            print(dry_run(cfg))
        return
    train(cfg, Task(build_bert, build_data, forward_step))


if __name__ == "__main__":
    sys.exit(launch(configure, run))
