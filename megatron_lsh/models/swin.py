"""Swin and Swin-MoE: pictures cut into patches, stages of attention inside windows, experts in some blocks.

Liu et al., arXiv:2103.14030; Swin-MoE: Hwang et al., arXiv:2206.03382, section 5, with the position biases of Swin V2.
Between the blocks of a stage the patches of a picture are a sequence in rows, so that attention, feed-forward layers and
experts are those of all models.

Legend: B pictures, C channels, S patches of a picture in a stage, D width of the stage, K classes.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lsh.config import required
from megatron_lsh.config.layer_pattern import moe_layer_pattern
from megatron_lsh.config.model import ModelConfig
from megatron_lsh.config.swin import SwinConfig
from megatron_lsh.models.attention import SelfAttention
from megatron_lsh.models.bert import Dense
from megatron_lsh.models.feed_forward import DenseFeedForward, MoEFeedForward
from megatron_lsh.models.model import Model
from megatron_lsh.models.norms import build_norm
from megatron_lsh.models.position_bias import BiasTable, PositionBias, PositionNetwork
from megatron_lsh.models.recompute import RecomputePlan
from megatron_lsh.models.stacks import Stack
from megatron_lsh.models.windows import Windows
from megatron_lsh.moe.layer_pass import ReplayMemo
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.parameters import Init, local, parameter

ASSUMED_CLASSES = 1000
"""without data that says how many there are"""
HEAD = "head."
"""beginning of the names of the head's parameters"""


