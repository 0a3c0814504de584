"""The same method on tokens instead of rows, where there are kernels: nothing of size [N, D] is ever written.

Routing turns T tokens into N = T K rows, K copies of each token sorted by expert. Here a row is only a number,
``token_of_row_N``: hashing projects each token once, distances and means read tokens where they lie, and the restored rows
exist only in registers on their way into the weighted sum of a token,

    y_t = sum_k p_tk (E(c_j) + x_t - c_j),    j = cluster_of_slot_TK[t, k].

Values and gradients are those of :func:`megatron_lsh.lsh.compress`, :func:`megatron_lsh.lsh.restore` and the unpermutation
one after the other. Everything here needs :func:`megatron_lsh.lsh.kernels.usable`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lsh.lsh.cluster import Clusters


def clusters_of_slots(clusters: Clusters, row_of_TK: Tensor) -> Tensor:
    """int64 [T, K]: the cluster of each (token, choice); -1 where ``row_of_TK`` is -1."""
    if clusters.num_rows == 0:
        return row_of_TK
    return torch.where(row_of_TK < 0, -1, clusters.cluster_N[row_of_TK.clamp(min=0)])


def compress_tokens(x_TD: Tensor, token_of_row_N: Tensor, clusters: Clusters, cluster_of_slot_TK: Tensor) -> Tensor:
    """Centroids [C, D] of the clusters' rows; differentiable in ``x_TD``."""
    order = (clusters.order_N, clusters.offsets_C, clusters.sizes_C)
    return torch.ops.megatron_lsh.compress(x_TD, token_of_row_N, *order, cluster_of_slot_TK)


def restore_tokens(
    expert_out_CD: Tensor,
    probs_TK: Tensor,
    x_TD: Tensor | None,
    centroids_CD: Tensor | None,
    token_of_row_N: Tensor,
    row_of_TK: Tensor,
    clusters: Clusters,
    cluster_of_slot_TK: Tensor,
) -> Tensor:
    """The weighted sum of each token's restored rows, [T, D]; differentiable in outputs, weights and tokens.

    Args:
        expert_out_CD: the experts' outputs on the centroids.
        probs_TK: routing weights, fp32 (fp64 with fp64 rows).
        x_TD, centroids_CD: both for ``--lsh-residual identity``; tokens alone for the gradient of the identity without its
            value (``--lsh-gradient straight-through``); neither for no residual. Gradients that belong to the centroids
            reach the tokens through ``x_TD``, so ``centroids_CD`` itself receives none.
        token_of_row_N, row_of_TK: the permutation.
    """
    order = (clusters.order_N, clusters.offsets_C, clusters.sizes_C)
    return torch.ops.megatron_lsh.restore(
        expert_out_CD, probs_TK, x_TD, centroids_CD, token_of_row_N, row_of_TK, *order, cluster_of_slot_TK
    )
