"""Which rows form a cluster, in plain PyTorch: codes, cuts at the budgets, nearest centroids, refilled clusters.

The ideas are explained in ``lsh/``; here is the arithmetic that ``PlainOps`` and the functions of ``lsh/`` share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_lsh.ops.dtypes import accumulator

_KEY_LIMIT = 1 << 62


def counts_of(ends_E: Tensor) -> Tensor:
    """int64 [E]: what cumulative counts are the sums of."""
    return ends_E.diff(prepend=ends_E.new_zeros(1))


def expert_of_row(counts_E: Tensor, num_rows: int) -> Tensor:
    """int64 [N]: the expert of each row, given the rows per expert."""
    experts = torch.arange(counts_E.shape[0], device=counts_E.device)
    return experts.repeat_interleave(counts_E, output_size=num_rows)


def cluster_sizes(cluster_N: Tensor, num_clusters: int) -> Tensor:
    """int64 [C], rows per cluster. (``bincount`` would wait for the device.)"""
    sizes_C = torch.zeros(num_clusters, dtype=torch.int64, device=cluster_N.device)
    return sizes_C.scatter_add_(0, cluster_N, torch.ones_like(cluster_N))


def cluster_of_row(order_N: Tensor, sizes_C: Tensor) -> Tensor:
    """int64 [N]: the inverse of :func:`in_order`."""
    numbers_C = torch.arange(sizes_C.shape[0], device=order_N.device)
    cluster_N = torch.empty_like(order_N)
    cluster_N[order_N] = numbers_C.repeat_interleave(sizes_C, output_size=order_N.shape[0])
    return cluster_N


def in_order(cluster_N: Tensor, sizes_C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """cluster, order, sizes and offsets of an assignment: rows sorted by cluster, within one in the order they have."""
    return cluster_N, torch.argsort(cluster_N, stable=True), sizes_C, sizes_C.cumsum(0) - sizes_C


def codes_of(projection_NP: Tensor, num_hashes: int) -> Tensor:
    """int64 codes [N, Q] in [0, 2 W) of projected rows: ``2 * argmax_w |projection| + [projection > 0]``."""
    projection_NQW = projection_NP.unflatten(1, (num_hashes, -1))
    # argmax returns the first of equal maxima, so all-zero rows share one code on every device.
    axis_NQ1 = projection_NQW.abs().argmax(dim=-1, keepdim=True)
    positive_NQ1 = projection_NQW.gather(-1, axis_NQ1) > 0
    return (2 * axis_NQ1 + positive_NQ1).squeeze(-1)


def pack_codes(expert_N: Tensor, num_experts: int, codes_NQ: Tensor, num_codes: int) -> Tensor:
    """One sortable int64 key per row: the expert is the leading digit, then the codes in order.

    Where the digits do not fit, the key so far is replaced by its rank, which keeps order and equality.
    """
    key_N, key_range = expert_N, num_experts
    for codes_N in codes_NQ.unbind(1):
        if key_range * num_codes > _KEY_LIMIT:
            key_N = torch.unique(key_N, return_inverse=True)[1]
            key_range = codes_NQ.shape[0]
        key_N = key_N * num_codes + codes_N
        key_range *= num_codes
    return key_N


def number_by_first_row(cluster_N: Tensor, sizes_C: Tensor) -> tuple[Tensor, Tensor]:
    """Renumber clusters in the order of their first rows.

    Rows are sorted by expert, so clusters are too. And without any merging centroids lie in row order, hence every sum
    over rows in an expert's backward runs as it would uncompressed, to the bit.
    """
    rows_N = torch.arange(cluster_N.shape[0], device=cluster_N.device)
    first_C = torch.full_like(sizes_C, cluster_N.shape[0]).scatter_reduce_(0, cluster_N, rows_N, "amin")
    by_first_C = torch.argsort(first_C)
    number_C = torch.empty_like(by_first_C)
    number_C[by_first_C] = torch.arange(sizes_C.shape[0], device=sizes_C.device)
    return number_C[cluster_N], sizes_C[by_first_C]


def cut_at_budgets(
    codes_NQ: Tensor, projection_NP: Tensor, counts_E: Tensor, budgets_E: Tensor, num_clusters: int, num_codes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cut the sorted rows of every expert at its budget's weakest links; arguments of ``lsh.cluster_by_budget``.

    Returns:
        cluster, order, sizes and offsets as :func:`in_order`.
    """
    num_rows = codes_NQ.shape[0]
    expert_N = expert_of_row(counts_E, num_rows)
    order_N = torch.argsort(pack_codes(expert_N, counts_E.shape[0], codes_NQ, num_codes), stable=True)
    strength_N = _link_strength(codes_NQ[order_N], projection_NP[order_N], expert_N)
    # Rank the links of each expert by strength. Sorting by expert again leaves each expert's rows where they were.
    weakest_N = torch.argsort(strength_N, stable=True)
    weakest_N = weakest_N[torch.argsort(expert_N[weakest_N], stable=True)]
    first_E = counts_E.cumsum(0) - counts_E
    rank_N = torch.arange(num_rows, device=order_N.device) - first_E[expert_N]
    starts_N = torch.empty_like(rank_N)
    starts_N[weakest_N] = (rank_N < budgets_E[expert_N]).long()
    cluster_N = torch.empty_like(order_N)
    cluster_N[order_N] = starts_N.cumsum(0) - 1
    return in_order(*number_by_first_row(cluster_N, cluster_sizes(cluster_N, num_clusters)))


