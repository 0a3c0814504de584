"""Clusters of rows: within each expert, rows whose codes all agree form one cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lsh.ops.clustering import expert_of_row, in_order, number_by_first_row, pack_codes


class _Derived:
    """What follows from the fields of :class:`Clusters` and is asked for often.

    Attributes:
        num_rows, num_clusters: N and C.
        segments: order, offsets and sizes, as the operations of ``ops/`` want them.
        counts: ``counts_E`` as numbers, where somebody knows them (:meth:`Clusters.known`), and
        rows: the rows per expert, likewise.
    """

    # Set at once: a cached_property takes a lock before Python 3.12, which torch.compile cannot trace.
    num_rows: int
    num_clusters: int
    segments: tuple[Tensor, Tensor, Tensor]
    counts: Sequence[int] | None
    rows: Sequence[int] | None


@dataclass(frozen=True)
class Clusters(_Derived):
    """Which rows travel together. All tensors live on the device of the rows.

    Attributes:
        cluster_N: int64, cluster of each row, in [0, C). Clusters are numbered by their first rows, so that the
            centroids of one expert are contiguous.
        sizes_C: int64, rows per cluster.
        counts_E: int64, clusters per expert; sums to C.
        order_N: int64, rows sorted by cluster (stable: equal clusters keep row order).
        offsets_C: int64, start of each cluster in ``order_N``.
    """

    cluster_N: Tensor
    sizes_C: Tensor
    counts_E: Tensor
    order_N: Tensor
    offsets_C: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_rows", self.cluster_N.shape[0])
        object.__setattr__(self, "num_clusters", self.sizes_C.shape[0])
        object.__setattr__(self, "segments", (self.order_N, self.offsets_C, self.sizes_C))
        self.known(None)

    def known(self, counts: Sequence[int] | None, rows: Sequence[int] | None = None) -> Clusters:
        """These clusters, with clusters and rows per expert on the host: who asks for them need not wait for the device."""
        object.__setattr__(self, "counts", counts)
        object.__setattr__(self, "rows", rows)
        return self

    def counts_on_host(self) -> Sequence[int]:
        """Waits for the device unless they are known."""
        return self.counts_E.tolist() if self.counts is None else self.counts

    @staticmethod
    def from_assignment(cluster_N: Tensor, sizes_C: Tensor, counts_E: Tensor) -> Clusters:
        """Complete an assignment of rows to clusters with the order the segment sums need."""
        cluster_N, order_N, sizes_C, offsets_C = in_order(cluster_N, sizes_C)
        return Clusters(cluster_N, sizes_C, counts_E, order_N, offsets_C)


@torch.no_grad()
def cluster_by_code(codes_NQ: Tensor, counts_E: Tensor, num_codes: int) -> Clusters:
    """Group the rows of each expert that agree in all Q codes (the paper's buckets).

    Args:
        codes_NQ: int64 in [0, num_codes), rows sorted by expert.
        counts_E: int64, rows per expert; sums to N.
        num_codes: values one code can take, 2 W for cross-polytope hashes.

    The number of clusters depends on the data, so this synchronises with the host once.
    """
    expert_N = expert_of_row(counts_E, codes_NQ.shape[0])
    key_N = pack_codes(expert_N, counts_E.shape[0], codes_NQ, num_codes)
    _, cluster_N, sizes_C = torch.unique(key_N, return_inverse=True, return_counts=True)
    cluster_N, sizes_C = number_by_first_row(cluster_N, sizes_C)
    return Clusters.from_assignment(cluster_N, sizes_C, _clusters_per_expert(cluster_N, counts_E))


def _clusters_per_expert(cluster_N: Tensor, counts_E: Tensor) -> Tensor:
    """Count the clusters of each expert, given that clusters are numbered in expert order."""
    if cluster_N.shape[0] == 0:
        return torch.zeros_like(counts_E)
    # The largest cluster number up to an expert's last row ends its range; an empty expert repeats its predecessor's.
    end_N = cluster_N.cummax(0).values + 1
    row_end_E = counts_E.cumsum(0)
    end_E = torch.where(row_end_E > 0, end_N[(row_end_E - 1).clamp(min=0)], 0)
    return end_E.diff(prepend=end_E.new_zeros(1))
