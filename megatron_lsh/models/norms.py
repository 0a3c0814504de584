"""LayerNorm and RMSNorm whose weights know about tensor parallelism.

Legend: D normalized width (hidden size, or one head's width for the norms of queries and keys).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lsh.config.model import ModelConfig
from megatron_lsh.errors import ConfigError
from megatron_lsh.parallel.collectives import copy_to_tensor_parallel, reduce_from_tensor_parallel
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.parameters import Init, local, parameter

Normalize: TypeAlias = Callable[[Tensor], Tensor]
"""what is in front of a sub-layer: its norm, or nothing where the norm has been applied"""


class Norm(nn.Module):
    """Common part: a weight of ones, replicated over the tensor-parallel ranks.

    Args:
        width: D, size of the last dimension of the input.
        eps: added to the variance (LayerNorm) or mean square (RMSNorm).
        sharded_input: the tp ranks apply the norm to different parts of the activation (its sequence, or its heads),
            so that each holds only a part of the weight's gradient.
    """

    def __init__(self, width: int, eps: float, ctx: ParallelContext, *, sharded_input: bool) -> None:
        super().__init__()
        self.width = width
        self.eps = eps
        self.sharded_input = sharded_input
        self.weight = parameter((width,), ctx, init=Init("ones"))

    def extra_repr(self) -> str:
        return f"{self.width}, eps={self.eps}"


class LayerNorm(Norm):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension (Ba et al., arXiv:1607.06450)."""

    def __init__(self, width: int, eps: float, ctx: ParallelContext, *, sharded_input: bool) -> None:
        super().__init__(width, eps, ctx, sharded_input=sharded_input)
        self.bias = parameter((width,), ctx, init=Init("zeros"))

    def forward(self, x: Tensor) -> Tensor:
        weight = local(self.weight, partial_grad=self.sharded_input)
        bias = local(self.bias, partial_grad=self.sharded_input)
        return F.layer_norm(x, (self.width,), weight, bias, self.eps)


class RMSNorm(Norm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich, arXiv:1910.07467)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.width,), local(self.weight, partial_grad=self.sharded_input), self.eps)


def build_norm(
    cfg: ModelConfig, width: int, ctx: ParallelContext, *, sharded_input: bool | None = None
) -> LayerNorm | RMSNorm:
    """The norm that ``--normalization`` names; by default its input is sharded where sequence parallelism is on."""
    kind = RMSNorm if cfg.normalization == "RMSNorm" else LayerNorm
    sharded = ctx.sequence_parallel if sharded_input is None else sharded_input
    return kind(width, cfg.norm_epsilon, ctx, sharded_input=sharded)


class FullWidthRMSNorm(nn.Module):
    """RMSNorm over all heads of a token together, the heads spread over the tensor-parallel ranks (OLMoE, arXiv:2409.02060).

    ``weight`` [heads * d], split like the heads.
    """

    def __init__(self, width: int, eps: float, ctx: ParallelContext) -> None:
        super().__init__()
        self.width = width
        self.eps = eps
        self.tp = ctx.tp
        self.weight = parameter((width,), ctx, init=Init("ones"), cut={"tp": 0})

    def extra_repr(self) -> str:
        return f"{self.width}, eps={self.eps}"

    def forward(self, x_SBHd: Tensor) -> Tensor:
        """[S, B, heads of this rank, d], keeping shape and dtype."""
        x = x_SBHd.float()
        squares = reduce_from_tensor_parallel(x.square().sum((-2, -1), keepdim=True), self.tp)
        # Every rank's output depends on the sum: its gradient is summed over the ranks, too.
        squares = copy_to_tensor_parallel(squares, self.tp)
        x = x * torch.rsqrt(squares / self.width + self.eps)
        return x.to(x_SBHd.dtype) * local(self.weight).view(x.shape[-2:])


def build_head_norm(
    cfg: ModelConfig, heads: int, head_dim: int, ctx: ParallelContext
) -> LayerNorm | RMSNorm | FullWidthRMSNorm:
    """The norm of ``--qk-layernorm`` for [S, B, heads of this rank, d], of `heads` on all ranks together.

    Raises ConfigError for a LayerNorm over all heads.
    """
    if cfg.qk_layernorm_width == "head":  # every rank normalizes its own heads with the same weight
        return build_norm(cfg, head_dim, ctx, sharded_input=ctx.tp.size > 1)
    if cfg.normalization != "RMSNorm":
        raise ConfigError(
            f"model.qk_layernorm_width ({cfg.qk_layernorm_width}) must be head with model.normalization "
            f"({cfg.normalization}): set --normalization RMSNorm or drop --qk-layernorm-width"
        )
    return FullWidthRMSNorm(heads * head_dim, cfg.norm_epsilon, ctx)
