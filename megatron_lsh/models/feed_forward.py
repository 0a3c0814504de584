"""The feed-forward layers of a transformer layer, with the norm in front of them and what they recompute of both.

Legend: S sequence (`s` its local share under sequence parallelism), B micro-batch, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lsh.config.config import Config
from megatron_lsh.models.mlp import MLP
from megatron_lsh.models.norms import Normalize
from megatron_lsh.models.recompute import RecomputePlan, recomputed
from megatron_lsh.moe.layer import MoELayer
from megatron_lsh.moe.layer_pass import ReplayMemo
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.parallel.context import ParallelContext


class DenseFeedForward(MLP):
    """One MLP for all tokens."""

    def __init__(self, cfg: Config, ctx: ParallelContext, recompute: RecomputePlan) -> None:
        super().__init__(cfg.model, ctx)
        self._recompute_all = "mlp" in recompute.modules
        self._recompute_norm = "layernorm" in recompute.modules

    def after(
        self, norm: Normalize, x_sBD: Tensor, token_mask_sB: Tensor | None, memo: ReplayMemo | None
    ) -> tuple[Tensor, Tensor]:
        """Of norm(x): the output [s, B, D] and an auxiliary loss of zero (fp32). Mask and memo are what experts need."""

        def expand(x: Tensor) -> Tensor:
            return self.linear_fc1(norm(x))

        def whole(x: Tensor) -> Tensor:
            return self.contract(expand(x))

        if self._recompute_all:
            y_sBD = recomputed(whole, x_sBD)
        elif self._recompute_norm:
            y_sBD = self.contract(recomputed(expand, x_sBD))
        else:
            y_sBD = whole(x_sBD)
        return y_sBD, x_sBD.new_zeros((), dtype=torch.float32)


class MoEFeedForward(MoELayer):
    """A mixture of experts, recomputed or not."""

    def __init__(
        self, cfg: Config, ctx: ParallelContext, layer: int, telemetry: MoETelemetry, recompute: RecomputePlan
    ) -> None:
        super().__init__(cfg.model, cfg.moe, cfg.lsh, ctx, layer, telemetry)
        self._recompute = "moe" in recompute.modules

    def after(
        self, norm: Normalize, x_sBD: Tensor, token_mask_sB: Tensor | None, memo: ReplayMemo | None
    ) -> tuple[Tensor, Tensor]:
        """Of norm(x): the output [s, B, D] and the auxiliary loss (fp32 scalar).

        Args:
            token_mask_sB: bool, False for padding.
            memo: given when the caller recomputes the whole transformer layer.
        """
        if not self._recompute:
            return self(norm(x_sBD), token_mask_sB, memo)  # type: ignore[no-any-return]
        memo = ReplayMemo() if memo is None else memo
        return recomputed(lambda x: self(norm(x), token_mask_sB, memo), x_sBD)
