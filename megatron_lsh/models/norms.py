"""LayerNorm and RMSNorm whose weights know about tensor parallelism.

Legend: D normalized width (hidden size, or one head's width for the norms of queries and keys).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lsh.config.model import ModelConfig
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.parameters import Init, local, parameter


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
