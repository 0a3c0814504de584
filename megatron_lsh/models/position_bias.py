"""Biases of relative positions inside a window: computed from the distance, or looked up in a table.

Legend: w side of a window, W = w * w; H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lsh.errors import CheckpointError
from megatron_lsh.models.windows import Windows
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.parameters import Init, local, parameter

WIDTH = 512
"""of the hidden layer of the position network"""


class PositionBias(nn.Module):
    """Adds to the scores: [1, H, W, W] of a table [(2 w - 1)^2, H]."""

    def __init__(self, windows: Windows, ctx: ParallelContext) -> None:
        super().__init__()
        self.register_buffer("index", windows.index(ctx.device), persistent=False)
        self.index: Tensor

    def table(self) -> Tensor:
        raise NotImplementedError

    def forward(self) -> Tensor:
        return self.table()[self.index].permute(2, 0, 1).unsqueeze(0)


class BiasTable(PositionBias):
    """A learned table, as in the first Swin: ``weight`` [(2 w - 1)^2, H], which does not decay."""

    def __init__(self, windows: Windows, heads: int, ctx: ParallelContext, init: Init) -> None:
        super().__init__(windows, ctx)
        self.weight = parameter(((2 * windows.side - 1) ** 2, heads), ctx, init=init, decays=False)

    def table(self) -> Tensor:
        return local(self.weight)


class PositionNetwork(PositionBias):
    """Linear(2, 512), ReLU, Linear(512, H) of the distance ("continuous position bias", arXiv:2111.09883, section 3.3).

    Its weights do not decay; ``fc2`` has no bias.
    """

    def __init__(
        self, windows: Windows, heads: int, ctx: ParallelContext, init: Init, trained_side: int | None = None
    ) -> None:
        super().__init__(windows, ctx)
        self.register_buffer("distances", windows.distances(ctx.device, trained_side), persistent=False)
        self.distances: Tensor
        self.fc1_weight = parameter((WIDTH, 2), ctx, init=init, decays=False)
        self.fc1_bias = parameter((WIDTH,), ctx, init=Init("zeros"))
        self.fc2_weight = parameter((heads, WIDTH), ctx, init=init, decays=False)

    def table(self) -> Tensor:
        weight = local(self.fc1_weight)
        hidden = F.relu(F.linear(self.distances.to(weight.dtype), weight, local(self.fc1_bias)))
        return F.linear(hidden, local(self.fc2_weight))


def resized_table(table: Tensor, shape: torch.Size) -> Tensor:
    """A table [(2 v - 1)^2, H] for windows of another side w: [(2 w - 1)^2, H], bicubic as in Microsoft's code.

    Raises:
        CheckpointError: `shape` has other heads, or one of both is no table of a square window.
    """
    before, after = round(len(table) ** 0.5), round(shape[0] ** 0.5)
    if table.ndim != 2 or table.shape[1:] != shape[1:] or before**2 != len(table) or after**2 != shape[0]:
        raise CheckpointError(
            f"a table of relative positions of shape {tuple(table.shape)} cannot be resized to {tuple(shape)}: only the "
            "window may differ, not the heads"
        )
    grid = table.float().t().reshape(1, -1, before, before)
    resized = F.interpolate(grid, size=(after, after), mode="bicubic", align_corners=False)
    return resized.flatten(2).squeeze(0).t().contiguous().to(table.dtype)
