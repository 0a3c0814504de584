"""Layers split over tensor parallel ranks (Megatron-LM, arXiv:1909.08053; sequence parallelism arXiv:2205.05198).

S sequence (this rank's share under sequence parallelism), B micro-batch, D hidden, F wider features, V vocabulary.
A column parallel layer is followed by a row parallel one; between them activations have the full sequence and a slice
of the features, outside them the full features and, under sequence parallelism, a slice of the sequence.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lsh.ops import accumulator
from megatron_lsh.parallel.collectives import (
    all_gather_sequence,
    all_reduce_,
    copy_to_tensor_parallel,
    reduce_from_tensor_parallel,
    reduce_scatter_sequence,
)
from megatron_lsh.parallel.context import Group, ParallelContext
from megatron_lsh.parallel.parameters import ONE_MATRIX, Init, Matrices, local, parameter

ZEROS = Init("zeros")


def enter_tensor_parallel(x_SBD: Tensor, ctx: ParallelContext) -> Tensor:
    """What a column parallel product needs: the full sequence on each rank, gradients summed over ranks."""
    if ctx.sequence_parallel:
        return all_gather_sequence(x_SBD, ctx.tp)
    return copy_to_tensor_parallel(x_SBD, ctx.tp)


def leave_tensor_parallel(partial_SBD: Tensor, ctx: ParallelContext) -> Tensor:
    """Sum of the ranks' partial results: this rank's share of the sequence, or all of it without sequence parallel."""
    if ctx.sequence_parallel:
        return reduce_scatter_sequence(partial_SBD, ctx.tp)
    return reduce_from_tensor_parallel(partial_SBD, ctx.tp)


class ColumnParallelLinear(nn.Module):
    """x_SBD -> [S, B, F/tp] with the output features split; ``gated=True`` gives [S, B, 2, F/tp].

    weight is [F, D], or [2, F, D] (gate, up) when gated, so that a slice along F holds matching halves; bias [F] or
    [2, F]. `matrices`: see ``parameter``; None if this is no hidden layer. Raises ConfigError if F is not divisible by the
    tensor parallel size.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ctx: ParallelContext,
        *,
        init: Init,
        bias: bool = True,
        gated: bool = False,
        matrices: Matrices | None = ONE_MATRIX,
    ) -> None:
        super().__init__()
        self.ctx = ctx
        self.gated = gated
        halves = (2,) if gated else ()
        cut = {"tp": len(halves)}
        self.weight = parameter((*halves, out_features, in_features), ctx, init=init, cut=cut, matrices=matrices)
        self.bias = parameter((*halves, out_features), ctx, init=ZEROS, cut=cut) if bias else None

    def forward(self, x_SBD: Tensor) -> Tensor:
        weight = local(self.weight)
        bias = None if self.bias is None else local(self.bias)
        if self.gated:
            weight = weight.flatten(0, 1)
            bias = None if bias is None else bias.flatten()
        y = F.linear(enter_tensor_parallel(x_SBD, self.ctx), weight, bias)
        return y.unflatten(-1, (2, -1)) if self.gated else y


class RowParallelLinear(nn.Module):
    """[S, B, F/tp] with the input features split -> y_SBD, summed over tensor parallel ranks.

    weight [D, F] split along F. bias [D] is replicated and added once, after the sum.
    Raises ConfigError if F is not divisible by the tensor parallel size.
    """

    def __init__(
        self, in_features: int, out_features: int, ctx: ParallelContext, *, init: Init, bias: bool = True
    ) -> None:
        super().__init__()
        self.ctx = ctx
        self.weight = parameter((out_features, in_features), ctx, init=init, cut={"tp": 1}, matrices=ONE_MATRIX)
        self.bias = parameter((out_features,), ctx, init=ZEROS) if bias else None

    def forward(self, x_SBF: Tensor) -> Tensor:
        y_SBD = leave_tensor_parallel(F.linear(x_SBF, local(self.weight)), self.ctx)
        if self.bias is None:
            return y_SBD
        return y_SBD + local(self.bias, partial_grad=self.ctx.sequence_parallel)


