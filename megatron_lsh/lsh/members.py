"""Members: one row of each cluster, as it is, in the place of the cluster's mean (``--lsh-representative member``).

    c_j = x_m, m = member(j)           r_n = x_n - c_j        dx_n = g_r_n,  and dx_m = (g_r_m - sum_j(g_r)) + g_c_j

A mean lies between rows, where no row is; its expert output is off what any row's would be. Taken alone a member's output is
worse still for the other rows, but it is a better point to interpolate from (``interpolate.py``; docs/measurements.md).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_lsh.lsh.cluster import Clusters
from megatron_lsh.ops import choose


class _Members(torch.autograd.Function):
    """As ``Compress`` of compress.py, with a member of each cluster in the place of its mean."""

    @staticmethod
    def forward(
        ctx: Any, rows_ND: Tensor, clusters: Clusters, member_C: Tensor, with_residual: bool
    ) -> tuple[Tensor, Tensor | None]:
        ctx.clusters, ctx.rows, ctx.ops = clusters, rows_ND.shape, choose(rows_ND) if with_residual else None
        ctx.save_for_backward(member_C)
        members_CD = rows_ND.index_select(0, member_C)
        return members_CD, rows_ND - members_CD.index_select(0, clusters.cluster_N) if with_residual else None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad_members_CD, grad_residual_ND = grads
        (member_C,) = ctx.saved_tensors
        if grad_residual_ND is None:
            return grad_members_CD.new_zeros(ctx.rows).index_add_(0, member_C, grad_members_CD), None, None, None
        clusters: Clusters = ctx.clusters
        # A row's own term and the sum over its cluster are subtracted first: they cancel to the bit where it is alone.
        numbers_C = torch.arange(clusters.num_clusters, device=member_C.device)
        owns_C1 = (clusters.cluster_N[member_C] == numbers_C).unsqueeze(1)
        own_CD = torch.where(owns_C1, grad_residual_ND.index_select(0, member_C), 0)
        sum_CD = ctx.ops.segment(grad_residual_ND, None, None, *clusters.segments, False)
        sent_CD = own_CD - sum_CD + grad_members_CD
        return grad_residual_ND.index_fill(0, member_C, 0).index_add_(0, member_C, sent_CD), None, None, None


def compress_to_members(
    rows_ND: Tensor, clusters: Clusters, member_C: Tensor, *, with_residual: bool
) -> tuple[Tensor, Tensor | None]:
    """Send ``rows[member_C]``, one row of each cluster as it is; arguments and results as of ``lsh.compress``."""
    members_CD, residual_ND = _Members.apply(rows_ND, clusters, member_C, with_residual)
    return members_CD, residual_ND


class Members(NamedTuple):
    """Attributes:
    member_C: int64, of each cluster the row nearest to its mean, the first of equals.
    missed, total: 0-dim tensors, the sums of |x - c|^2 and of |x|^2 over all rows x, with c the member that stands for x.
    """

    member_C: Tensor
    missed: Tensor
    total: Tensor


@torch.no_grad()
def measured_members(rows_ND: Tensor, clusters: Clusters) -> Members:
    """Which row stands for each cluster, and what that misses: one pass over the rows."""
    member_C, energy_C2 = choose(rows_ND).members(rows_ND, *clusters.segments)
    return Members(member_C, *energy_C2.sum(0).unbind())


def nearest_members(rows_ND: Tensor, clusters: Clusters) -> Tensor:
    """``measured_members(...).member_C``."""
    return measured_members(rows_ND, clusters).member_C
