"""Compress rows to centroids, and the residual that restores them.

    c_j = mean of the rows of cluster j            (travels)
    r_n = x_n - c_{cluster(n)}                     (stays at home)

Backward, with g_c and g_r the gradients of c and r, and n_j the rows of cluster j:

    dx_n = (g_r_n - mean_j(g_r)) + g_c_j / n_j     for j = cluster(n)

In this order of operations a cluster of one row passes g_c on to the bit, because its first bracket is exactly zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_lsh.lsh.cluster import Clusters
from megatron_lsh.ops import accumulator, choose


class Compress(torch.autograd.Function):
    """Rows of a source to means: row n is ``source[index_N[n]]``, and ``cluster_MK`` says which clusters a source is in."""

    @staticmethod
    def forward(
        ctx: Any,
        source_MD: Tensor,
        index_N: Tensor | None,
        cluster_MK: Tensor,
        order_N: Tensor,
        offsets_C: Tensor,
        sizes_C: Tensor,
        with_residual: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.ops = choose(source_MD)
        ctx.save_for_backward(cluster_MK, order_N, offsets_C, sizes_C)
        if with_residual:
            return ctx.ops.segment_residual(source_MD, order_N, offsets_C, sizes_C)
        return ctx.ops.segment(source_MD, index_N, None, order_N, offsets_C, sizes_C, True), None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_means_CD, grad_residual_ND = grads
        cluster_MK, order_N, offsets_C, sizes_C = ctx.saved_tensors
        sum_CD = None
        if grad_residual_ND is not None:
            sum_CD = ctx.ops.segment(grad_residual_ND, None, None, order_N, offsets_C, sizes_C, False)
        grad_MD = ctx.ops.spread(grad_residual_ND, None, sum_CD, grad_means_CD, cluster_MK, sizes_C)
        return grad_MD, *([None] * 6)


def compress(rows_ND: Tensor, clusters: Clusters, *, with_residual: bool) -> tuple[Tensor, Tensor | None]:
    """Replace the rows of each cluster by their mean.

    Args:
        rows_ND: floating, sorted by expert; differentiable.
        clusters: from :func:`megatron_lsh.lsh.cluster_by_code`; carries no gradient.
        with_residual: also return what :func:`megatron_lsh.lsh.restore` adds back (``--lsh-residual identity``).

    Returns:
        centroids [C, D], and the residuals [N, D] or None; both in the dtype of the rows.
    """
    centroids_CD, residual_ND = Compress.apply(
        rows_ND, None, clusters.cluster_N.unsqueeze(1), *clusters.segments, with_residual
    )
    return centroids_CD, residual_ND


@torch.no_grad()
def residual_energy(
    rows_ND: Tensor, centroids_CD: Tensor, clusters: Clusters, index_N: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """How much of the rows the centroids miss.

    For means: sum_n |x_n - c|^2 = sum_n |x_n|^2 - sum_j n_j |c_j|^2, which reads the rows once. It cancels to
    about 1e-6 of the total, accurate enough for a metric. With ``index_N`` (int64), row n is ``rows_ND[index_N[n]]``.

    Returns:
        (sum |x - c|^2, sum |x|^2) as 0-dim tensors of at least fp32; no host synchronisation.
    """
    dtype = accumulator(rows_ND.dtype)
    if index_N is None:
        total = torch.linalg.vector_norm(rows_ND, dtype=dtype).square()
    else:
        total = torch.linalg.vector_norm(rows_ND, dim=1, dtype=dtype).square()[index_N].sum()
    norms_C = torch.linalg.vector_norm(centroids_CD, dim=1, dtype=dtype)
    return (total - (clusters.sizes_C * norms_C.square()).sum()).clamp(min=0.0), total
