"""Permute tokens into rows sorted by expert, and back.

Shapes: T tokens, K experts per token, D features, E experts, N rows.

Both directions are gathers, in the forward and in the backward pass: a token reads its K rows and sums them in a fixed
order. The usual ``index_add_`` would add with atomics on a GPU, in a different order on every run.
Nothing here waits for the device.

Rows are not written to memory before somebody wants them there: until :meth:`Rows.materialise` is called a row is only a
number, the token it copies, so that a compressor whose kernels read tokens never pays for [N, D].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_lsh.ops import by_row, choose


@dataclass(frozen=True)
class Permutation:
    """How rows and tokens correspond. A slot is a (token, choice) pair, numbered ``t * K + k``.

    Attributes:
        row_of_TK: int64 [T, K], the row of each slot; -1 where the slot has none (masked token or dropped choice).
        token_of_row_N: int64 [N], the token of each row.
        counts_E: int64 [E], rows per expert. Rows of expert e are ``counts_E[:e].sum()`` and following.
    """

    row_of_TK: Tensor
    token_of_row_N: Tensor
    counts_E: Tensor


def sort_by_expert(expert_ids_TK: Tensor, num_experts: int, num_rows: int | None = None) -> Permutation:
    """Sort the slots by expert; within an expert they stay in token order (stable).

    Args:
        expert_ids_TK: int64 [T, K], each in [0, E), or -1 for a slot without a row.
        num_experts: E.
        num_rows: number of slots that have a row, if the caller knows it on the host (T * K when no token is masked
            and no choice dropped). Without it N = T * K, and rows from ``counts_E.sum()`` on belong to nobody.
    """
    num_tokens, topk = expert_ids_TK.shape
    # Slots without an expert sort behind the last one. Fewer bytes per key make a faster radix sort.
    key_dtype = torch.int16 if num_experts < 2**15 else torch.int64
    keys = torch.where(expert_ids_TK < 0, num_experts, expert_ids_TK).reshape(-1).to(key_dtype)
    sorted_keys, slot_of_row = torch.sort(keys, stable=True)
    # searchsorted instead of bincount, which makes the host wait on a GPU.
    edges = torch.arange(num_experts + 1, device=keys.device, dtype=key_dtype)
    counts_E = torch.searchsorted(sorted_keys, edges).diff()

    row_of_slot = torch.empty_like(slot_of_row)
    row_of_slot[slot_of_row] = torch.arange(slot_of_row.numel(), device=keys.device)
    row_of_TK = row_of_slot.view(num_tokens, topk).masked_fill(expert_ids_TK < 0, -1)
    if num_rows is not None:
        slot_of_row = slot_of_row[:num_rows]
    return Permutation(row_of_TK, slot_of_row // topk, counts_E)


def permute(
    x_TD: Tensor, expert_ids_TK: Tensor, num_experts: int, num_rows: int | None = None
) -> tuple[Tensor, Tensor, Permutation]:
    """Copy every token once per chosen expert, sorted by expert.

    Args:
        x_TD: [T, D], any floating dtype.
        expert_ids_TK, num_experts, num_rows: see :func:`sort_by_expert`.

    Returns:
        rows_ND in x's dtype, counts_E int64 on x's device, and the permutation for :func:`unpermute`. Without
        ``num_rows``, N = T * K and the rows that belong to nobody are at the end and zero.
    """
    permutation = sort_by_expert(expert_ids_TK, num_experts, num_rows)
    rows_ND = _Permute.apply(x_TD, permutation, num_rows is None)
    return rows_ND, permutation.counts_E, permutation


@dataclass(frozen=True)
class Rows:
    """N rows sorted by expert, or the experts' outputs for them.

    Attributes:
        source_MD: the rows [N, D] themselves; or the tokens [T, D], where row n copies token ``index_N[n]``.
        counts_E: int64, rows per expert; sums to N.
        permutation: how tokens and rows correspond; None for rows that came from other ranks.
        index_N: int64, the token of each row; None where the rows are there themselves.
    """

    source_MD: Tensor
    counts_E: Tensor
    permutation: Permutation | None = None
    index_N: Tensor | None = None

    @staticmethod
    def of_tokens(x_TD: Tensor, permutation: Permutation) -> Rows:
        """The rows of routed tokens, which are not copied yet."""
        return Rows(x_TD, permutation.counts_E, permutation, permutation.token_of_row_N)

    def materialise(self) -> Tensor:
        """The rows, [N, D]; differentiable. Call it once: each call copies."""
        if self.index_N is None:
            return self.source_MD
        assert self.permutation is not None
        return _Permute.apply(self.source_MD, self.permutation, False)

    def outputs(self, rows_ND: Tensor) -> Rows:
        """The same rows with other values: what the experts made of them."""
        return Rows(rows_ND, self.counts_E, self.permutation)

    def combine(self, probs_TK: Tensor) -> Tensor:
        """Each token's sum of its rows, weighted by its routing weights fp32 [T, K]: [T, D]."""
        assert self.permutation is not None, "rows of other ranks belong to no token of this one"
        return unpermute(self.materialise(), probs_TK, self.permutation)


def unpermute(rows_ND: Tensor, probs_TK: Tensor, permutation: Permutation) -> Tensor:
    """Give every token the weighted sum of its rows, ``y_t = sum_k probs_tk * row_(t,k)``.

    Args:
        rows_ND: [N, D], any floating dtype.
        probs_TK: [T, K], fp32 (or fp64). Weights of slots without a row are ignored.
        permutation: as returned by :func:`permute`.

    Returns:
        y_TD in the rows' dtype; the sum runs over k in order, in fp32 or better. Tokens without any row get zeros.
    """
    return _Unpermute.apply(rows_ND, probs_TK, permutation)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, permutation: Permutation, zero_tail: bool) -> Tensor:
        ctx.row_of_TK, ctx.ops = permutation.row_of_TK, choose(x_TD)
        rows_ND = x_TD[permutation.token_of_row_N]
        if zero_tail:
            position_N = torch.arange(rows_ND.shape[0], device=rows_ND.device)
            rows_ND.masked_fill_((position_N >= permutation.counts_E.sum())[:, None], 0)
        return rows_ND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.ops.combine(grads[0], ctx.row_of_TK, None, None, None), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, probs_TK: Tensor, permutation: Permutation) -> Tensor:
        ctx.ops = choose(rows_ND)
        ctx.save_for_backward(rows_ND, probs_TK, permutation.row_of_TK, permutation.token_of_row_N)
        return ctx.ops.combine(rows_ND, permutation.row_of_TK, probs_TK, None, None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad_TD,) = grads
        rows_ND, probs_TK, row_of_TK, token_of_row_N = ctx.saved_tensors
        grad_rows_ND = grad_probs_TK = None
        if ctx.needs_input_grad[0]:
            # For a row its token is the only one to read: the same sum, of one term.
            probs_N1 = by_row(probs_TK, row_of_TK, rows_ND.shape[0]).unsqueeze(1)
            grad_rows_ND = ctx.ops.combine(grad_TD, token_of_row_N.unsqueeze(1), probs_N1, None, None)
        if ctx.needs_input_grad[1]:
            grad_probs_TK = ctx.ops.dots(grad_TD, rows_ND, row_of_TK, None, None).to(probs_TK.dtype)
        return grad_rows_ND, grad_probs_TK, None
