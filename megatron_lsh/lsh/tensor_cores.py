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
from megatron_lsh.ops import PlainOps, accumulator, choose
from megatron_lsh.ops.groups import grouped_mm, why_not_grouped

#: Places of a block are a multiple of this, one of them spare: rows of bf16 then begin at multiples of 16 bytes.
_STEP = 8
#: exp of it times the least K there is would still be finite. An exponent that grows more is that of a row of which its own
#: representative knows nothing.
_MOST = 80.0


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
    runs = Runs.of(clusters, member_C, block)
    weights_NB = _Weights.apply(rows_ND, representatives_CD, runs, ridge, width)
    return lambda expert_out_CD: _Weighted.apply(weights_NB, expert_out_CD, clusters, runs)


class Runs(NamedTuple):
    """Which rows are whose. G blocks of B places, of which each has its width; rows here are in the order of their places.

    Attributes:
        shape: G and B.
        slot_C: int64, the place of each cluster among the G B of all blocks.
        valid_GB: bool, the places that a cluster has.
        width_G1: valid places, in the dtype of sums.
        ends_G: int32, where the rows of each block end.
        order_N, back_N: int64, the row at each place, and the place of each row; None where they are the same.
        cluster_N, slot_N, block_N, own_N: int64, of the row at each place: its cluster, that one's place among all and in
            its block, and the block.
        moves_N1: bool, rows that are not what was sent for them.
        segments: int64 order, offsets and sizes of the rows here by cluster, for ``segment``.
    """

    shape: tuple[int, int]
    slot_C: Tensor
    valid_GB: Tensor
    width_G1: Tensor
    ends_G: Tensor
    order_N: Tensor | None
    back_N: Tensor | None
    cluster_N: Tensor
    slot_N: Tensor
    block_N: Tensor
    own_N: Tensor
    moves_N1: Tensor
    segments: tuple[Tensor, Tensor, Tensor]

    @staticmethod
    def of(clusters: Clusters, member_C: Tensor | None, most: int) -> Runs:
        """
        Args:
            member_C: int64, the rows that are representatives, if these are rows.
            most: representatives of a block at most.
        """
        device, counts = clusters.cluster_N.device, clusters.counts_on_host()
        widths = block_widths(counts, most)
        groups, places = len(widths), -(-(max(widths) + 1) // _STEP) * _STEP
        # All that the host knows goes to the device at once. (NumPy: torch would start threads for it.)
        width = np.array(widths)
        end = width.cumsum()
        slot = np.arange(clusters.num_clusters) + np.repeat(np.arange(groups) * places - (end - width), width)
        host = torch.from_numpy(np.concatenate([slot, end - 1, width]))
        there = host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
        slot_C, last_G, width_G = there.split([clusters.num_clusters, groups, groups])

        order_N = back_N = None
        cluster_N, segments, number_N = (
            clusters.cluster_N,
            clusters.segments,
            torch.arange(clusters.num_rows, device=device),
        )
        if groups > sum(count > 0 for count in counts):
            order_N, cluster_N = clusters.order_N, cluster_N.index_select(0, clusters.order_N)
            back_N = torch.empty_like(order_N).scatter_(0, order_N, number_N)
            segments, number_N = (number_N, clusters.offsets_C, clusters.sizes_C), order_N
        slot_N = slot_C.index_select(0, cluster_N)
        if member_C is None:
            moves_N = clusters.sizes_C.index_select(0, cluster_N) > 1
        else:
            moves_N = member_C.index_select(0, cluster_N) != number_N
        block_N = torch.div(slot_N, places, rounding_mode="floor")
        return Runs(
            shape=(groups, places),
            slot_C=slot_C,
            valid_GB=torch.arange(places, device=device) < width_G.unsqueeze(1),
            width_G1=width_G.unsqueeze(1).double(),
            ends_G=(clusters.offsets_C + clusters.sizes_C).index_select(0, last_G).int(),
            order_N=order_N,
            back_N=back_N,
            cluster_N=cluster_N,
            slot_N=slot_N,
            block_N=block_N,
            own_N=slot_N - block_N * places,
            moves_N1=moves_N.unsqueeze(1),
            segments=segments,
        )

    def placed(self, x_ND: Tensor) -> Tensor:
        """Rows in the order here, and contiguous."""
        return x_ND.contiguous() if self.order_N is None else x_ND.index_select(0, self.order_N)

    def back(self, x_ND: Tensor) -> Tensor:
        """The inverse of :meth:`placed`."""
        return x_ND if self.back_N is None else x_ND.index_select(0, self.back_N)

    def pad(self, x_CX: Tensor) -> Tensor:
        """[G, B, X]: what belongs to clusters, in their places; zero elsewhere."""
        groups, places = self.shape
        padded = x_CX.new_zeros(groups * places, x_CX.shape[1]).index_copy_(0, self.slot_C, x_CX)
        return padded.view(groups, places, -1)

    def unpad(self, x_GBX: Tensor) -> Tensor:
        """[C, X]: the inverse of :meth:`pad`."""
        return x_GBX.flatten(0, 1).index_select(0, self.slot_C)


class _Exponents(NamedTuple):
    """What k(x) - k(c_own) is made of; see the module's docstring.

    Attributes:
        around_NB: d c_i, in the dtype of the rows.
        square_N: |d|^2.
        scale_G: s.
        among_GBB: K; zero where there is no representative.
    """

    around_NB: Tensor
    square_N: Tensor
    scale_G: Tensor
    among_GBB: Tensor

    def rise(self, runs: Runs) -> tuple[Tensor, Tensor]:
        """exp t - 1 and K_own [N, B]."""
        factor_N1 = (2 / self.scale_G).index_select(0, runs.block_N).unsqueeze(1)
        own_N1 = self.around_NB.gather(1, runs.own_N.unsqueeze(1)).to(factor_N1.dtype)
        own_N1 = (own_N1 + self.square_N.unsqueeze(1) / 2) * factor_N1
        exponent_NB = torch.mul(self.around_NB, factor_N1).sub_(own_N1).clamp_(max=_MOST)
        exponent_NB.masked_fill_(~runs.moves_N1, 0)
        return exponent_NB.expm1_(), self.among_GBB.flatten(0, 1).index_select(0, runs.slot_N)


def _centred(representatives_CD: Tensor, runs: Runs) -> Tensor:
    """[G, B, D] less the mean of the block: that changes no distance, and keeps what is rounded small."""
    padded_GBD = runs.pad(representatives_CD)
    dtype = accumulator(padded_GBD.dtype)
    mean_GD = padded_GBD.sum(1, dtype=dtype) / runs.width_G1.to(dtype)
    return (padded_GBD - mean_GD.unsqueeze(1)).masked_fill_(~runs.valid_GB.unsqueeze(2), 0).to(padded_GBD.dtype)


def _offset(rows_ND: Tensor, representatives_CD: Tensor, runs: Runs) -> Tensor:
    """d [N, D], by place."""
    own_ND = representatives_CD.index_select(0, runs.cluster_N)
    return torch.sub(runs.placed(rows_ND), own_ND, out=own_ND)


def _wide_product(a_GXY: Tensor, b_GYZ: Tensor) -> Tensor:
    """Of numbers of bf16, with all digits of their sums."""
    dtype = accumulator(a_GXY.dtype)
    if a_GXY.is_cuda and a_GXY.dtype != dtype:
        return torch.bmm(a_GXY, b_GYZ, out_dtype=dtype)
    return torch.bmm(a_GXY.to(dtype), b_GYZ.to(dtype))


def _split(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two numbers of this dtype whose sum is x."""
    high = x.to(dtype)
    return high, (x - high).to(dtype)


class _Weights(torch.autograd.Function):
    """A [N, B], by place; the last column is the mean of what its row was before it was centred."""

    @staticmethod
    def forward(
        ctx: Any, rows_ND: Tensor, representatives_CD: Tensor, runs: Runs, ridge: float, width: float
    ) -> Tensor:
        ctx.runs, ctx.ops, dtype = runs, choose(rows_ND), rows_ND.dtype
        c_GBD = _centred(representatives_CD, runs)
        products_GBB = _wide_product(c_GBD, c_GBD.transpose(1, 2))
        width_G1 = runs.width_G1.to(products_GBB.dtype)
        norm_GB = products_GBB.diagonal(dim1=1, dim2=2)
        # Between two of B points |c_i - c_j|^2 is on average twice their variance.
        scale_G = (2 * width / width_G1.squeeze(1) * norm_GB.sum(1)).clamp(min=1e-20)
        far_GB = norm_GB.masked_fill(~runs.valid_GB, torch.inf)  # exp makes it zero
        among_GBB = (2 * products_GBB).sub_(far_GB.unsqueeze(2)).sub_(far_GB.unsqueeze(1))
        among_GBB = among_GBB.div_(scale_G[:, None, None]).exp_()
        diagonal_GB = torch.full_like(far_GB, 1.0).masked_fill_(runs.valid_GB, ridge)
        inverse_GBB = inverse(among_GBB + torch.diag_embed(diagonal_GB))
        inverse_GBB = inverse_GBB.mul_(runs.valid_GB.unsqueeze(2)).mul_(runs.valid_GB.unsqueeze(1))
        mean_GB1 = inverse_GBB.sum(2, keepdim=True) / width_G1.unsqueeze(2)
        inverse_GBB.sub_(mean_GB1).mul_(runs.valid_GB.unsqueeze(1))
        inverse_GBB[:, :, -1:] = mean_GB1
        high_GBB, low_GBB = _split(inverse_GBB, dtype)

        offset_ND = _offset(rows_ND, representatives_CD, runs)
        around_NB = grouped_mm(offset_ND, c_GBD.transpose(1, 2), runs.ends_G)
        square_N = torch.linalg.vector_norm(offset_ND, dim=1, dtype=accumulator(dtype)).square_()
        exponents = _Exponents(around_NB, square_N, scale_G, among_GBB)
        rise_NB, among_NB = exponents.rise(runs)
        highs_NB, lows_NB = _split(rise_NB.mul_(among_NB), dtype)
        weights_NB = grouped_mm(
            torch.cat([highs_NB, highs_NB, lows_NB], 1), torch.cat([high_GBB, low_GBB, high_GBB], 1), runs.ends_G
        )
        ctx.save_for_backward(rows_ND, representatives_CD, high_GBB, low_GBB, weights_NB, *exponents)
        return weights_NB

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """With D = k(x) - K_own and U = D (K + ridge I)^-1: dD = dA M', and K receives -(U + onehot(own))^T dD.

        With Z = -|a - b|^2 / s and k = exp Z: dZ = dk k. Rows and their own representatives pull at a pair of
        representatives in opposite directions: what is left is dD (k - K_own), which is small.
        """
        runs: Runs = ctx.runs
        rows_ND, representatives_CD, high_GBB, low_GBB, weights_NB, *kept = ctx.saved_tensors
        exponents, dtype = _Exponents(*kept), rows_ND.dtype
        ops: PlainOps = ctx.ops
        grad_NB = grads[0].contiguous()
        grad_NB = grouped_mm(
            torch.cat([grad_NB, grad_NB], 1), torch.cat([high_GBB, low_GBB], 2).transpose(1, 2), runs.ends_G
        ).masked_fill_(~runs.moves_N1, 0)  # what was sent does not move away from itself
        rise_NB, among_NB = exponents.rise(runs)
        factor_G = 2 / exponents.scale_G
        wide_NB = grad_NB * factor_G.index_select(0, runs.block_N).unsqueeze(1) * among_NB
        by_difference_NB = (wide_NB * rise_NB).to(dtype)  # dD (k - K_own)
        around_NB = wide_NB.addcmul_(wide_NB, rise_NB)  # dD k
        pull_N1 = around_NB.sum(1, keepdim=True)
        # With c_own + d for x, what a row's own representative is to it goes into the product.
        around_NB = around_NB.to(dtype)
        own_N1 = runs.own_N.unsqueeze(1)
        to_own_NB = around_NB.scatter(1, own_N1, around_NB.gather(1, own_N1) - pull_N1.to(dtype))

        c_GBD, offset_ND = _centred(representatives_CD, runs), _offset(rows_ND, representatives_CD, runs)
        grad_rows_ND = grouped_mm(to_own_NB, c_GBD, runs.ends_G).addcmul_(offset_ND, pull_N1.to(dtype), value=-1)
        of_offsets_GBD = grouped_mm(around_NB.t(), offset_ND, runs.ends_G)

        by_own_GBB, differences_GBB = (
            runs.pad(ops.segment(x, None, None, *runs.segments, False)).to(factor_G.dtype)
            for x in (grad_NB, by_difference_NB)
        )
        by_inverse_GBB = grouped_mm(weights_NB.t(), grad_NB, runs.ends_G).to(factor_G.dtype)
        by_inverse_GBB = by_inverse_GBB + by_inverse_GBB[:, -1:]
        among_GBB = exponents.among_GBB * factor_G[:, None, None]
        by_inverse_GBB.mul_(among_GBB)
        pairs_GBB = differences_GBB.sub_(by_inverse_GBB).transpose(1, 2)
        pairs_GBB = pairs_GBB.sub(by_own_GBB.mul_(among_GBB)).sub_(by_inverse_GBB)
        pairs_GBB.diagonal(dim1=1, dim2=2).sub_(pairs_GBB.sum(2))
        grad_c_GBD = _wide_product(pairs_GBB.to(dtype), c_GBD).add_(of_offsets_GBD)
        return runs.back(grad_rows_ND), runs.unpad(grad_c_GBD).to(dtype), None, None, None


class _Weighted(torch.autograd.Function):
    """E(c_own) + A Y [N, D], by row."""

    @staticmethod
    def forward(ctx: Any, weights_NB: Tensor, expert_out_CD: Tensor, clusters: Clusters, runs: Runs) -> Tensor:
        ctx.runs, ctx.ops = runs, choose(expert_out_CD)
        ctx.save_for_backward(weights_NB, expert_out_CD)
        change_ND = grouped_mm(weights_NB, runs.pad(expert_out_CD).to(weights_NB.dtype), runs.ends_G)
        change_ND = runs.back(change_ND).to(expert_out_CD.dtype)
        return ctx.ops.combine(expert_out_CD, clusters.cluster_N.unsqueeze(1), None, change_ND, None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        runs: Runs = ctx.runs
        weights_NB, expert_out_CD = ctx.saved_tensors
        dtype = weights_NB.dtype
        grad_ND = grads[0].to(dtype)
        placed_ND = runs.placed(grad_ND)
        outputs_GBD = runs.pad(expert_out_CD).to(dtype)
        grad_weights_NB = grouped_mm(placed_ND, outputs_GBD.transpose(1, 2), runs.ends_G)
        grad_out_GBD = grouped_mm(weights_NB.t(), placed_ND, runs.ends_G)
        grad_out_CD = ctx.ops.segment(placed_ND, None, None, *runs.segments, False)
        grad_out_CD = grad_out_CD + runs.unpad(grad_out_GBD)
        return grad_weights_NB, grad_out_CD.to(expert_out_CD.dtype), None, None
