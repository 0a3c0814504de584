"""Restore rows by interpolating the experts' outputs between representatives (``--lsh-residual interpolate``).

The representatives c_1 ... c_B of one expert come back with their outputs Y = (E(c_1), ..., E(c_B)): B samples of a smooth
function near every row. Kernel ridge regression fits a function f to them (the posterior mean of a Gaussian process;
Rasmussen and Williams 2006, equation 2.25), and each row takes the change of f between its representative and itself:

    y_n = E(c_j) + f(x_n) - f(c_j)                              j = cluster(n)
    f(x) = k(x)^T (K + ridge I)^-1 (Y - mean Y)                 k(x)_i = exp(-|x - c_i|^2 / s),  K_ij = k(c_i)_j

s is `width` times the mean squared distance between two representatives. A row that is its own representative gets
E(x). Nothing more travels: all of it is on the row's rank already. And the value is a smooth function of x, so its
gradient knows how the expert changes around the row, where E(c_j) alone would give all rows of a cluster the same.

With M = (K + ridge I)^-1 the change of row n is (k(x_n) - K_j)^T M (Y - mean Y). It can be multiplied out from either side:

    "outputs"    W = M (Y - mean Y) when the outputs are back;  change = k(x) W - K_j W
    "weights"    A = centre((k(x) - K_j) M) before they are;    change = A Y

The first does less arithmetic. The second leaves one product, and one of the backward pass's, for the time after the
outputs have travelled; the rest is done meanwhile. cost.py compares them. A third form, "differences" (tensor_cores.py), is
the second in products of bf16; it is for GPUs.

To keep the whole linear in the rows, an expert's representatives are fitted in blocks of at most `block`. All blocks are one
padded batch (blocks.py): as many operations are launched for sixty-four experts as for one, and none waits for the device.

leading.py does the same in few coordinates of rows and outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_lsh.lsh.blocks import Blocks
from megatron_lsh.lsh.cluster import Clusters
from megatron_lsh.lsh.solve import inverse
from megatron_lsh.lsh.tensor_cores import prepare_by_differences
from megatron_lsh.ops import PlainOps, accumulator, choose

RIDGE, WIDTH, BLOCK = 0.01, 1.0, 128
"""The error of the restored outputs is flat around the first two: within a fifth for WIDTH 1-4 and RIDGE 0.003-0.03. It
falls with BLOCK, and the time rises (benchmarks/clustering.py)."""

FORMS = ("outputs", "weights", "differences")


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
    form: str = "outputs",
) -> Tensor:
    """Restored outputs [N, D] in the dtype of ``expert_out_CD``; differentiable in all three tensors.

    Args:
        expert_out_CD: [C, D], the expert's output for each representative.
        rows_ND, representatives_CD: what was clustered and what was sent for it, both sorted by expert.
        member_C: int64, the rows that are representatives, if these are rows: they take their cluster's output as it is.
        block: most representatives that one function is fitted to.
        ridge: added to the diagonal of K, whose entries are 1 there: how much of Y is taken for noise.
        width: of the kernel, in mean squared distances.
        form: "outputs", "weights" or "differences", see the module's docstring; equal but for rounding.

    Arithmetic is in fp32, or fp64 with fp64 rows (products of "differences": in the rows' own dtype); `s` carries no
    gradient. Waits for the device unless the clusters' counts are known (``Clusters.known``).
    """
    prepared = prepare_interpolation(
        rows_ND, representatives_CD, clusters, member_C,
        block=block, ridge=ridge, width=width, form=form,
    )  # fmt: skip
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
    form: str = "outputs",
) -> Callable[[Tensor], Tensor]:
    """The first half of :func:`interpolate`: all that needs no output, so that it can run while rows travel.

    Returns:
        The second half, from ``expert_out_CD`` to the restored outputs [N, D]; called once.
    """
    if form not in FORMS:
        raise ValueError(f"form {form!r} is not one of {', '.join(FORMS)}")
    if clusters.num_clusters == clusters.num_rows:
        return lambda expert_out_CD: expert_out_CD.index_select(0, clusters.cluster_N)
    if form == "differences":
        given = (rows_ND, representatives_CD, clusters, member_C)
        return prepare_by_differences(*given, block=block, ridge=ridge, width=width)
    dtype = accumulator(rows_ND.dtype)
    blocks = Blocks.of(clusters, member_C, block, clusters.counts_on_host(), dtype)
    ops = choose(rows_ND.new_empty(0, dtype=dtype))
    if form == "weights":
        weights_NB = _Weights.apply(rows_ND, representatives_CD, blocks, ops, ridge, width)
        return lambda expert_out_CD: _Weighted.apply(weights_NB, expert_out_CD, clusters, blocks)
    with torch.no_grad():
        system = System.of(rows_ND, representatives_CD, blocks, ops, ridge, width)

    def finish(expert_out_CD: Tensor) -> Tensor:
        return Fitted.apply(expert_out_CD, rows_ND, representatives_CD, clusters, blocks, system, ops)

    return finish


class System(NamedTuple):
    """What the functions of all blocks owe to where rows and representatives are: k(x), K and (K + ridge I)^-1."""

    scale_G: Tensor
    around_NB: Tensor
    among_GBB: Tensor
    inverse_GBB: Tensor

    @staticmethod
    def of(
        rows_ND: Tensor, representatives_CD: Tensor, blocks: Blocks, ops: PlainOps, ridge: float, width: float
    ) -> System:
        x_ND, c_GBD = _shifted(rows_ND, representatives_CD, blocks)
        norm_GB = c_GBD.square().sum(2)
        # Between two of B points |c_i - c_j|^2 is on average twice their variance.
        scale_G = (width * 2 * norm_GB.sum(1) / blocks.width_G1.squeeze(1)).clamp(min=1e-20)
        columns_GBD = c_GBD * (2 / scale_G)[:, None, None]
        # What is no representative is infinitely far away: exp makes it zero.
        far_GB = (norm_GB / scale_G.unsqueeze(1)).masked_fill_(~blocks.valid_GB, torch.inf)
        near_R = torch.linalg.vector_norm(x_ND, dim=1).square_().div_(scale_G.index_select(0, blocks.block_R))
        near_N1 = near_R.index_select(0, blocks.rows.order).unsqueeze(1)
        around_NB = ops.grouped(x_ND, columns_GBD, blocks.rows, True)
        around_NB.sub_(near_N1).sub_(far_GB.index_select(0, blocks.block_N)).exp_()
        among_GBB = torch.bmm(c_GBD, columns_GBD.transpose(1, 2))
        among_GBB.sub_(far_GB.unsqueeze(2)).sub_(far_GB.unsqueeze(1)).exp_()
        diagonal_GB = torch.full_like(far_GB, 1.0).masked_fill_(blocks.valid_GB, ridge)
        return System(scale_G, around_NB, among_GBB, inverse(among_GBB + torch.diag_embed(diagonal_GB), ops))

    def difference(self, blocks: Blocks) -> Tensor:
        """k(x) - K_own [N, B]. It is small, and rounded after it is taken: k(x) by itself would lose most of it."""
        own_NB = self.among_GBB.flatten(0, 1).index_select(0, blocks.slot_N)
        return torch.sub(self.around_NB, own_NB, out=own_NB)

    def gradients(
        self,
        grad_around_NB: Tensor,
        grad_among_GBB: Tensor,
        rows_ND: Tensor,
        representatives_CD: Tensor,
        blocks: Blocks,
        ops: PlainOps,
    ) -> tuple[Tensor, Tensor]:
        """With respect to rows and representatives, given those of k(x) and K; both may be overwritten."""
        x_ND, c_GBD = _shifted(rows_ND, representatives_CD, blocks)
        factor_G = 2 / self.scale_G
        # With Z = -|a - c|^2 / s and K = exp Z: dZ = dK K. A representative is on both sides of K.
        around_NB = grad_around_NB.mul_(self.around_NB).mul_(factor_G.index_select(0, blocks.block_N).unsqueeze(1))
        among_GBB = grad_among_GBB.mul_(self.among_GBB).mul_(factor_G[:, None, None])
        among_GBB = among_GBB + among_GBB.transpose(1, 2)
        grad_rows_ND = ops.grouped(around_NB, c_GBD, blocks.rows)
        grad_rows_ND.addcmul_(x_ND, around_NB.sum(1).index_select(0, blocks.inverse_R).unsqueeze(1), value=-1)
        starts_G, counts_G = blocks.rows.starts, blocks.rows.counts
        pull_GB = ops.segment(around_NB, None, None, blocks.place_N, starts_G, counts_G, False) + among_GBB.sum(2)
        grad_c_GBD = ops.grouped_outer(around_NB, x_ND, blocks.rows)
        grad_c_GBD += torch.bmm(among_GBB, c_GBD)
        grad_c_GBD.addcmul_(c_GBD, pull_GB.unsqueeze(2), value=-1)
        dtype = rows_ND.dtype
        return grad_rows_ND.to(dtype), unpad(blocks, grad_c_GBD).to(dtype)


def _shifted(rows_ND: Tensor, representatives_CD: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Rows, and representatives in their places, in the dtype of the arithmetic, less the mean of their block's
    representatives: that changes no distance, and keeps their rounding small."""
    dtype = blocks.width_G1.dtype
    padded_GBD = pad(blocks, representatives_CD).to(dtype)
    mean_GD = padded_GBD.sum(1) / blocks.width_G1
    c_GBD = (padded_GBD - mean_GD.unsqueeze(1)).masked_fill_(~blocks.valid_GB.unsqueeze(2), 0)
    mean_ND = mean_GD.index_select(0, blocks.block_R)
    return torch.sub(rows_ND, mean_ND, out=mean_ND), c_GBD


def pad(blocks: Blocks, x_CD: Tensor) -> Tensor:
    """[G, B, D]: what belongs to clusters, in their places; zero elsewhere."""
    groups, block = blocks.shape
    return x_CD.new_zeros(groups * block, x_CD.shape[1]).index_copy_(0, blocks.slot_C, x_CD).view(groups, block, -1)


def unpad(blocks: Blocks, x_GBD: Tensor) -> Tensor:
    """[C, D]: the inverse of :func:`pad`."""
    return x_GBD.flatten(0, 1).index_select(0, blocks.slot_C)


def centred(blocks: Blocks, x_GBD: Tensor) -> Tensor:
    """Less the mean over the valid places; zero elsewhere."""
    mean_GD = x_GBD.sum(1) / blocks.width_G1
    return (x_GBD - mean_GD.unsqueeze(1)).masked_fill_(~blocks.valid_GB.unsqueeze(2), 0)


class Fitted(torch.autograd.Function):
    """The form "outputs". Without clusters the changes alone, which have the dtype of sums."""

    @staticmethod
    def forward(
        ctx: Any,
        expert_out_CD: Tensor,
        rows_ND: Tensor,
        representatives_CD: Tensor,
        clusters: Clusters | None,
        blocks: Blocks,
        system: System,
        ops: PlainOps,
    ) -> Tensor:
        ctx.clusters, ctx.blocks, ctx.out_dtype, ctx.ops = clusters, blocks, expert_out_CD.dtype, ops
        dtype = blocks.width_G1.dtype
        outputs_GBD = centred(blocks, pad(blocks, expert_out_CD).to(dtype))
        weights_GBD = torch.bmm(system.inverse_GBB, outputs_GBD)
        change_ND = ops.grouped(system.difference(blocks), weights_GBD, blocks.rows)
        # Not as attributes: what is saved is dropped under activation recomputation.
        ctx.save_for_backward(rows_ND, representatives_CD, weights_GBD, *system)
        if clusters is None:
            return change_ND
        restored_ND = expert_out_CD.index_select(0, clusters.cluster_N)
        return restored_ND.add_(change_ND)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None, None]:
        """The changes are D W with D = k(x) - K_own, so dW = D^T g; the outputs receive M dW, and K receives
        -(sums + M dW) W^T, sums those of g over the rows of each cluster."""
        blocks: Blocks = ctx.blocks
        ops: PlainOps = ctx.ops
        rows_ND, representatives_CD, weights_GBD, *kept = ctx.saved_tensors
        system = System(*kept)
        grad_ND = grads[0].to(weights_GBD.dtype).contiguous()
        sums_GBD = pad(blocks, ops.segment(grad_ND, None, None, *blocks.moving, False))
        grad_w_GBD = ops.grouped_outer(system.difference(blocks), grad_ND, blocks.rows)
        of_outputs_GBD = torch.bmm(system.inverse_GBB, grad_w_GBD)
        grad_around_NB = ops.grouped(grad_ND, weights_GBD, blocks.rows, True)
        through_GBD = (sums_GBD + of_outputs_GBD).neg_()
        grad_among_GBB = torch.bmm(through_GBD, weights_GBD.transpose(1, 2))
        grad_rows_ND, grad_c_CD = system.gradients(
            grad_around_NB, grad_among_GBB, rows_ND, representatives_CD, blocks, ops
        )
        grad_out_CD = unpad(blocks, centred(blocks, of_outputs_GBD))
        clusters: Clusters | None = ctx.clusters
        if clusters is not None:
            grad_out_CD += ops.segment(grad_ND, None, None, *clusters.segments, False)
        return grad_out_CD.to(ctx.out_dtype), grad_rows_ND, grad_c_CD, None, None, None, None