def stage_grids(cfg: SwinConfig) -> list[tuple[int, int]]:
    """Patches of each stage, down and across; where a side is odd, merging fills it up with zeros."""
    height, width = (-(-size // cfg.swin.patch_dim) for size in cfg.image_size)
    grids = []
    for _ in cfg.swin.swin_depths:
        grids.append((height, width))
        height, width = -(-height // 2), -(-width // 2)
    return grids


def swin_stacks(cfg: SwinConfig) -> tuple[Stack, ...]:
    """The stages, each with its own width, heads, length and blocks. Raises ConfigError for an impossible pattern."""
    depths, heads, hidden = cfg.swin.swin_depths, cfg.heads(), required(cfg.model.hidden_size)
    pattern = moe_layer_pattern(cfg.moe.moe_layer_freq, sum(depths)) if cfg.moe.num_experts is not None else []
    ffn = cfg.model.ffn_hidden_size or 4 * hidden
    expert = cfg.moe.moe_ffn_hidden_size or ffn
    stacks, first = [], 0
    for stage, (depth, (height, width)) in enumerate(zip(depths, stage_grids(cfg), strict=True)):
        layers = cfg.recompute.recompute_num_layers
        stage_cfg = dataclasses.replace(
            cfg,
            model=dataclasses.replace(
                cfg.model,
                num_layers=depth,
                hidden_size=hidden << stage,
                ffn_hidden_size=ffn << stage,
                num_attention_heads=heads[stage],
                num_query_groups=heads[stage],
                kv_channels=None,
                seq_length=height * width,
            ),
            moe=dataclasses.replace(
                cfg.moe,
                moe_ffn_hidden_size=expert << stage,
                moe_layer_freq=str([int(moe) for moe in pattern[first : first + depth]] or [0] * depth),
            ),
            recompute=dataclasses.replace(
                cfg.recompute, recompute_num_layers=None if layers is None else min(layers, depth)
            ),
        )
        windows = Windows.of(height, width, cfg.swin.swin_window_size, shifted=False)
        attended, widened = windows.side**2, math.prod(windows.padded) / (height * width)
        stacks.append(Stack(stage_cfg, f"stages.{stage}", first, causal=False, attended=attended, widened=widened))
        first += depth
    return tuple(stacks)


def merging_multiply_adds(cfg: SwinConfig) -> float:
    """Of one picture: patches made of pixels, and between stages four patches made one."""
    hidden, grids = required(cfg.model.hidden_size), stage_grids(cfg)
    first = grids[0][0] * grids[0][1] * hidden * cfg.swin.num_channels * cfg.swin.patch_dim**2
    between = (h * w * 4 * (hidden << stage) * 2 * (hidden << stage) for stage, (h, w) in enumerate(grids[1:]))
    return float(first + sum(between))


class PatchEmbedding(nn.Module):
    """A linear map of each patch's pixels, and a norm: ``weight`` [D, C, P, P], ``bias`` [D]."""

    def __init__(self, cfg: SwinConfig, ctx: ParallelContext) -> None:
        super().__init__()
        hidden, side = required(cfg.model.hidden_size), cfg.swin.patch_dim
        self.side = side
        init = Init("normal", cfg.model.init_method_std)
        self.weight = parameter((hidden, cfg.swin.num_channels, side, side), ctx, init=init)
        self.bias = parameter((hidden,), ctx, init=Init("zeros"))
        self.norm = build_norm(cfg.model, hidden, ctx)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, height, width] -> [S, B, D]; what is missing to whole patches is zero."""
        below, right = (-size % self.side for size in x_BCHW.shape[-2:])
        weight = local(self.weight)
        x = F.pad(x_BCHW, (0, right, 0, below)) if below or right else x_BCHW
        x = F.conv2d(x.to(weight.dtype), weight, local(self.bias), stride=self.side)
        normed: Tensor = self.norm(x.flatten(2).permute(2, 0, 1))
        return normed


class PatchMerging(nn.Module):
    """Four neighbouring patches become one of twice the width: norm, then ``weight`` [2 D, 4 D], no bias."""

    def __init__(self, cfg: ModelConfig, hidden: int, grid: tuple[int, int], ctx: ParallelContext) -> None:
        super().__init__()
        self.grid = grid
        self.norm = build_norm(cfg, 4 * hidden, ctx)
        self.weight = parameter((2 * hidden, 4 * hidden), ctx, init=Init("normal", cfg.init_method_std))

    def forward(self, x_SBD: Tensor) -> Tensor:
        """[S, B, D] -> [ceil(height / 2) ceil(width / 2), B, 2 D]"""
        height, width = self.grid
        x = F.pad(x_SBD.unflatten(0, self.grid), (0, 0, 0, 0, 0, width % 2, 0, height % 2))
        corners = [x[row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return F.linear(self.norm(torch.cat(corners, -1).flatten(0, 1)), local(self.weight))


class DropPath(nn.Module):
    """In training, sets a branch to zero for a share of the samples, and makes it larger for the others.

    Huang et al., arXiv:1603.09382.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x_SBD: Tensor) -> Tensor:
        if not self.rate or not self.training:
            return x_SBD
        kept_B1 = torch.rand(x_SBD.shape[1], 1, device=x_SBD.device) >= self.rate
        return x_SBD * (kept_B1.to(x_SBD.dtype) / (1.0 - self.rate))


class SwinBlock(nn.Module):
    """x + f(norm(x)) for f the attention inside windows, then the feed-forward layer or the experts.

    One unit of ``fully_shard``. `layer` counts from 0 over all stages.
    """

    fsdp_unit = True

    def __init__(
        self,
        cfg: SwinConfig,
        windows: Windows,
        ctx: ParallelContext,
        layer: int,
        *,
        moe: bool,
        drop_path: float,
        trained_side: int | None,
        telemetry: MoETelemetry,
        recompute: RecomputePlan,
    ) -> None:
        super().__init__()
        hidden, heads = required(cfg.model.hidden_size), required(cfg.model.num_attention_heads)
        init = Init("normal", cfg.model.init_method_std)
        self.windows = windows
        self.input_layernorm = build_norm(cfg.model, hidden, ctx)
        self.self_attention = SelfAttention(cfg.model, ctx, recompute)
        self.position_bias: PositionBias = (
            BiasTable(windows, heads, ctx, init)
            if cfg.swin.swin_position_bias == "table"
            else PositionNetwork(windows, heads, ctx, init, trained_side)
        )
        self.pre_mlp_layernorm = build_norm(cfg.model, hidden, ctx)
        self.mlp: DenseFeedForward | MoEFeedForward = (
            MoEFeedForward(cfg, ctx, layer, telemetry, recompute) if moe else DenseFeedForward(cfg, ctx, recompute)
        )
        self.dropout, self.drop_path = nn.Dropout(cfg.model.hidden_dropout), DropPath(drop_path)
        self.register_buffer("mask", windows.mask(ctx.device), persistent=False)
        self.mask: Tensor | None

    def forward(
        self, x_SBD: Tensor, token_mask_SB: Tensor | None, memo: ReplayMemo | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the new activation [S, B, D] and the auxiliary loss (fp32 scalar; zero in a dense block)."""
        mask = None if self.mask is None else self.mask.repeat_interleave(x_SBD.shape[1], 0)
        attended = self.self_attention.after(
            lambda x: self.windows.cut(self.input_layernorm(x)),
            x_SBD,
            causal=False,
            attention_mask=mask,
            position_bias=self.position_bias(),
        )
        x_SBD = x_SBD + self.drop_path(self.dropout(self.windows.join(attended)))
        y_SBD, aux_loss = self.mlp.after(self.pre_mlp_layernorm, x_SBD, token_mask_SB, memo)
        return x_SBD + self.drop_path(self.dropout(y_SBD)), aux_loss


class SwinStage(nn.Module):
    """The blocks of one stage, and in front of them, except in the first, the merging of the patches before."""

    def __init__(
        self,
        stack: Stack,
        grid: tuple[int, int],
        before: tuple[int, int] | None,
        ctx: ParallelContext,
        drop_path: list[float],
        trained_side: int | None,
        telemetry: MoETelemetry,
    ) -> None:
        super().__init__()
        cfg = stack.cfg
        assert isinstance(cfg, SwinConfig)
        self.plan = RecomputePlan.from_config(cfg.recompute, cfg.moe, stack.num_layers)
        self.merging: PatchMerging | None = None
        if before is not None:
            self.merging = PatchMerging(cfg.model, stack.shape.hidden // 2, before, ctx)
        self.layers = nn.ModuleDict(
            {
                str(block): SwinBlock(
                    cfg,
                    Windows.of(*grid, cfg.swin.swin_window_size, shifted=block % 2 == 1),
                    ctx,
                    stack.first_layer + block,
                    moe=moe,
                    drop_path=drop_path[block],
                    trained_side=trained_side,
                    telemetry=telemetry,
                    recompute=RecomputePlan() if block < self.plan.full_layers else self.plan,
                )
                for block, moe in enumerate(stack.moe_pattern())
            }
        )

    def forward(self, x_SBD: Tensor, real_B: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns [S', B, D'] and the sum of the blocks' auxiliary losses. `real_B`: bool, False for what no expert sees."""
        if self.merging is not None:
            x_SBD = self.merging(x_SBD)
        token_mask_SB = None if real_B is None else real_B.expand(x_SBD.shape[:2]).contiguous()

        def run_block(block: int, x: Tensor, memo: ReplayMemo | None) -> tuple[Tensor, Tensor]:
            output: tuple[Tensor, Tensor] = self.layers[str(block)](x, token_mask_SB, memo)
            return output

        return self.plan.run(range(len(self.layers)), run_block, x_SBD)


class SwinModel(Model):
    """Patches, stages, norm, mean over the patches, one linear layer.

    Args:
        cfg: a validated configuration.
        vocab_size: 0; pictures have none.
    """

    def __init__(self, cfg: SwinConfig, vocab_size: int, ctx: ParallelContext, telemetry: MoETelemetry) -> None:
        super().__init__(ctx, telemetry)
        stacks, grids = swin_stacks(cfg), stage_grids(cfg)
        self.patch_embedding = PatchEmbedding(cfg, ctx)
        self.dropout = nn.Dropout(cfg.model.hidden_dropout)
        rates = torch.linspace(0, cfg.swin.drop_path_rate, sum(cfg.swin.swin_depths), device="cpu").tolist()
        self.stages = nn.ModuleDict(
            {
                str(stage): SwinStage(
                    stack,
                    grids[stage],
                    grids[stage - 1] if stage else None,
                    ctx,
                    rates[stack.first_layer : stack.first_layer + stack.num_layers],
                    cfg.pretrained_window_side(stage),
                    telemetry,
                )
                for stage, stack in enumerate(stacks)
            }
        )
        width = stacks[-1].shape.hidden
        self.final_layernorm = build_norm(cfg.model, width, ctx)
        self.head = Dense(
            width, cfg.swin.num_classes or ASSUMED_CLASSES, ctx, Init("normal", cfg.model.init_method_std)
        )
        channels = cfg.swin.num_channels
        for name, numbers in (("mean", cfg.images.image_mean), ("std", cfg.images.image_std)):
            values = torch.tensor(cfg.images.per_channel(numbers, channels), device=ctx.device)
            self.register_buffer(name, values[:, None, None], persistent=False)
        self.mean: Tensor
        self.std: Tensor
        if cfg.swin.freeze_experts:
            for layer in self.moe_layers():
                layer.requires_grad_(False)

    def forward(self, images_BCHW: Tensor, real_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [B, K] and the sum of the blocks' auxiliary losses (fp32 scalar).

        Args:
            images_BCHW: numbers between 0 and 1; or uint8, between 0 and 255.
            real_B: bool, False for pictures that only fill the batch, which no expert sees; by default all are real.
        """
        if images_BCHW.dtype == torch.uint8:
            images_BCHW = images_BCHW.float() / 255.0
        x_SBD = self.dropout(self.patch_embedding((images_BCHW - self.mean) / self.std))
        total = x_SBD.new_zeros((), dtype=torch.float32)
        for stage in self.stages.values():
            x_SBD, aux_loss = stage(x_SBD, real_B)
            total = total + aux_loss
        pooled_BD = self.final_layernorm(x_SBD).mean(0)
        self.telemetry.count_micro_batch()
        return self.head(pooled_BD), total
