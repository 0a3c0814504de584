"""Sums and means of rows per cluster: the one reduction that compression and its backward need."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lsh.lsh import kernels
from megatron_lsh.lsh.cluster import Clusters


def segment_sum(rows_ND: Tensor, clusters: Clusters) -> Tensor:
    """Sum the rows of every cluster: [C, D] in the dtype of ``rows_ND``."""
    return _reduce(rows_ND, clusters, "sum")


def segment_mean(rows_ND: Tensor, clusters: Clusters) -> Tensor:
    """Mean of the rows of every cluster: [C, D] in the dtype of ``rows_ND``."""
    return _reduce(rows_ND, clusters, "mean")


def _reduce(rows_ND: Tensor, clusters: Clusters, mode: str) -> Tensor:
    if kernels.usable(rows_ND):
        return torch.ops.megatron_lsh.segment(
            rows_ND, None, None, clusters.order_N, clusters.offsets_C, clusters.sizes_C, mode == "mean"
        )
    # embedding_bag is torch's fused gather-and-reduce: it reads each row once, accumulates bf16 in fp32, and its forward
    # is deterministic on GPUs too (a thread walks a bag in order), which index_add is not. A cluster of one row returns
    # that row to the bit.
    if clusters.num_clusters == 0:
        return rows_ND.new_zeros(0, rows_ND.shape[1])
    return F.embedding_bag(clusters.order_N, rows_ND, clusters.offsets_C, mode=mode)
