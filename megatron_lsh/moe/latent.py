"""Latent experts: rows are made narrower before they travel, and tokens wide again after they are combined.

A linear map D -> L in front of the dispatcher and one L -> D behind it, the same on every rank; router and shared experts
see the tokens as they are. Rows of L numbers take L / D of the bytes, and hashing, clustering and restoring cost as much
less (LatentMoE, arXiv:2601.18089). Names of the parameters are Megatron-LM's.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.parameters import ONE_MATRIX, Init, local, parameter


class ReplicatedLinear(nn.Module):
    """x W^T + b with the same W [out, in] and b [out] on every rank of a tensor-parallel group.

    Under sequence parallelism each of these ranks has other tokens, so each has a part of the gradients.
    """

    bias: nn.Parameter | None

    def __init__(self, width_in: int, width_out: int, ctx: ParallelContext, *, init: Init, bias: bool) -> None:
        super().__init__()
        self._split_tokens = ctx.sequence_parallel
        self.weight = parameter((width_out, width_in), ctx, init=init, matrices=ONE_MATRIX)
        self.bias = parameter((width_out,), ctx, init=Init("zeros")) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        weight = local(self.weight, partial_grad=self._split_tokens)
        bias = None if self.bias is None else local(self.bias, partial_grad=self._split_tokens)
        return F.linear(x, weight, bias)
