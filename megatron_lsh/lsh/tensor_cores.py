"""Interpolated restoration in products of bf16, which a GPU's tensor cores do fifteen times as fast as those of fp32.

The same as the form "weights" of interpolate.py, and as exact as bf16 outputs deserve, because nothing is rounded but
small differences. With d = x - c_j the distance of a row from its representative, and t its change of exponent,

    k_i(x) - k_i(c_j) = K_ji (exp t_i - 1),        t_i = (2 d c_i - 2 d c_j - |d|^2) / s

so a product of d with all representatives takes the place of the distances, and rounding it costs a share of the change
and not of k. Then A = (k(x) - k(c_j)) M' with M' = (K + ridge I)^-1 less the mean of its rows: both factors are split into
two numbers of bf16, because M' is large (up to 1 / ridge) and its terms cancel. change = A Y, as before.

One more column of M' holds that mean: what it makes of the rows is needed for the gradient of K.

Rows stay where they are if each expert has one block: they are sorted by expert. Else they are put in the order of
their clusters. Rows that were sent are among them, with weights of zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_lsh.lsh.blocks import block_widths
from megatron_lsh.lsh.cluster import Clusters
from megatron_lsh.lsh.solve import inverse
from megatron_lsh.ops import PlainOps, accumulator, choose, to_device
from megatron_lsh.ops.groups import grouped_mm, why_not_grouped

#: Places of a block are a multiple of this, one of them spare: rows of bf16 then begin at multiples of 16 bytes.
_STEP = 8


def has_tensor_cores(rows_ND: Tensor) -> bool:
    """Whether these rows are interpolated here: they are bf16, on a GPU with a kernel for grouped products, and kernels are
    not switched off."""
    by_kernels = type(choose(rows_ND)) is not PlainOps
    return by_kernels and why_not_grouped(rows_ND.dtype, rows_ND.device, rows_ND.shape[1:]) is None


def prepare_by_differences(
    rows_ND: Tensor,
    representatives_CD: Tensor,
    clusters: Clusters,
    member_C: Tensor | None = None,
    *,
    block: int,
    ridge: float,
    width: float,
) -> Callable[[Tensor], Tensor]:
    """As :func:`~megatron_lsh.lsh.interpolate.prepare_interpolation`; products are in the dtype of the rows."""
    runs, ops = Runs.of(clusters, member_C, block), choose(rows_ND)
    weights_NB = _Weights.apply(rows_ND, representatives_CD, runs, ops, ridge, width)
    return lambda expert_out_CD: _Weighted.apply(weights_NB, expert_out_CD, clusters, runs, ops)


class Runs(NamedTuple):
    """Which rows are whose. G blocks of B places, of which each has its width; rows here are in the order of their places.

    Attributes:
        places: B.
        starts_G, widths_G: int64, the clusters of each block.
        slot_C: int64, the place of each cluster among the G B of all blocks.
        ends_G: int32, where the rows of each block end.
        order_N, back_N: int64, the row at each place, and the place of each row; None where they are the same.
        cluster_N, slot_N: int64, of the row at each place: its cluster, and that one's place among all.
        moves_N: bool, rows that are not what was sent for them.
        segments: int64 order, offsets and sizes of the rows here by cluster, for ``segment``.
    """

    places: int
    starts_G: Tensor
    widths_G: Tensor
    slot_C: Tensor
    ends_G: Tensor
    order_N: Tensor | None
    back_N: Tensor | None
    cluster_N: Tensor
    slot_N: Tensor
    moves_N: Tensor
    segments: tuple[Tensor, Tensor, Tensor]

    @staticmethod
    def of(clusters: Clusters, member_C: Tensor | None, most: int) -> Runs:
        """
        Args:
            member_C: int64, the rows that are representatives, if these are rows.
            most: representatives of a block at most.
        """
        device, counts, count = clusters.cluster_N.device, clusters.counts_on_host(), clusters.num_clusters
        widths = block_widths(counts, most)
        groups, places = len(widths), -(-(max(widths) + 1) // _STEP) * _STEP
        # All that the host knows goes to the device at once. (NumPy: torch would start threads for it.)
        width = np.array(widths)
        start = width.cumsum() - width
        slot = np.arange(count) + np.repeat(np.arange(groups) * places - start, width)
        host = torch.from_numpy(np.concatenate([slot, start, width, start + width - 1]))
        slot_C, starts_G, widths_G, last_G = to_device(host, device).split([count, groups, groups, groups])

        order_N = back_N = None
        cluster_N, segments, number_N = (
            clusters.cluster_N,
            clusters.segments,
            torch.arange(clusters.num_rows, device=device),
        )
        if groups > sum(each > 0 for each in counts):
            order_N, cluster_N = clusters.order_N, cluster_N.index_select(0, clusters.order_N)
            back_N = torch.empty_like(order_N).scatter_(0, order_N, number_N)
            segments, number_N = (number_N, clusters.offsets_C, clusters.sizes_C), order_N
        if member_C is None:
            moves_N = clusters.sizes_C.index_select(0, cluster_N) > 1
        else:
            moves_N = member_C.index_select(0, cluster_N) != number_N
        return Runs(
            places=places,
            starts_G=starts_G,
            widths_G=widths_G,
            slot_C=slot_C,
            ends_G=(clusters.offsets_C + clusters.sizes_C).index_select(0, last_G).int(),
            order_N=order_N,
            back_N=back_N,
            cluster_N=cluster_N,
            slot_N=slot_C.index_select(0, cluster_N),
            moves_N=moves_N,
            segments=segments,
        )

    def placed(self, ops: PlainOps, x_CD: Tensor, mean_GD: Tensor | None = None) -> Tensor:
        """[G, B, D]: what belongs to clusters, in their places, less their block's mean; zero elsewhere."""
        return ops.place(x_CD, self.starts_G, self.widths_G, mean_GD, self.places)

    def centred(self, ops: PlainOps, x_CD: Tensor) -> Tensor:
        """The same, less the mean over the block: that changes no distance, and keeps what is rounded small."""
        number_C = torch.arange(x_CD.shape[0], device=x_CD.device)
        return self.placed(ops, x_CD, ops.segment(x_CD, None, None, number_C, self.starts_G, self.widths_G, True))


