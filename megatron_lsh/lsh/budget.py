"""Budgets: at most a given number of clusters per expert, whatever the data.

An LSH forest (Bawa, Condie and Ganesan 2005) seen as a sorted list: sort the rows of one expert by their codes
(code_1, ..., code_Q); rows that share a long prefix are near each other. Let ``lcp_n`` be the number of leading codes that
row n shares with its predecessor. Starting a new cluster at the B rows of smallest lcp gives exactly B clusters, nested as
B grows. Among links of equal lcp those between the farthest neighbours are cut first. No budget is exceeded and no row is
dropped: a hot expert merges more coarsely. And the sizes are known from routing alone, before anything is hashed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lsh.lsh import kernels
from megatron_lsh.lsh.cluster import Clusters, expert_of_row, number_by_first_row, pack_codes
from megatron_lsh.lsh.hash import codes_of


def row_budgets(counts_E: Tensor, rate: float) -> Tensor:
    """Clusters each expert may use: ``ceil(rate * n)``, int64 [E].

    Rounding noise is taken off first, so that a tenth of 30 rows (3.0000000000000004 in floating point) is 3.
    """
    return torch.ceil(counts_E.double() * rate - 1e-9).to(torch.int64).minimum(counts_E)


@torch.no_grad()
def cluster_projection(
    projection_NP: Tensor,
    counts_E: Tensor,
    budgets_E: Tensor,
    num_clusters: int,
    num_hashes: int,
    index_N: Tensor | None = None,
) -> Clusters:
    """Hash projected rows and cut at the budgets: :func:`codes_of` and :func:`cluster_by_budget` in one.

    Args:
        projection_NP: fp32, from :func:`megatron_lsh.lsh.project`, rows sorted by expert; P = Q W.
        counts_E, budgets_E, num_clusters: see :func:`cluster_by_budget`.
        num_hashes: Q.
        index_N: int64; row n is then ``projection[index_N[n]]``, so that a token need not be projected for each choice.
    """
    num_codes = 2 * (projection_NP.shape[1] // num_hashes)
    code_bits = (num_codes - 1).bit_length()
    key_fits = counts_E.shape[0].bit_length() + num_hashes * code_bits <= 63
    if not key_fits or not kernels.usable(projection_NP):
        projection_NP = projection_NP if index_N is None else projection_NP[index_N]
        codes_NQ = codes_of(projection_NP, num_hashes)
        return cluster_by_budget(codes_NQ, projection_NP, counts_E, budgets_E, num_clusters, num_codes)
    ops, row_ends_E = torch.ops.megatron_lsh, counts_E.cumsum(0)
    key_N = ops.hash(projection_NP, index_N, row_ends_E, num_hashes, code_bits)
    cluster_N, order_N, sizes_C, offsets_C = ops.plan(
        key_N, projection_NP, index_N, row_ends_E, budgets_E.cumsum(0), num_clusters, num_hashes, code_bits
    )
    return Clusters(cluster_N, sizes_C, budgets_E, order_N, offsets_C)


@torch.no_grad()
def cluster_by_budget(
    codes_NQ: Tensor, projection_NP: Tensor, counts_E: Tensor, budgets_E: Tensor, num_clusters: int, num_codes: int
) -> Clusters:
    """Cut the sorted rows of every expert at its budget's weakest links.

    Args:
        codes_NQ: int64 in [0, num_codes), rows sorted by expert.
        projection_NP: what the hashes looked at; distances between neighbours are measured in it (a random projection
            keeps them, Johnson-Lindenstrauss, at a fraction of D).
        counts_E: int64, rows per expert.
        budgets_E: int64, clusters per expert: at least 1 where it has rows, at most their number.
        num_clusters: the sum of the budgets. The caller knows it on the host, so that nothing here waits for the device.
        num_codes: values one code can take.
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
    sizes_C = cluster_sizes(cluster_N, num_clusters)
    return Clusters.from_assignment(*number_by_first_row(cluster_N, sizes_C), budgets_E)


def cluster_sizes(cluster_N: Tensor, num_clusters: int) -> Tensor:
    """int64 [C], rows per cluster. (``bincount`` would wait for the device.)"""
    sizes_C = torch.zeros(num_clusters, dtype=torch.int64, device=cluster_N.device)
    return sizes_C.scatter_add_(0, cluster_N, torch.ones_like(cluster_N))


def _link_strength(codes_NQ: Tensor, projection_NP: Tensor, expert_N: Tensor) -> Tensor:
    """fp64 [N]: how strongly each sorted row is tied to its predecessor; lowest at the first row of an expert."""
    strength_N = torch.full(codes_NQ.shape[:1], -2.0, dtype=torch.float64, device=codes_NQ.device)
    lcp_N = (codes_NQ[1:] == codes_NQ[:-1]).cumprod(1).sum(1)
    gap_N = (projection_NP[1:] - projection_NP[:-1]).double().square().sum(1)
    # One number orders both criteria: the gap takes off less than 1, so it only decides among equal prefixes.
    linked_N = expert_N[1:] == expert_N[:-1]
    strength_N[1:] = torch.where(linked_N, lcp_N - gap_N / (gap_N + 1), -2.0)
    return strength_N
