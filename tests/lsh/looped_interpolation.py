"""The reference of ``lsh.interpolate``: the same formulas as a loop over blocks, which reads every length from the device.

The representatives c_1 ... c_B of one expert come back with their outputs Y = (E(c_1), ..., E(c_B)): B samples of a smooth
function near every row. Kernel ridge regression fits a function f to them (the posterior mean of a Gaussian process;
Rasmussen and Williams 2006, equation 2.25), and each row takes the change of f between its representative and itself:

    y_n = E(c_j) + f(x_n) - f(c_j)                              j = cluster(n)
    f(x) = k(x)^T (K + ridge I)^-1 (Y - mean Y)                 k(x)_i = exp(-|x - c_i|^2 / s),  K_ij = k(c_i)_j

s is `width` times the mean squared distance between two representatives. A row that is its own representative gets
E(x). Nothing more travels: all of it is on the row's rank already. And the value is a smooth function of x, so its
gradient knows how the expert changes around the row, where E(c_j) alone would give all rows of a cluster the same.

Per row that was not sent 2 B D operations for the distances, as many for the weighted sum, and twice that backward. To keep
the whole linear in the rows, an expert's representatives are fitted in blocks of at most `block`; B is the block's size
then, and B^3 operations invert K.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_lsh.lsh.cluster import Clusters
from megatron_lsh.ops import accumulator, choose

RIDGE, WIDTH, BLOCK = 0.01, 1.0, 128
"""The error of the restored outputs is flat around the first two: within a fifth for WIDTH 1-4 and RIDGE 0.003-0.03. It
falls with BLOCK, and the time rises (benchmarks/clustering.py)."""


def interpolate(
    expert_out_CD: Tensor,
    rows_ND: Tensor,
    representatives_CD: Tensor,
    clusters: Clusters,
    member_C: Tensor | None = None,
    *,
    block: int = BLOCK,
    ridge: float = RIDGE,
    width: float = WIDTH,
) -> Tensor:
    """Restored outputs [N, D] in the dtype of ``expert_out_CD``; differentiable in all three tensors. Waits for the device.

    Args:
        expert_out_CD: [C, D], the expert's output for each representative.
        rows_ND, representatives_CD: what was clustered and what was sent for it, both sorted by expert.
        member_C: int64, the rows that are representatives, if these are rows: they take their cluster's output as it is.
        block: most representatives that one function is fitted to.
        ridge: added to the diagonal of K, whose entries are 1 there: how much of Y is taken for noise.
        width: of the kernel, in mean squared distances.

    Arithmetic is in fp32, or fp64 with fp64 rows; `s` carries no gradient.
    """
    prepared = prepare_interpolation(
        rows_ND, representatives_CD, clusters, member_C, block=block, ridge=ridge, width=width
    )
    return prepared(expert_out_CD)


def prepare_interpolation(
    rows_ND: Tensor,
    representatives_CD: Tensor,
    clusters: Clusters,
    member_C: Tensor | None = None,
    *,
    block: int = BLOCK,
    ridge: float = RIDGE,
    width: float = WIDTH,
) -> Callable[[Tensor], Tensor]:
    """The first half of :func:`interpolate`: all that needs no output, so that it can run while rows travel.

    Returns:
        The second half, from ``expert_out_CD`` to the restored outputs [N, D]; called once.
    """
    if clusters.num_clusters == clusters.num_rows:
        return lambda expert_out_CD: expert_out_CD.index_select(0, clusters.cluster_N)
    plan, systems, dtype = _Plan.of(clusters, member_C, block), [], accumulator(rows_ND.dtype)
    with torch.no_grad():
        rows_MD = rows_ND.index_select(0, plan.row_M)
        for n, c in plan.parts:
            centres_BD, rows_nD = _shifted(representatives_CD[c], rows_MD[n], dtype)
            systems.append(_System.of(rows_nD, centres_BD, ridge, width))

    def finish(expert_out_CD: Tensor) -> Tensor:
        return _Interpolate.apply(expert_out_CD, rows_ND, representatives_CD, clusters, plan, systems)

    return finish


@dataclass(frozen=True)
class _Plan:
    """Which rows are interpolated in which block.

    Attributes:
        row_M: int64, the M rows to interpolate, sorted by cluster.
        clusters: of these M rows.
        parts: per block its part of the M rows, and its clusters.
    """

    row_M: Tensor
    clusters: Clusters
    parts: list[tuple[slice, slice]]

    @staticmethod
    def of(clusters: Clusters, member_C: Tensor | None, block: int) -> _Plan:
        blocks, device = _blocks(clusters.counts_E.tolist(), block), clusters.cluster_N.device
        # Rows take their representative's output where they are it, or where it is the only one.
        lengths = torch.tensor([c.stop - c.start for c in blocks])
        moves_C = (lengths > 1).repeat_interleave(lengths).to(device) & (clusters.sizes_C > 1)
        moves_N = moves_C.index_select(0, clusters.cluster_N)
        if member_C is not None:
            moves_N = moves_N & ~_are_sent(clusters, member_C)
        row_M = clusters.order_N[moves_N.index_select(0, clusters.order_N)]
        cluster_M = clusters.cluster_N.index_select(0, row_M)
        sizes_C = torch.bincount(cluster_M, minlength=clusters.num_clusters)
        ends_C = sizes_C.cumsum(0)
        kept = Clusters(
            cluster_M, sizes_C, clusters.counts_E, torch.arange(len(row_M), device=device), ends_C - sizes_C
        )
        ends = [0, *ends_C.tolist()]
        parts = [(slice(ends[c.start], ends[c.stop]), c) for c in blocks if ends[c.start] < ends[c.stop]]
        return _Plan(row_M, kept, parts)


def _are_sent(clusters: Clusters, member_C: Tensor) -> Tensor:
    """bool [N]: the rows that are their own cluster's member. (An empty cluster's member is another's row.)"""
    numbers_C = torch.arange(clusters.num_clusters, device=member_C.device)
    owns_C = clusters.cluster_N.index_select(0, member_C) == numbers_C
    return torch.zeros_like(clusters.cluster_N).scatter_add_(0, member_C, owns_C.long()) > 0