class _Weights(torch.autograd.Function):
    """The form "weights", first half: A [N, B], by place."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_ND: Tensor,
        representatives_CD: Tensor,
        blocks: Blocks,
        ops: PlainOps,
        ridge: float,
        width: float,
    ) -> Tensor:
        ctx.blocks, ctx.ops = blocks, ops
        system = System.of(rows_ND, representatives_CD, blocks, ops, ridge, width)
        uncentred_NB = ops.grouped(system.difference(blocks), system.inverse_GBB, blocks.places)
        ctx.save_for_backward(rows_ND, representatives_CD, uncentred_NB, *system)
        return _centred_rows(uncentred_NB, blocks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        """With D = k(x) - K_own: dD = centre(dA) M, and K receives -(D M)^T dD - onehot(own)^T dD."""
        blocks: Blocks = ctx.blocks
        ops: PlainOps = ctx.ops
        rows_ND, representatives_CD, uncentred_NB, *kept = ctx.saved_tensors
        system = System(*kept)
        grad_NB = ops.grouped(_centred_rows(grads[0].contiguous(), blocks), system.inverse_GBB, blocks.places)
        grad_among_GBB = ops.grouped_outer(uncentred_NB, grad_NB, blocks.places)
        grad_among_GBB += pad(blocks, ops.segment(grad_NB, None, None, blocks.place_N, *blocks.moving[1:], False))
        grad_rows_ND, grad_c_CD = system.gradients(
            grad_NB, grad_among_GBB.neg_(), rows_ND, representatives_CD, blocks, ops
        )
        return grad_rows_ND, grad_c_CD, None, None, None, None


def _centred_rows(a_NB: Tensor, blocks: Blocks) -> Tensor:
    """Each row less its mean over the valid places; zero elsewhere."""
    mean_N1 = a_NB.sum(1, keepdim=True) / blocks.width_G1.index_select(0, blocks.block_N)
    return (a_NB - mean_N1).mul_(blocks.valid_GB.to(a_NB.dtype).index_select(0, blocks.block_N))


class _Weighted(torch.autograd.Function):
    """The form "weights", second half: E(c_own) + A Y."""

    @staticmethod
    def forward(ctx: Any, weights_NB: Tensor, expert_out_CD: Tensor, clusters: Clusters, blocks: Blocks) -> Tensor:
        ctx.clusters, ctx.blocks, ctx.ops = clusters, blocks, choose(weights_NB)
        ctx.save_for_backward(weights_NB, expert_out_CD)
        outputs_GBD = pad(blocks, expert_out_CD).to(weights_NB.dtype)
        change_ND = ctx.ops.grouped(weights_NB, outputs_GBD, blocks.rows)
        restored_ND = expert_out_CD.index_select(0, clusters.cluster_N)
        # Added apart from the product: the output itself is not rounded with it.
        return restored_ND.add_(change_ND)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        clusters: Clusters = ctx.clusters
        blocks: Blocks = ctx.blocks
        ops: PlainOps = ctx.ops
        weights_NB, expert_out_CD = ctx.saved_tensors
        grad_ND = grads[0].to(weights_NB.dtype).contiguous()
        outputs_GBD = pad(blocks, expert_out_CD).to(weights_NB.dtype)
        grad_weights_NB = ops.grouped(grad_ND, outputs_GBD, blocks.rows, True)
        grad_out_CD = ops.segment(grad_ND, None, None, *clusters.segments, False)
        grad_out_CD += unpad(blocks, ops.grouped_outer(weights_NB, grad_ND, blocks.rows))
        return grad_weights_NB, grad_out_CD.to(expert_out_CD.dtype), None, None
