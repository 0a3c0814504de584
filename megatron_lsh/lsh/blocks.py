"""Blocks: an expert's representatives in runs, each of which one function is fitted to; and the rows that it moves.

Everything is padded to one batch: G blocks of B places, of which each has its width. Which rows are whose is known on the
device alone, the widths on the host, so nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lsh.lsh.cluster import Clusters
from megatron_lsh.ops import Groups, to_device


def block_widths(counts: Sequence[int], most: int) -> list[int]:
    """Each expert's clusters in runs of equal length, give or take one, of at most this many.

    Neighbours in number are neighbours in the text. Blocks of neighbours in hash order or in space would take off another
    tenth or fifth of the error, too little to sort for: what counts is how many representatives a function is fitted to.
    """
    widths = []
    for count in counts:
        pieces = -(-count // most)
        widths += [count * (piece + 1) // pieces - count * piece // pieces for piece in range(pieces)]
    return widths


@dataclass(frozen=True)
class Blocks:
    """Which rows are moved by the function of which block. Rows are in an order of their own: first those that move, sorted
    by cluster, then those that take their representative's output as it is.

    Attributes:
        shape: G and B.
        slot_C: int64, the place of each cluster among the G B of all blocks.
        valid_GB: bool, the places that a cluster has.
        width_G1: valid places, in the dtype of sums.
        block_R: int64, the block of each row, and
        inverse_R: the place of each row in the order here.
        block_N, slot_N: int64, the block and the cluster's place, of the row at this place.
        rows: the moving rows of each block, and the order of rows here; at its places ``place_N``.
        points: the clusters of each block.
        moving: ``order``, ``offsets`` and ``sizes`` of the moving rows by cluster, for ``segment``.
    """

    shape: tuple[int, int]
    slot_C: Tensor
    valid_GB: Tensor
    width_G1: Tensor
    block_R: Tensor
    inverse_R: Tensor
    block_N: Tensor
    slot_N: Tensor
    place_N: Tensor
    rows: Groups
    points: Groups
    moving: tuple[Tensor, Tensor, Tensor]

    @property
    def places(self) -> Groups:
        """``rows``, for tensors whose rows are in the order here already."""
        return self.rows._replace(order=None)

    def placed(self) -> Blocks:
        """The same, for rows that are in the order here already."""
        there = self.place_N
        rows, moving = self.rows._replace(order=there), (there, *self.moving[1:])
        return replace(self, block_R=self.block_N, inverse_R=there, rows=rows, moving=moving)

    @staticmethod
    def of(clusters: Clusters, member_C: Tensor | None, most: int, counts: Sequence[int], dtype: torch.dtype) -> Blocks:
        """
        Args:
            member_C: int64, the rows that are representatives, if these are rows.
            most: places of a block at most.
            counts: clusters per expert.
            dtype: of the arithmetic.
        """
        device, num_clusters, num_rows = clusters.cluster_N.device, clusters.num_clusters, clusters.num_rows
        widths = block_widths(counts, most)
        groups, block = len(widths), max(widths)
        width_G = to_device(torch.tensor(widths, dtype=torch.int64), device)
        end_G = width_G.cumsum(0)
        numbers_C = torch.arange(num_clusters, device=device)
        block_C = torch.arange(groups, device=device).repeat_interleave(width_G, output_size=num_clusters)
        slot_C = block_C * block + numbers_C - (end_G - width_G)[block_C]

        # Rows take their representative's output where they are it, or where it is the only one.
        moves_C = (width_G[block_C] > 1) & (clusters.sizes_C > 1)
        moves_N = moves_C.index_select(0, clusters.cluster_N)
        place_N = torch.arange(num_rows, device=device)
        if member_C is not None:
            # (An empty cluster's member is another's row.)
            moves_N = moves_N & (member_C.index_select(0, clusters.cluster_N) != place_N)
        moves_N = moves_N.index_select(0, clusters.order_N)
        before_N = F.pad(moves_N.cumsum(0), (1, 0))  # moving rows before each place
        moving = before_N[-1]
        to_N = torch.where(moves_N, before_N[:-1], moving + place_N - before_N[:-1])
        order_N = torch.empty_like(to_N).scatter_(0, to_N, clusters.order_N)
        own_N = clusters.cluster_N.index_select(0, order_N)

        begin_C, end_C = before_N[clusters.offsets_C], before_N[clusters.offsets_C + clusters.sizes_C]
        start_G, stop_G = begin_C[end_G - width_G], end_C[end_G - 1]
        return Blocks(
            shape=(groups, block),
            slot_C=slot_C,
            valid_GB=torch.arange(block, device=device) < width_G.unsqueeze(1),
            width_G1=width_G.unsqueeze(1).to(dtype),
            block_R=block_C.index_select(0, clusters.cluster_N),
            inverse_R=torch.empty_like(to_N).scatter_(0, order_N, place_N),
            block_N=block_C.index_select(0, own_N),
            slot_N=slot_C.index_select(0, own_N),
            place_N=place_N,
            rows=Groups(start_G, stop_G - start_G, width_G, order_N),
            points=Groups(end_G - width_G, width_G, width_G),
            moving=(order_N, begin_C, end_C - begin_C),
        )