def _link_strength(codes_NQ: Tensor, projection_NP: Tensor, expert_N: Tensor) -> Tensor:
    """fp64 [N]: how strongly each sorted row is tied to its predecessor; lowest at the first row of an expert."""
    strength_N = torch.full(codes_NQ.shape[:1], -2.0, dtype=torch.float64, device=codes_NQ.device)
    lcp_N = (codes_NQ[1:] == codes_NQ[:-1]).cumprod(1).sum(1)
    gap_N = (projection_NP[1:] - projection_NP[:-1]).double().square().sum(1)
    # One number orders both criteria: the gap takes off at most 1, so it only decides among equal prefixes. An infinite gap,
    # or one that is no number, takes off 1.
    linked_N = expert_N[1:] == expert_N[:-1]
    strength_N[1:] = torch.where(linked_N, lcp_N - (gap_N / (gap_N + 1)).nan_to_num(1.0), -2.0)
    return strength_N


def nearest_centroid(
    rows_ND: Tensor, centroids_CD: Tensor, row_counts: Sequence[int], centroid_counts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The nearest centroid of each row among those of its expert; the first where no distance is a number.

    Args:
        rows_ND, centroids_CD: both sorted by expert, one dtype.
        row_counts, centroid_counts: per expert, on the host.

    Returns:
        int64 [N], the index of the centroid, and [N], the squared distance to it in fp32 or better.
    """
    half_norm_C = centroids_CD.square().sum(1, dtype=accumulator(centroids_CD.dtype)) / 2
    nearest, score = [], []
    first = 0
    for rows, centroids, half_norm in zip(
        rows_ND.split(row_counts),
        centroids_CD.split(centroid_counts),
        half_norm_C.split(centroid_counts),
        strict=True,
    ):
        if rows.shape[0]:
            scores = (rows @ centroids.T - half_norm).nan_to_num_(-math.inf, math.inf, -math.inf)
            best = torch.max(scores, dim=1)
            nearest.append(best.indices + first)
            score.append(best.values)
        first += centroids.shape[0]
    if not nearest:
        return torch.zeros(0, dtype=torch.int64, device=rows_ND.device), half_norm_C.new_zeros(0)
    square_N = rows_ND.square().sum(1, dtype=half_norm_C.dtype)
    return torch.cat(nearest), square_N - 2 * torch.cat(score).to(half_norm_C.dtype)


def refill_empty(
    cluster_N: Tensor, distance_N: Tensor, counts_E: Tensor, clusters_E: Tensor, num_clusters: int
) -> Tensor:
    """Give the k empty clusters of each expert k of its rows, one each: those with the largest distance: int64 [N].

    The last row of a cluster in this order stays, so that no cluster is emptied to fill another. Of equal distances the
    earlier row's counts as larger, NaN as the largest.
    """
    if num_clusters == 0 or cluster_N.shape[0] == 0:
        return cluster_N
    expert_N = expert_of_row(counts_E, cluster_N.shape[0])
    expert_C = expert_of_row(clusters_E, num_clusters)
    sizes_C = cluster_sizes(cluster_N, num_clusters)
    empty_C = sizes_C == 0
    empties_E = torch.zeros_like(counts_E).scatter_add_(0, expert_C, empty_C.long())
    farthest_N = torch.argsort(distance_N, descending=True, stable=True)
    by_cluster_N = farthest_N[torch.argsort(cluster_N[farthest_N], stable=True)]
    last_C = by_cluster_N[(sizes_C.cumsum(0) - 1).clamp(min=0)]
    stays_N = torch.zeros_like(cluster_N).scatter_add_(0, last_C, (~empty_C).long())
    # Rows of each expert, those that may move first, of these the farthest; and of its clusters, the empty ones first.
    farthest_N = farthest_N[torch.argsort((expert_N * 2 + stays_N)[farthest_N], stable=True)]
    emptiest_C = torch.argsort(expert_C * 2 + (~empty_C).long(), stable=True)
    first_row_E, first_cluster_E = counts_E.cumsum(0) - counts_E, clusters_E.cumsum(0) - clusters_E
    rank_N = torch.arange(cluster_N.shape[0], device=cluster_N.device) - first_row_E[expert_N]
    moves_N = rank_N < empties_E[expert_N]
    target_N = emptiest_C[(first_cluster_E[expert_N] + rank_N).clamp(max=num_clusters - 1)]
    refilled_N = cluster_N.clone()
    refilled_N[farthest_N] = torch.where(moves_N, target_N, cluster_N[farthest_N])
    return refilled_N
