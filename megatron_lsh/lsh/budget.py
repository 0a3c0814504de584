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

from megatron_lsh.lsh.cluster import Clusters
from megatron_lsh.ops import choose
from megatron_lsh.ops.clustering import cut_at_budgets


def row_budgets(counts_E: Tensor, rate: float) -> Tensor:
    """Clusters each expert may use: ``ceil(rate * n)``, int64 [E]; at least 1 where there are rows.

    Rounding noise is taken off first, so that a tenth of 30 rows (3.0000000000000004 in floating point) is 3.
    """
    return torch.ceil(counts_E.double() * rate - 1e-9).to(torch.int64).clamp(min=1).minimum(counts_E)


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
    cluster_N, order_N, sizes_C, offsets_C = choose(projection_NP).plan(
        projection_NP, index_N, counts_E.cumsum(0), budgets_E.cumsum(0), num_clusters, num_hashes
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
    cluster_N, order_N, sizes_C, offsets_C = cut_at_budgets(
        codes_NQ, projection_NP, counts_E, budgets_E, num_clusters, num_codes
    )
    return Clusters(cluster_N, sizes_C, budgets_E, order_N, offsets_C)
