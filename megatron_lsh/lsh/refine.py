"""Refinement: give every row to the nearest centroid of its expert and take the means again (one step of k-means).

    cluster(n) = argmin_j |x_n - c_j|^2 = argmax_j (x_n . c_j - |c_j|^2 / 2)     over the centroids of n's expert

Hashing finds a start; one such step brings the residuals most of the way to what k-means would reach (docs/lsh.md).
A centroid that loses all its rows is given the row of its expert that is farthest from its own centroid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_lsh.lsh import kernels
from megatron_lsh.lsh.budget import cluster_sizes
from megatron_lsh.lsh.cluster import Clusters, expert_of_row
from megatron_lsh.lsh.segments import segment_mean


@torch.no_grad()
def refine(
    rows_ND: Tensor, clusters: Clusters, counts_E: Tensor, steps: int = 1, index_N: Tensor | None = None
) -> Clusters:
    """Improve clusters without changing how many each expert has.

    Args:
        rows_ND: floating, sorted by expert.
        clusters: a start. Returned as it is where every row has a cluster of its own.
        counts_E: int64, rows per expert.
        steps: rounds of reassignment.
        index_N: int64; row n is then ``rows_ND[index_N[n]]``.

    A cluster can end up empty where rows coincide; its centroid is then zero.
    """
    if clusters.num_clusters == clusters.num_rows:
        return clusters
    if kernels.usable(rows_ND):
        return _refine_by_kernels(rows_ND, clusters, counts_E, steps, index_N)
    rows_ND = rows_ND if index_N is None else rows_ND[index_N]
    row_counts, centroid_counts = counts_E.tolist(), clusters.counts_E.tolist()
    for _ in range(steps):
        centroids_CD = segment_mean(rows_ND, clusters)
        cluster_N, distance_N = nearest_centroid(rows_ND, centroids_CD, row_counts, centroid_counts)
        cluster_N = _refill_empty(cluster_N, distance_N, counts_E, clusters.counts_E, clusters.num_clusters)
        sizes_C = cluster_sizes(cluster_N, clusters.num_clusters)
        clusters = Clusters.from_assignment(cluster_N, sizes_C, clusters.counts_E)
    return clusters


def _refine_by_kernels(
    source_MD: Tensor, clusters: Clusters, counts_E: Tensor, steps: int, index_N: Tensor | None
) -> Clusters:
    ops, row_ends_E, cluster_ends_E = torch.ops.megatron_lsh, counts_E.cumsum(0), clusters.counts_E.cumsum(0)
    for _ in range(steps):
        order = (clusters.order_N, clusters.offsets_C, clusters.sizes_C)
        centroids_CD = ops.segment(source_MD, index_N, None, *order, True)
        nearest_N, distance_N = ops.nearest(source_MD, index_N, centroids_CD, row_ends_E, cluster_ends_E)
        cluster_N, order_N, sizes_C, offsets_C = ops.regroup(
            nearest_N, distance_N.float(), row_ends_E, cluster_ends_E, clusters.num_clusters
        )
        clusters = Clusters(cluster_N, sizes_C, clusters.counts_E, order_N, offsets_C)
    return clusters


@torch.no_grad()
def nearest_centroid(
    rows_ND: Tensor, centroids_CD: Tensor, row_counts: Sequence[int], centroid_counts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The nearest centroid of each row among those of its expert.

    Args:
        rows_ND, centroids_CD: both sorted by expert, one dtype.
        row_counts, centroid_counts: per expert, on the host.

    Returns:
        int64 [N], the index of the centroid, and [N], the squared distance to it in fp32 or better.
    """
    half_norm_C = centroids_CD.square().sum(1, dtype=torch.promote_types(centroids_CD.dtype, torch.float32)) / 2
    nearest, score = [], []
    first = 0
    for rows, centroids, half_norm in zip(
        rows_ND.split(row_counts),
        centroids_CD.split(centroid_counts),
        half_norm_C.split(centroid_counts),
        strict=True,
    ):
        if rows.shape[0]:
            best = torch.max(rows @ centroids.T - half_norm, dim=1)
            nearest.append(best.indices + first)
            score.append(best.values)
        first += centroids.shape[0]
    if not nearest:
        return torch.zeros(0, dtype=torch.int64, device=rows_ND.device), half_norm_C.new_zeros(0)
    square_N = rows_ND.square().sum(1, dtype=half_norm_C.dtype)
    return torch.cat(nearest), square_N - 2 * torch.cat(score).to(half_norm_C.dtype)


def _refill_empty(
    cluster_N: Tensor, distance_N: Tensor, counts_E: Tensor, clusters_E: Tensor, num_clusters: int
) -> Tensor:
    """Give the k empty clusters of each expert its k rows with the largest distance, one each."""
    expert_N = expert_of_row(counts_E, cluster_N.shape[0])
    expert_C = expert_of_row(clusters_E, num_clusters)
    empty_C = cluster_sizes(cluster_N, num_clusters) == 0
    empties_E = torch.zeros_like(counts_E).scatter_add_(0, expert_C, empty_C.long())
    # Rows of each expert, farthest first; and of each expert's clusters, the empty ones first.
    farthest_N = torch.argsort(distance_N, descending=True, stable=True)
    farthest_N = farthest_N[torch.argsort(expert_N[farthest_N], stable=True)]
    emptiest_C = torch.argsort(expert_C * 2 + (~empty_C).long(), stable=True)
    first_row_E, first_cluster_E = counts_E.cumsum(0) - counts_E, clusters_E.cumsum(0) - clusters_E
    rank_N = torch.arange(cluster_N.shape[0], device=cluster_N.device) - first_row_E[expert_N]
    moves_N = rank_N < empties_E[expert_N]
    target_N = emptiest_C[(first_cluster_E[expert_N] + rank_N).clamp(max=num_clusters - 1)]
    refilled_N = cluster_N.clone()
    refilled_N[farthest_N] = torch.where(moves_N, target_N, cluster_N[farthest_N])
    return refilled_N
