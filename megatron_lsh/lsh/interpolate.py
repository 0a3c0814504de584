"""Restore rows by interpolating the experts' outputs between representatives (``--lsh-residual interpolate``).

The representatives c_1 ... c_B of one expert come back with their outputs Y = (E(c_1), ..., E(c_B)): B samples of a smooth
function near every row. Kernel ridge regression fits a function f to them (the posterior mean of a Gaussian process;
Rasmussen and Williams 2006, equation 2.25), and each row takes the change of f between its representative and itself:

    y_n = E(c_j) + f(x_n) - f(c_j)                              j = cluster(n)
    f(x) = k(x)^T (K + ridge I)^-1 (Y - mean Y)                 k(x)_i = exp(-|x - c_i|^2 / s),  K_ij = k(c_i)_j

s is `width` times the mean squared distance between two representatives. A row that is its own representative gets
E(x). Nothing more travels: all of it is on the row's rank already. And the value is a smooth function of x, so its
gradient knows how the expert changes around the row, where E(c_j) alone would give all rows of a cluster the same.

Per row 2 B D operations for the distances, as many for the weighted sum, and twice that backward; per expert B^3 / 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_lsh.lsh.cluster import Clusters
from megatron_lsh.lsh.segments import segment_sum

RIDGE, WIDTH = 0.01, 1.0
"""The error of the restored outputs is flat around both: within a fifth for WIDTH 1-4 and RIDGE 0.003-0.03
(benchmarks/clustering.py)."""


def interpolate(
    expert_out_CD: Tensor,
    rows_ND: Tensor,
    representatives_CD: Tensor,
    clusters: Clusters,
    counts_E: Tensor,
    *,
    ridge: float = RIDGE,
    width: float = WIDTH,
) -> Tensor:
    """Restored outputs [N, D] in the dtype of ``expert_out_CD``; differentiable in all three tensors. Waits for the device.

    Args:
        expert_out_CD: [C, D], the expert's output for each representative.
        rows_ND, representatives_CD: what was clustered and what was sent for it, both sorted by expert.
        counts_E: int64, rows per expert.
        ridge: added to the diagonal of K, whose entries are 1 there: how much of Y is taken for noise.
        width: of the kernel, in mean squared distances.

    Arithmetic is in fp32, or fp64 with fp64 rows; `s` carries no gradient.
    """
    if clusters.num_clusters == clusters.num_rows:
        return expert_out_CD.index_select(0, clusters.cluster_N)
    parts = _parts(counts_E.tolist(), clusters.counts_E.tolist())
    return _Interpolate.apply(expert_out_CD, rows_ND, representatives_CD, clusters, parts, ridge, width)


def _parts(row_counts: list[int], cluster_counts: list[int]) -> list[tuple[slice, slice]]:
    """(rows, clusters) of each expert where something is to be interpolated.

    Where every row is its own representative, or there is but one, nothing is.
    """
    last_row, last_cluster = accumulate(row_counts), accumulate(cluster_counts)
    return [
        (slice(row - n, row), slice(cluster - b, cluster))
        for n, b, row, cluster in zip(row_counts, cluster_counts, last_row, last_cluster, strict=True)
        if 1 < b < n
    ]


@dataclass(frozen=True)
class _Fit:
    """The function fitted for one expert of n rows and B representatives, and what its derivative needs.

    Rows and representatives come shifted to the latter's mean, which changes no distance and keeps their rounding small.
    """

    SIZE: ClassVar[int] = 5

    scale: Tensor
    around_nB: Tensor
    among_BB: Tensor
    factor_BB: Tensor
    weights_BD: Tensor

    @staticmethod
    def of(rows_nD: Tensor, centres_BD: Tensor, outputs_BD: Tensor, ridge: float, width: float) -> _Fit:
        # Between two of B points |c_i - c_j|^2 is on average twice their variance.
        spread = 2 * centres_BD.var(0, correction=0).sum()
        scale = (width * spread).clamp(min=1e-20)
        columns = _columns(centres_BD, scale)
        around_nB, among_BB = (_row_features(x) @ columns for x in (rows_nD, centres_BD))
        around_nB.exp_(), among_BB.exp_()
        system_BB = among_BB.clone()
        system_BB.diagonal().add_(ridge)
        factor_BB, _ = torch.linalg.cholesky_ex(system_BB)  # checks nothing, so nothing waits; ridge keeps it positive
        weights_BD = torch.cholesky_solve(outputs_BD - outputs_BD.mean(0), factor_BB)
        return _Fit(scale, around_nB, among_BB, factor_BB, weights_BD)

    def tensors(self) -> tuple[Tensor, ...]:
        """The SIZE fields in their order."""
        return self.scale, self.around_nB, self.among_BB, self.factor_BB, self.weights_BD

    def change(self, own_n: Tensor) -> Tensor:
        """f(x_n) - f(c_own(n)), [n, D]."""
        return (self.around_nB @ self.weights_BD).sub_((self.among_BB @ self.weights_BD).index_select(0, own_n))

    def backward(
        self, grad_nD: Tensor, sums_BD: Tensor, rows_nD: Tensor, centres_BD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients with respect to rows, representatives and outputs.

        Args:
            grad_nD: of the changes. sums_BD: its sum over the rows of each cluster.
        """
        grad_weights_BD = self.around_nB.T @ grad_nD - self.among_BB @ sums_BD
        solved_BD = torch.cholesky_solve(grad_weights_BD, self.factor_BB)
        # With Z = -|a - c|^2 / s and K = exp Z: dZ = dK K.
        around_nB = (grad_nD @ self.weights_BD.T).mul_(self.around_nB)
        among_BB = ((sums_BD + solved_BD) @ self.weights_BD.T).mul_(self.among_BB).neg_()
        among_BB = among_BB + among_BB.T  # a representative is on both sides
        grad_rows_nD = (around_nB @ centres_BD).addcmul_(rows_nD, around_nB.sum(1, keepdim=True), value=-1)
        pull_B1 = (around_nB.sum(0) + among_BB.sum(1)).unsqueeze(1)
        grad_centres_BD = around_nB.T @ rows_nD + among_BB @ centres_BD - pull_B1 * centres_BD
        return grad_rows_nD * (2 / self.scale), grad_centres_BD * (2 / self.scale), solved_BD - solved_BD.mean(0)


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
        parts: list[tuple[slice, slice]],
        ridge: float,
        width: float,
    ) -> Tensor:
        ctx.clusters, ctx.parts, ctx.out_dtype = clusters, parts, expert_out_CD.dtype
        outputs_CD = expert_out_CD.to(_arithmetic(rows_ND))
        restored_ND = expert_out_CD.index_select(0, clusters.cluster_N)
        kept: list[Tensor] = []
        for n, c in parts:
            fit = _Fit.of(*_shifted(rows_ND[n], representatives_CD[c]), outputs_CD[c], ridge, width)
            restored_ND[n] += fit.change(clusters.cluster_N[n] - c.start)
            kept += fit.tensors()
        # Not as attributes: what is saved is dropped under activation recomputation.
        ctx.save_for_backward(rows_ND, representatives_CD, *kept)
        return restored_ND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None, None]:
        rows_ND, representatives_CD, *kept = ctx.saved_tensors
        grad_ND = grads[0].to(_arithmetic(rows_ND)).contiguous()
        sums_CD = segment_sum(grad_ND, ctx.clusters)
        grad_rows_ND, grad_centres_CD = torch.zeros_like(grad_ND), torch.zeros_like(sums_CD)
        grad_out_CD = sums_CD.clone()
        for n, c in ctx.parts:
            fit, kept = _Fit(*kept[: _Fit.SIZE]), kept[_Fit.SIZE :]
            grad_rows_ND[n], grad_centres_CD[c], of_outputs = fit.backward(
                grad_ND[n], sums_CD[c], *_shifted(rows_ND[n], representatives_CD[c])
            )
            grad_out_CD[c] += of_outputs
        of_rows, of_centres = grad_rows_ND.to(rows_ND.dtype), grad_centres_CD.to(rows_ND.dtype)
        return grad_out_CD.to(ctx.out_dtype), of_rows, of_centres, None, None, None, None


def _arithmetic(rows: Tensor) -> torch.dtype:
    return torch.promote_types(rows.dtype, torch.float32)


def _shifted(rows_nD: Tensor, centres_BD: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of the arithmetic, less the mean of the representatives."""
    rows_nD, centres_BD = (x.to(_arithmetic(x)) for x in (rows_nD, centres_BD))
    mean_D = centres_BD.mean(0)
    return rows_nD - mean_D, centres_BD - mean_D