def _wide_product(a_GXY: Tensor, b_GYZ: Tensor) -> Tensor:
    """Of numbers of bf16, with all digits of their sums."""
    dtype = accumulator(a_GXY.dtype)
    if a_GXY.is_cuda and a_GXY.dtype != dtype:
        return torch.bmm(a_GXY, b_GYZ, out_dtype=dtype)
    return torch.bmm(a_GXY.to(dtype), b_GYZ.to(dtype))


class _Weights(torch.autograd.Function):
    """A [N, B], by place; the last column is the mean of what its row was before it was centred."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_ND: Tensor,
        representatives_CD: Tensor,
        runs: Runs,
        ops: PlainOps,
        ridge: float,
        width: float,
    ) -> Tensor:
        ctx.runs, ctx.ops = runs, ops
        c_GBD = runs.centred(ops, representatives_CD)
        products_GBB = _wide_product(c_GBD, c_GBD.transpose(1, 2))
        scale_G, among_GBB, system_GBB = ops.fit(products_GBB, runs.widths_G, ridge, width)
        forward_GXB, backward_GXB = ops.split(inverse(system_GBB, ops), runs.widths_G, rows_ND.dtype)
        offset_ND, square_N = ops.differences(rows_ND, runs.order_N, runs.cluster_N, representatives_CD)
        around_NB = grouped_mm(offset_ND, c_GBD.transpose(1, 2), runs.ends_G)
        changes_NX = ops.changes(around_NB, square_N, runs.slot_N, runs.moves_N, among_GBB, scale_G)
        weights_NB = grouped_mm(changes_NX, forward_GXB, runs.ends_G)
        ctx.save_for_backward(
            rows_ND, representatives_CD, backward_GXB, weights_NB, around_NB, square_N, among_GBB, scale_G
        )  # fmt: skip
        return weights_NB

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        """With D = k(x) - K_own and U = D (K + ridge I)^-1: dD = dA M', and K receives -(U + onehot(own))^T dD.

        With Z = -|a - b|^2 / s and k = exp Z: dZ = dk k. Rows and their own representatives pull at a pair of
        representatives in opposite directions: what is left is dD (k - K_own), which is small.
        """
        runs: Runs = ctx.runs
        ops: PlainOps = ctx.ops
        rows_ND, representatives_CD, backward_GXB, weights_NB, around_NB, square_N, among_GBB, scale_G = (
            ctx.saved_tensors
        )
        grad_NB = grads[0]
        grad_NB = grouped_mm(torch.cat([grad_NB, grad_NB], 1), backward_GXB, runs.ends_G)
        moving_NB, difference_NB, pull_NB, to_own_NB, pull_N = ops.changes_backward(
            grad_NB, around_NB, square_N, runs.slot_N, runs.moves_N, among_GBB, scale_G
        )
        c_GBD = runs.centred(ops, representatives_CD)
        offset_ND, _ = ops.differences(rows_ND, runs.order_N, runs.cluster_N, representatives_CD)
        grad_rows_ND = ops.less(grouped_mm(to_own_NB, c_GBD, runs.ends_G), pull_N, offset_ND, runs.order_N)
        by_own_CB, difference_CB = (
            ops.segment(x, None, None, *runs.segments, False) for x in (moving_NB, difference_NB)
        )
        by_inverse_GBB = grouped_mm(weights_NB.t(), moving_NB, runs.ends_G)
        pairs_GBB = ops.pairs(
            by_own_CB, difference_CB, by_inverse_GBB, among_GBB, scale_G, runs.starts_G, runs.widths_G
        )  # fmt: skip
        grad_c_GBD = torch.baddbmm(grouped_mm(pull_NB.t(), offset_ND, runs.ends_G), pairs_GBB, c_GBD)
        return grad_rows_ND, grad_c_GBD.flatten(0, 1).index_select(0, runs.slot_C), None, None, None, None


class _Weighted(torch.autograd.Function):
    """E(c_own) + A Y [N, D], by row."""

    @staticmethod
    def forward(
        ctx: Any, weights_NB: Tensor, expert_out_CD: Tensor, clusters: Clusters, runs: Runs, ops: PlainOps
    ) -> Tensor:
        ctx.runs, ctx.ops = runs, ops
        ctx.save_for_backward(weights_NB, expert_out_CD)
        change_ND = grouped_mm(weights_NB, runs.placed(ops, expert_out_CD.to(weights_NB.dtype)), runs.ends_G)
        change_ND = change_ND if runs.back_N is None else change_ND.index_select(0, runs.back_N)
        return ops.combine(
            expert_out_CD, clusters.cluster_N.unsqueeze(1), None, change_ND.to(expert_out_CD.dtype), None
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        runs: Runs = ctx.runs
        ops: PlainOps = ctx.ops
        weights_NB, expert_out_CD = ctx.saved_tensors
        grad_ND = grads[0].to(weights_NB.dtype)
        grad_ND = grad_ND.contiguous() if runs.order_N is None else grad_ND.index_select(0, runs.order_N)
        outputs_GBD = runs.placed(ops, expert_out_CD.to(weights_NB.dtype))
        grad_weights_NB = grouped_mm(grad_ND, outputs_GBD.transpose(1, 2), runs.ends_G)
        grad_out_GBD = grouped_mm(weights_NB.t(), grad_ND, runs.ends_G)
        grad_out_CD = ops.segment(grad_ND, None, None, *runs.segments, False)
        grad_out_CD.add_(grad_out_GBD.flatten(0, 1).index_select(0, runs.slot_C))
        return grad_weights_NB, grad_out_CD.to(expert_out_CD.dtype), None, None, None
