"""Restore rows from the experts' outputs on centroids.

    y_n = E(c_j) + r_n    for j = cluster(n)      (--lsh-residual identity; equations 4 and 5 of the paper)
    y_n = E(c_j)                                  (--lsh-residual none)

Backward: the expert's output of cluster j receives the sum of its rows' gradients; the residual receives g unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_lsh.lsh.cluster import Clusters
from megatron_lsh.ops import choose


class _Restore(torch.autograd.Function):
    """Copy each cluster's row to all of its members and add residuals. (index_select's backward is atomic on GPUs.)"""

    @staticmethod
    def forward(ctx: Any, out_CD: Tensor, residual_ND: Tensor | None, clusters: Clusters) -> Tensor:
        ctx.clusters, ctx.ops = clusters, choose(out_CD)
        return ctx.ops.combine(out_CD, clusters.cluster_N.unsqueeze(1), None, residual_ND, None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (grad_ND,) = grads
        grad_out_CD = ctx.ops.segment(grad_ND.contiguous(), None, None, *ctx.clusters.segments, False)
        return grad_out_CD, grad_ND if ctx.needs_input_grad[1] else None, None


def restore(expert_out_CD: Tensor, residual_ND: Tensor | None, clusters: Clusters) -> Tensor:
    """Give every row its centroid's expert output, plus its residual if there is one.

    Args:
        expert_out_CD: [C, D], the expert's output for each centroid, in the order of the centroids.
        residual_ND: [N, D] from :func:`megatron_lsh.lsh.compress`, or None.

    Returns:
        [N, D] in the dtype of ``expert_out_CD``.
    """
    return _Restore.apply(expert_out_CD, residual_ND, clusters)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, carrier: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0]


def straight_through(value: Tensor, carrier: Tensor) -> Tensor:
    """``value + carrier - stop_gradient(carrier)``: the value of the first, the gradient of their sum; costs nothing."""
    return _StraightThrough.apply(value, carrier)
