"""Refinement: give every row to the nearest centroid of its expert and take the means again (one step of k-means).

    cluster(n) = argmin_j |x_n - c_j|^2 = argmax_j (x_n . c_j - |c_j|^2 / 2)     over the centroids of n's expert

Hashing finds a start; one such step brings the residuals most of the way to what k-means would reach (docs/lsh.md).
A centroid that loses all its rows is given a row of its expert that is far from its own centroid and not the last there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lsh.lsh.cluster import Clusters
from megatron_lsh.ops import choose


@torch.no_grad()
def refine(
    rows_ND: Tensor,
    clusters: Clusters,
    counts_E: Tensor,
    steps: int = 1,
    index_N: Tensor | None = None,
) -> Clusters:
    """Improve clusters without changing how many each expert has.

    Args:
        rows_ND: floating, sorted by expert.
        clusters: a start. Returned as it is where every row has a cluster of its own. Where rows and clusters per expert are
            known (``Clusters.known``) plain PyTorch need not wait for the device; kernels never do.
        counts_E: int64, rows per expert.
        steps: rounds of reassignment.
        index_N: int64; row n is then ``rows_ND[index_N[n]]``.

    No cluster of the result is empty.
    """
    if clusters.num_clusters == clusters.num_rows:
        return clusters
    ops, row_ends_E, cluster_ends_E = choose(rows_ND), counts_E.cumsum(0), clusters.counts_E.cumsum(0)
    on_host = None if clusters.rows is None or clusters.counts is None else (clusters.rows, clusters.counts)
    for _ in range(steps):
        centroids_CD = ops.segment(rows_ND, index_N, None, *clusters.segments, True)
        nearest_N, distance_N = ops.nearest(rows_ND, index_N, centroids_CD, row_ends_E, cluster_ends_E, on_host)
        cluster_N, order_N, sizes_C, offsets_C = ops.regroup(
            nearest_N, distance_N, row_ends_E, cluster_ends_E, clusters.num_clusters
        )
        refined = Clusters(cluster_N, sizes_C, clusters.counts_E, order_N, offsets_C)
        clusters = refined.known(clusters.counts, clusters.rows)
    return clusters
