"""A learned low-rank correction of the residual (``--lsh-residual lowrank``).

    y_n = E(c_j) + r_n + B_e A_e r_n        r_n = x_n - c_j,  A_e [r, D],  B_e [D, r]

It lets each expert learn how its output changes around a centroid, to first order, for 4 r D operations per row. A starts
Gaussian and B zero, so training starts from the identity residual. The maps act on the source rank, which holds rows for all
experts, hence every rank holds the maps of all experts; they are dense parameters. An exported model leaves them out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.parameters import Init, local, parameter


class LowRankResidual(nn.Module):
    """``B_e A_e r`` for residuals sorted by expert."""

    def __init__(self, num_experts: int, hidden: int, rank: int, ctx: ParallelContext) -> None:
        super().__init__()
        self._split_tokens = ctx.sequence_parallel
        # Scaled so that A r has the size of r's mean component.
        self.down = parameter((num_experts, rank, hidden), ctx, init=Init("normal", hidden**-0.5))
        self.up = parameter((num_experts, hidden, rank), ctx, init=Init("zeros"))

    def forward(self, residual_ND: Tensor, counts: Sequence[int]) -> Tensor:
        """
        Args:
            residual_ND: sorted by expert.
            counts: rows per expert.
        """
        down, up = (local(p, partial_grad=self._split_tokens) for p in (self.down, self.up))
        parts = residual_ND.split(list(counts))
        # Every expert takes part, with or without rows, so that each parameter gets a gradient on every rank.
        return torch.cat([part @ a.T @ b.T for part, a, b in zip(parts, down, up, strict=True)])
