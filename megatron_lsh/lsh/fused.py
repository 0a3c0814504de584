"""The same method on tokens instead of rows: nothing of size [N, D] is ever written.

Routing turns T tokens into N = T K rows, K copies of each token sorted by expert. Here a row is only a number,
``token_of_row_N``: hashing projects each token once, distances and means read tokens where they lie, and the restored rows
exist only in registers on their way into the weighted sum of a token,

    y_t = sum_k p_tk (E(c_j) + x_t - c_j),    j = cluster_of_slot_TK[t, k].

Values and gradients are those of :func:`megatron_lsh.lsh.compress`, :func:`megatron_lsh.lsh.restore` and the unpermutation
one after the other:

    compress:  c_j = mean of the rows of cluster j                      dx_t = sum_k gc_j / n_j
    restore:   y_t as above                                             dE_j = G_j = sum of p_tk gy_t over the cluster
                                                                        dp_tk = <gy_t, E_j + x_t - c_j>
                                                                        dx_t = sum_k (p_tk gy_t - G_j / n_j)

c is a function of x. Its part in restore's derivative is the mean in the last bracket, so restore sends no gradient to
its argument ``centroids_CD``; see ``docs/kernels.md``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_lsh.lsh.cluster import Clusters
from megatron_lsh.lsh.compress import Compress
from megatron_lsh.ops import by_row, choose


def clusters_of_slots(clusters: Clusters, row_of_TK: Tensor) -> Tensor:
    """int64 [T, K]: the cluster of each (token, choice); -1 where ``row_of_TK`` is -1."""
    if clusters.num_rows == 0:
        return row_of_TK
    return torch.where(row_of_TK < 0, -1, clusters.cluster_N[row_of_TK.clamp(min=0)])


def compress_tokens(x_TD: Tensor, token_of_row_N: Tensor, clusters: Clusters, cluster_of_slot_TK: Tensor) -> Tensor:
    """Centroids [C, D] of the clusters' rows; differentiable in ``x_TD``."""
    return Compress.apply(x_TD, token_of_row_N, cluster_of_slot_TK, *clusters.segments, False)[0]


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
    return _RestoreTokens.apply(
        expert_out_CD, probs_TK, x_TD, centroids_CD, token_of_row_N, row_of_TK, cluster_of_slot_TK, *clusters.segments
    )


class _RestoreTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        expert_out_CD: Tensor,
        probs_TK: Tensor,
        x_TD: Tensor | None,
        centroids_CD: Tensor | None,
        token_of_row_N: Tensor,
        row_of_TK: Tensor,
        cluster_of_slot_TK: Tensor,
        order_N: Tensor,
        offsets_C: Tensor,
        sizes_C: Tensor,
    ) -> Tensor:
        ctx.ops = choose(expert_out_CD)
        ctx.save_for_backward(
            expert_out_CD, probs_TK, x_TD, centroids_CD, token_of_row_N, row_of_TK, cluster_of_slot_TK,
            order_N, offsets_C, sizes_C,
        )  # fmt: skip
        row_TD = None if centroids_CD is None else x_TD
        return ctx.ops.combine(expert_out_CD, cluster_of_slot_TK, probs_TK, row_TD, centroids_CD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TD,) = grads
        out_CD, probs_TK, x_TD, centroids_CD, token_of_row_N, row_of_TK, cluster_TK, *segments = ctx.saved_tensors
        ops, row_TD = ctx.ops, None if centroids_CD is None else x_TD
        probs_N = by_row(probs_TK, row_of_TK, token_of_row_N.shape[0])
        grad_out_CD = ops.segment(grad_TD, token_of_row_N, probs_N, *segments, False)
        grad_probs_TK = grad_x_TD = None
        if ctx.needs_input_grad[1]:
            grad_probs_TK = ops.dots(grad_TD, out_CD, cluster_TK, row_TD, centroids_CD).to(probs_TK.dtype)
        if x_TD is not None and ctx.needs_input_grad[2]:
            grad_x_TD = ops.spread(grad_TD, probs_TK, grad_out_CD, None, cluster_TK, segments[2])
        return grad_out_CD, grad_probs_TK, grad_x_TD, *([None] * 7)
