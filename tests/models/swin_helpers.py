"""Small Swins for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lsh.config import parse_args, validate
from megatron_lsh.config.swin import SwinConfig
from megatron_lsh.families import SWIN
from megatron_lsh.models.swin import SwinModel
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.parallel.context import ParallelContext, offline_context

TINY = (
    "--img-h 16 --patch-dim 2 --num-classes 10 --swin-depths 2 2 --hidden-size 16 --num-attention-heads 2 "
    "--swin-window-size 4 --micro-batch-size 4 --mixup 0 --cutmix 0 --drop-path-rate 0 --dry-run --lr 1e-3 --device cpu "
)
MOE = "--num-experts 4 --moe-aux-loss-coeff 1e-2 "


def swin_config(flags: str = "", world_size: int = 1) -> SwinConfig:
    return validate(parse_args((TINY + flags).split(), SwinConfig), world_size)


def make_swin(cfg: SwinConfig, ctx: ParallelContext | None = None) -> SwinModel:
    ctx = ctx or offline_context(device="cpu")
    model = SWIN.build(cfg, 0, ctx, MoETelemetry(ctx.device))
    assert isinstance(model, SwinModel)
    return model


def make_pictures(cfg: SwinConfig, batch: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random uint8 [B, C, H, W] and labels."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, cfg.swin.num_channels, *cfg.image_size)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    return images, torch.randint(cfg.swin.num_classes or 10, (batch,), generator=generator)