def _blocks(counts: list[int], most: int) -> list[slice]:
    """Each expert's clusters in runs of equal length, give or take one, of at most this many.

    Neighbours in number are neighbours in the text. Blocks of neighbours in hash order or in space would take off another
    tenth or fifth of the error, too little to sort for: what counts is how many representatives a function is fitted to.
    """
    found, first = [], 0
    for count in counts:
        pieces = -(-count // most)
        ends = [first + count * (piece + 1) // pieces for piece in range(pieces)]
        found += [slice(start, end) for start, end in zip([first, *ends], ends, strict=False)]
        first += count
    return found


class _System(NamedTuple):
    """What the function of one block, n rows and B representatives, owes to where they are: k(x), K and (K + ridge I)^-1.

    Rows and representatives come shifted to the mean of the representatives: it changes no distance, and keeps their
    rounding small.
    """

    scale: Tensor
    around_nB: Tensor
    among_BB: Tensor
    inverse_BB: Tensor

    @staticmethod
    def of(rows_nD: Tensor, centres_BD: Tensor, ridge: float, width: float) -> _System:
        # Between two of B points |c_i - c_j|^2 is on average twice their variance.
        spread = centres_BD.square().sum() * (2 / centres_BD.shape[0])
        scale = (width * spread).clamp(min=1e-20)
        columns = _columns(centres_BD, scale)
        around_nB, among_BB = ((_row_features(x) @ columns).exp_() for x in (rows_nD, centres_BD))
        system_BB = among_BB.clone()
        system_BB.diagonal().add_(ridge)
        # Its condition number is at most B / ridge, and one product with the inverse is several times faster than two
        # triangular solves. cholesky_ex checks nothing, so nothing waits; ridge keeps it positive.
        inverse_BB = torch.cholesky_inverse(torch.linalg.cholesky_ex(system_BB)[0])
        return _System(scale, around_nB, among_BB, inverse_BB)


class _Fit(NamedTuple):
    """The function fitted for one block, and what its derivative needs. Outputs come less their mean."""

    scale: Tensor
    around_nB: Tensor
    among_BB: Tensor
    inverse_BB: Tensor
    weights_BD: Tensor

    @staticmethod
    def of(system: _System, outputs_BD: Tensor) -> _Fit:
        return _Fit(*system, system.inverse_BB @ outputs_BD)

    def change(self, own_n: Tensor) -> Tensor:
        """f(x_n) - f(c_own(n)), [n, D]."""
        # K W could be had as outputs - ridge W; but as a product it has the same rounding as k(x) W, which cancels.
        return (self.around_nB @ self.weights_BD).sub_((self.among_BB @ self.weights_BD).index_select(0, own_n))

    def backward(
        self, grad_nD: Tensor, sums_BD: Tensor, rows_nD: Tensor, centres_BD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients with respect to rows, representatives and outputs.

        Args:
            grad_nD: of the changes. sums_BD: its sum over the rows of each cluster.

        The changes are k(x) W - K_own W, so dW = k(x)^T g - K s, and with M = (K + ridge I)^-1 the outputs receive M dW and
        K receives -(s + M dW) W^T.
        """
        of_outputs_BD = self.inverse_BB @ (self.around_nB.T @ grad_nD).sub_(self.among_BB @ sums_BD)
        # With Z = -|a - c|^2 / s and K = exp Z: dZ = dK K.
        around_nB = (grad_nD @ self.weights_BD.T).mul_(self.around_nB)
        among_BB = ((sums_BD + of_outputs_BD) @ self.weights_BD.T).mul_(self.among_BB).neg_()
        among_BB = among_BB + among_BB.T  # a representative is on both sides
        grad_rows_nD = (around_nB @ centres_BD).addcmul_(rows_nD, around_nB.sum(1, keepdim=True), value=-1)
        pull_B1 = (around_nB.sum(0) + among_BB.sum(1)).unsqueeze(1)
        grad_centres_BD = around_nB.T @ rows_nD + among_BB @ centres_BD - pull_B1 * centres_BD
        factor = 2 / self.scale
        return grad_rows_nD.mul_(factor), grad_centres_BD.mul_(factor), of_outputs_BD - of_outputs_BD.mean(0)


def _row_features(a_ND: Tensor) -> Tensor:
    """[N, D + 2], such that the product with :func:`_columns` is -|a - c|^2 / s: distances in one matrix product."""
    return torch.cat([a_ND, a_ND.square().sum(1, keepdim=True), a_ND.new_ones(a_ND.shape[0], 1)], 1)


def _columns(c_BD: Tensor, scale: Tensor) -> Tensor:
    """[D + 2, B]."""
    minus_B1 = c_BD.new_full((c_BD.shape[0], 1), -1.0)
    return (torch.cat([2 * c_BD, minus_B1, -c_BD.square().sum(1, keepdim=True)], 1) / scale).T


class _Interpolate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        expert_out_CD: Tensor,
        rows_ND: Tensor,
        representatives_CD: Tensor,
        clusters: Clusters,
        plan: _Plan,
        systems: list[_System],
    ) -> Tensor:
        ctx.clusters, ctx.plan, ctx.out_dtype = clusters, plan, expert_out_CD.dtype
        ctx.dtype = dtype = accumulator(rows_ND.dtype)
        ctx.ops = choose(rows_ND.new_empty(0, dtype=dtype))
        restored_ND = expert_out_CD.index_select(0, clusters.cluster_N)
        change_MD = rows_ND.new_empty(len(plan.row_M), rows_ND.shape[1], dtype=dtype)
        kept: list[Tensor] = []
        for (n, c), system in zip(plan.parts, systems, strict=True):
            outputs_BD = expert_out_CD[c].to(dtype)
            fit = _Fit.of(system, outputs_BD - outputs_BD.mean(0))
            change_MD[n] = fit.change(plan.clusters.cluster_N[n] - c.start)
            kept += fit
        # Not as attributes: what is saved is dropped under activation recomputation.
        ctx.save_for_backward(rows_ND, representatives_CD, *kept)
        return restored_ND.index_add_(0, plan.row_M, change_MD.to(restored_ND.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        plan: _Plan = ctx.plan
        rows_ND, representatives_CD, *kept = ctx.saved_tensors
        grad_ND = grads[0].to(ctx.dtype).contiguous()
        rows_MD, grad_MD = (x.index_select(0, plan.row_M) for x in (rows_ND, grad_ND))
        sums_CD = ctx.ops.segment(grad_MD, None, None, *plan.clusters.segments, False)
        grad_out_CD = ctx.ops.segment(grad_ND, None, None, *ctx.clusters.segments, False)
        grad_centres_CD = torch.zeros_like(sums_CD)
        for n, c in plan.parts:
            size = len(_Fit._fields)
            fit, kept = _Fit(*kept[:size]), kept[size:]
            centres_BD, rows_nD = _shifted(representatives_CD[c], rows_MD[n], ctx.dtype)
            grad_MD[n], grad_centres_CD[c], of_outputs_BD = fit.backward(grad_MD[n], sums_CD[c], rows_nD, centres_BD)
            grad_out_CD[c] += of_outputs_BD
        grad_rows_ND = torch.zeros_like(rows_ND).index_copy_(0, plan.row_M, grad_MD.to(rows_ND.dtype))
        return grad_out_CD.to(ctx.out_dtype), grad_rows_ND, grad_centres_CD.to(rows_ND.dtype), None, None, None


def _shifted(centres_BD: Tensor, rows_nD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both in the dtype of the arithmetic, less the mean of the representatives."""
    centres_BD, rows_nD = centres_BD.to(dtype), rows_nD.to(dtype)
    mean_D = centres_BD.mean(0)
    return centres_BD - mean_D, rows_nD - mean_D
