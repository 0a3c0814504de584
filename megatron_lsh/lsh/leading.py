"""Interpolation in few coordinates of rows and outputs, so that one function is fitted to many representatives.

The function of interpolate.py, from r coordinates of the rows to r of the outputs:

    y_n = E(c_j) + U (f(V^T x_n) - f(V^T c_j))                  j = cluster(n);  U, V [D, r]

costs r / D of what it costs in all D coordinates, and some products with U and V (cost.py). U are the leading directions of
a block's outputs. V are those in which its representatives vary together with these outputs, as in partial least squares:
closer than the representatives' own leading directions, and cheaper to find. Both are constants to the gradient, and
functions of what is there: a replay finds the same.

What a function leaves out is lost, so this pays where blocks are several times as wide as all coordinates would afford.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_lsh.lsh.blocks import Blocks
from megatron_lsh.lsh.cluster import Clusters
from megatron_lsh.lsh.interpolate import RIDGE, WIDTH, Fitted, System, centred, pad
from megatron_lsh.lsh.restore import restore
from megatron_lsh.ops import Groups, PlainOps, accumulator, choose


def interpolate_leading(
    expert_out_CD: Tensor,
    rows_ND: Tensor,
    representatives_CD: Tensor,
    clusters: Clusters,
    member_C: Tensor | None = None,
    *,
    block: int,
    rank: int,
    ridge: float = RIDGE,
    width: float = WIDTH,
) -> Tensor:
    """Restored outputs [N, D] in the dtype of ``expert_out_CD``; differentiable in all three tensors.

    Args:
        rank: r of the module's docstring, below D. The others are those of ``interpolate``.

    Arithmetic is in fp32, or fp64 with fp64 rows. Waits for the device unless the clusters' counts are known.
    """
    prepared = prepare_leading(
        rows_ND, representatives_CD, clusters, member_C, block=block, rank=rank, ridge=ridge, width=width
    )
    return prepared(expert_out_CD)


def prepare_leading(
    rows_ND: Tensor,
    representatives_CD: Tensor,
    clusters: Clusters,
    member_C: Tensor | None = None,
    *,
    block: int,
    rank: int,
    ridge: float = RIDGE,
    width: float = WIDTH,
) -> Callable[[Tensor], Tensor]:
    """The first half of :func:`interpolate_leading`, which is short: directions wait for the outputs."""
    if clusters.num_clusters == clusters.num_rows:
        return lambda expert_out_CD: expert_out_CD.index_select(0, clusters.cluster_N)
    dtype = accumulator(rows_ND.dtype)
    blocks = Blocks.of(clusters, member_C, block, clusters.counts_on_host(), dtype)
    placed, ops = blocks.placed(), choose(rows_ND.new_empty(0, dtype=dtype))

    def finish(expert_out_CD: Tensor) -> Tensor:
        along_GrD = _leading(blocks, expert_out_CD.detach(), rank)
        out_Cr = _Mapped.apply(expert_out_CD, along_GrD, blocks.points, ops, True)
        across_GrD = _varying_with(blocks, representatives_CD.detach(), out_Cr.detach())
        x_Nr = _Mapped.apply(rows_ND, across_GrD, blocks.rows, ops, True)
        c_Cr = _Mapped.apply(representatives_CD, across_GrD, blocks.points, ops, True)
        with torch.no_grad():
            system = System.of(x_Nr, c_Cr, placed, ops, ridge, width)
        change_Nr = Fitted.apply(out_Cr, x_Nr, c_Cr, None, placed, system, ops)
        change_ND = _Mapped.apply(change_Nr, along_GrD, blocks.rows, ops, False)
        return restore(expert_out_CD, None, clusters).add_(change_ND)

    return finish


@torch.no_grad()
def _leading(blocks: Blocks, x_CD: Tensor, rank: int) -> Tensor:
    """[G, r, D]: leading directions of the points of each block around their mean, orthonormal; zero where there are fewer
    than r, as of w points there are w - 1: a direction made of rounding would be another on every rank.

    A range finder with one power iteration (Halko, Martinsson and Tropp 2011, algorithm 4.3). It starts from points of the
    block, evenly spaced, instead of random directions: as good here, and nothing to seed.
    """
    x_GBD = centred(blocks, pad(blocks, x_CD).to(blocks.width_G1.dtype))
    number_r, there_G1 = torch.arange(rank, device=x_CD.device), (blocks.width_G1 - 1).clamp(min=1, max=rank)
    spaced_Gr = (number_r * blocks.width_G1 / there_G1).long().clamp(max=x_GBD.shape[1] - 1)
    start_GrD = x_GBD.gather(1, spaced_Gr.unsqueeze(2).expand(-1, -1, x_GBD.shape[2]))
    start_GrD = start_GrD.masked_fill((number_r >= there_G1).unsqueeze(2), 0)
    return _orthonormal(torch.bmm(torch.bmm(start_GrD, x_GBD.transpose(1, 2)), x_GBD))


@torch.no_grad()
def _varying_with(blocks: Blocks, x_CD: Tensor, y_Cr: Tensor) -> Tensor:
    """[G, r, D]: the directions of each block's points in which they vary together with y; orthonormal."""
    y_GBr, x_GBD = (centred(blocks, pad(blocks, t).to(blocks.width_G1.dtype)) for t in (y_Cr, x_CD))
    return _orthonormal(torch.bmm(y_GBr.transpose(1, 2), x_GBD))


def _orthonormal(x_GrD: Tensor) -> Tensor:
    """Of the same span. Cholesky's QR, shifted so that it never breaks down, and repeated until it is exact (Fukaya et al.
    2020): three products of small matrices in a batch, where a QR in a batch is a loop on GPUs."""
    rank = x_GrD.shape[1]
    shift_rr = 10 * rank * torch.finfo(x_GrD.dtype).eps * torch.eye(rank, dtype=x_GrD.dtype, device=x_GrD.device)
    for _ in range(3):
        x_GrD = x_GrD / torch.linalg.vector_norm(x_GrD, dim=2, keepdim=True).clamp(min=1e-20)
        gram_Grr = torch.bmm(x_GrD, x_GrD.transpose(1, 2)) + shift_rr
        factor_Grr = torch.linalg.cholesky_ex(gram_Grr)[0]
        x_GrD = torch.linalg.solve_triangular(factor_Grr, x_GrD, upper=False)
    return x_GrD


class _Mapped(torch.autograd.Function):
    """Rows of each block times its matrix, which is constant: [N, D] -> [N, r] by place if transposed, else back."""

    @staticmethod
    def forward(
        ctx: Any, rows_NX: Tensor, matrices_GrD: Tensor, groups: Groups, ops: PlainOps, transposed: bool
    ) -> Tensor:
        ctx.groups, ctx.ops, ctx.transposed, ctx.dtype = groups, ops, transposed, rows_NX.dtype
        ctx.save_for_backward(matrices_GrD)
        return _mapped(rows_NX, matrices_GrD, groups, ops, transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (matrices_GrD,) = ctx.saved_tensors
        back = _mapped(grads[0].contiguous(), matrices_GrD, ctx.groups, ctx.ops, not ctx.transposed)
        return back.to(ctx.dtype), None, None, None, None


def _mapped(rows_NX: Tensor, matrices_GrD: Tensor, groups: Groups, ops: PlainOps, transposed: bool) -> Tensor:
    whole = groups._replace(widths=torch.full_like(groups.widths, matrices_GrD.shape[1]))
    return ops.grouped(rows_NX.to(matrices_GrD.dtype), matrices_GrD, whole, transposed)