class VocabParallelEmbedding(nn.Module):
    """tokens_BS -> x_SBD. weight [V, D] is split along V; V must be divisible by the tensor parallel size.

    Each rank looks up the tokens of its slice; the sum over ranks leaves this rank's share of the sequence under
    sequence parallelism. Exactly one rank contributes to a row, so the result does not depend on the layout.
    """

    def __init__(self, vocab_size: int, hidden_size: int, ctx: ParallelContext, *, init: Init) -> None:
        super().__init__()
        self.ctx = ctx
        self.weight = parameter((vocab_size, hidden_size), ctx, init=init, cut={"tp": 0})

    def forward(self, tokens_BS: Tensor) -> Tensor:
        tokens_SB, weight_VD = tokens_BS.t(), local(self.weight)
        if self.ctx.tp.size == 1:
            return F.embedding(tokens_SB, weight_VD)
        index_SB = tokens_SB - self.ctx.tp.rank * weight_VD.shape[0]
        elsewhere_SB = (index_SB < 0) | (index_SB >= weight_VD.shape[0])
        x_SBD = F.embedding(index_SB.masked_fill(elsewhere_SB, 0), weight_VD)
        x_SBD = x_SBD.masked_fill(elsewhere_SB.unsqueeze(-1), 0.0)
        return leave_tensor_parallel(x_SBD, self.ctx)


def vocab_parallel_logits(x_SBD: Tensor, weight: Tensor, ctx: ParallelContext) -> Tensor:
    """Logits [S, B, V/tp] of the full sequence; `weight` [V, D] is the output layer's or the (tied) embedding's."""
    return F.linear(enter_tensor_parallel(x_SBD, ctx), local(weight))


def gather_vocabulary(logits: Tensor, group: Group) -> Tensor:
    """[..., V/tp] -> [..., V], for generation and tests; no gradient."""
    if group.size == 1:
        return logits
    parts = [torch.empty_like(logits, memory_format=torch.contiguous_format) for _ in range(group.size)]
    dist.all_gather(parts, logits.detach().contiguous(), group=group.process_group)
    return torch.cat(parts, dim=-1)


def vocab_parallel_cross_entropy(logits_SBV: Tensor, targets_SB: Tensor, group: Group) -> Tensor:
    """-log softmax(logits)[target] per token, as loss_SB in fp32 (fp64 for fp64 logits).

    logits_SBV is this rank's slice [..., V/tp] of the vocabulary, any float dtype; targets int64 [...] are indices into
    the whole vocabulary. A negative target gives loss 0 and no gradient. Arithmetic is fp32; what is kept for backward
    is the logits themselves and one fp32 number per token.

    Backward assumes that the loss is used equally on all ranks of the group, as is the case for logits made by
    ``vocab_parallel_logits``.
    """
    return _CrossEntropy.apply(logits_SBV, targets_SB, group)


class _CrossEntropy(torch.autograd.Function):
    """loss = log sum_v exp(l_v - m) + m - l_target with m = max_v l_v; d loss / d l_v = softmax_v - [v = target]."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: Group) -> Tensor:
        wide = logits.to(accumulator(logits.dtype))
        largest = wide.amax(dim=-1)
        all_reduce_(largest, group, dist.ReduceOp.MAX)
        # Shift in place where `wide` is already our own copy; the shift keeps exp() from overflowing.
        shifted = wide.sub_(largest.unsqueeze(-1)) if wide is not logits else wide - largest.unsqueeze(-1)
        index, here = _local_targets(targets, logits.shape[-1], group)
        at_target = shifted.gather(-1, index.unsqueeze(-1)).squeeze(-1).masked_fill(~here, 0.0)
        total = shifted.exp_().sum(dim=-1)
        sums = torch.stack([total, at_target])  # both in one all-reduce
        all_reduce_(sums, group)
        log_total = sums[0].log()
        ctx.save_for_backward(logits, largest + log_total, index, here, targets >= 0)
        return (log_total - sums[1]).masked_fill(targets < 0, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        logits, log_normaliser, index, here, counted = ctx.saved_tensors
        grad = grad.masked_fill(~counted, 0.0).unsqueeze(-1)
        softmax = (logits.to(log_normaliser.dtype) - log_normaliser.unsqueeze(-1)).exp_()
        grad_logits = softmax.mul_(grad)
        at_target = torch.where(here.unsqueeze(-1), -grad, torch.zeros_like(grad))
        grad_logits.scatter_add_(-1, index.unsqueeze(-1), at_target)
        return grad_logits.to(logits.dtype), None, None


def _local_targets(targets: Tensor, width: int, group: Group) -> tuple[Tensor, Tensor]:
    """(index into this rank's slice, 0 where the target is on another rank; whether it is here)."""
    index = targets - group.rank * width
    here = (index >= 0) & (index < width) & (targets >= 0)
    return index.masked_fill(~here, 0), here
