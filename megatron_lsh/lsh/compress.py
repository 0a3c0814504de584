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

from megatron_lsh.lsh import kernels
from megatron_lsh.lsh.cluster import Clusters
from megatron_lsh.lsh.segments import segment_mean


class _Compress(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, clusters: Clusters, with_residual: bool) -> tuple[Tensor, Tensor | None]:
        ctx.clusters, ctx.by_kernels = clusters, kernels.usable(rows_ND)
        if with_residual and ctx.by_kernels:
            order = (clusters.order_N, clusters.offsets_C, clusters.sizes_C)
            return torch.ops.megatron_lsh.segment_residual(rows_ND, *order)
        centroids_CD = segment_mean(rows_ND, clusters)
        residual_ND = rows_ND - centroids_CD.index_select(0, clusters.cluster_N) if with_residual else None
        return centroids_CD, residual_ND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        clusters: Clusters = ctx.clusters
        grad_centroids_CD, grad_residual_ND = grads
        if ctx.by_kernels:
            return _backward_by_kernels(grad_centroids_CD, grad_residual_ND, clusters), None, None
        sizes_C1 = clusters.sizes_C.clamp(min=1).unsqueeze(1)
        grad_rows_ND = (grad_centroids_CD / sizes_C1).index_select(0, clusters.cluster_N)
        if grad_residual_ND is not None:
            mean_CD = segment_mean(grad_residual_ND, clusters)
            grad_rows_ND += grad_residual_ND - mean_CD.index_select(0, clusters.cluster_N)
        return grad_rows_ND, None, None


def _backward_by_kernels(grad_centroids_CD: Tensor, grad_residual_ND: Tensor | None, clusters: Clusters) -> Tensor:
    ops, sum_CD = torch.ops.megatron_lsh, None
    if grad_residual_ND is not None:
        order = (clusters.order_N, clusters.offsets_C, clusters.sizes_C)
        sum_CD = ops.segment(grad_residual_ND, None, None, *order, False)
    index_N1 = clusters.cluster_N.unsqueeze(1)
    return ops.spread(grad_residual_ND, None, sum_CD, grad_centroids_CD, index_N1, clusters.sizes_C)


def compress(rows_ND: Tensor, clusters: Clusters, *, with_residual: bool) -> tuple[Tensor, Tensor | None]:
    """Replace the rows of each cluster by their mean.

    Args:
        rows_ND: floating, sorted by expert; differentiable.
        clusters: from :func:`megatron_lsh.lsh.cluster_by_code`; carries no gradient.
        with_residual: also return what :func:`megatron_lsh.lsh.restore` adds back (``--lsh-residual identity``).

    Returns:
        centroids [C, D], and the residuals [N, D] or None; both in the dtype of the rows.
    """
    centroids_CD, residual_ND = _Compress.apply(rows_ND, clusters, with_residual)
    return centroids_CD, residual_ND


@torch.no_grad()
def residual_energy(
    rows_ND: Tensor, centroids_CD: Tensor, clusters: Clusters, index_N: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """How much of the rows the centroids miss.

    For means: sum_n |x_n - c|^2 = sum_n |x_n|^2 - sum_j n_j |c_j|^2, which reads the rows once. It cancels to
    about 1e-6 of the total, ample for a gauge. With ``index_N`` (int64), row n is ``rows_ND[index_N[n]]``.

    Returns:
        (sum |x - c|^2, sum |x|^2) as 0-dim tensors of at least fp32; no host synchronisation.
    """
    dtype = torch.promote_types(rows_ND.dtype, torch.float32)
    if index_N is None:
        total = torch.linalg.vector_norm(rows_ND, dtype=dtype).square()
    else:
        total = torch.linalg.vector_norm(rows_ND, dim=1, dtype=dtype).square()[index_N].sum()
    norms_C = torch.linalg.vector_norm(centroids_CD, dim=1, dtype=dtype)
    return (total - (clusters.sizes_C * norms_C.square()).sum()).clamp(min=0.0), total
