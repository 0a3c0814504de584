"""Relative positions of T5: a learned bias of attention scores for each bucket of distances (Raffel et al.,
arXiv:1910.10683, section 2.1).

Legend: S queries, T keys, H heads of this tensor-parallel rank, N buckets.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lsh.config.t5 import T5Settings
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.parameters import Init, local, parameter


class RelativePositionBias(nn.Module):
    """``weight`` [N, heads], split over tensor-parallel ranks by heads; one table serves all layers of a stack.

    Args:
        bidirectional: half of the buckets are for keys behind the query (encoder); else such keys are never seen (decoder).
    """

    def __init__(
        self, settings: T5Settings, heads: int, ctx: ParallelContext, init: Init, *, bidirectional: bool
    ) -> None:
        super().__init__()
        self.buckets = settings.relative_attention_num_buckets
        self.max_distance = settings.relative_attention_max_distance
        self.bidirectional = bidirectional
        self.weight = parameter((self.buckets, heads), ctx, init=init, cut={"tp": 1})

    def forward(self, length: int) -> Tensor:
        """What is added to the scaled scores of `length` positions among themselves: [1, H, length, length]."""
        weight = local(self.weight)
        positions = torch.arange(length, device=weight.device)
        distance_ST = positions[None, :] - positions[:, None]
        buckets_ST = relative_buckets(distance_ST, self.buckets, self.max_distance, bidirectional=self.bidirectional)
        return F.embedding(buckets_ST, weight).permute(2, 0, 1).unsqueeze(0).contiguous()


def relative_buckets(distance: Tensor, buckets: int, max_distance: int, *, bidirectional: bool) -> Tensor:
    """Bucket in [0, buckets) of each distance (position of the key - position of the query), int64 of any shape.

    With n = -distance, the steps back to the key, and N buckets, of which E = N / 2 are for single distances:

        n < E      n
        n >= E     E + floor(ln(n / E) / ln(max_distance / E) * (N - E)), at most N - 1

    Keys ahead have n = 0 (a causal stack never sees them). In both directions, N is half of `buckets`, n is the absolute
    distance, and keys ahead have the second half of the buckets. The formula is that of the mesh-tensorflow code that
    the paper names (``_relative_position_bucket``).
    """
    offset = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = (distance > 0).long() * buckets
        steps = distance.abs()
    else:
        steps = (-distance).clamp(min=0)
    exact = buckets // 2
    ratio = steps.clamp(min=1).float() / exact
    far = exact + (ratio.log() / math.log(max_distance / exact) * (buckets - exact)).long()
    return offset + torch.where(steps < exact, steps, far.clamp(max=buckets - 1))
