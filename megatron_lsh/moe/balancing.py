"""Auxiliary losses of the router: load balancing and z-loss.

Shapes: T tokens on this rank, B sequences, E experts, K experts per token. Token t belongs to sequence t % B, because
activations are [S, B, D]. Scores are softmax or normalised sigmoid scores; each token's sum to one.

Load balancing (Switch Transformer, arXiv 2101.03961, eq. 4-6): with f_i the fraction of the routed rows that go to expert
i and P_i the mean score of expert i,

    loss = E * sum_i f_i P_i,

which is 1 at perfect balance and at most E. The gradient flows through P only. The variants differ in what f is taken over:

    aux_loss         the micro-batch of one data-parallel rank;
    seq_aux_loss     each sequence alone; the mean over sequences (DeepSeek-V2, arXiv 2405.04434, section 2.2.3);
    global_aux_loss  the micro-batches of all data-parallel ranks, and all micro-batches of the step so far
                     (arXiv 2501.11873).

Split tokens. With sequence parallelism the ranks of a tensor-parallel group hold different tokens of the same micro-batch.
f and the number of tokens are then summed over the group, and each rank's loss is E * sum_i f_i (its part of P_i): the parts
add up to the loss of the whole micro-batch, in value and in gradient. The z-loss is split in the same way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lsh.parallel.collectives import all_reduce_
from megatron_lsh.parallel.context import Group


@dataclass(frozen=True)
class LoadShare:
    """What the loss takes as constant. Carries no gradient.

    Attributes:
        fraction_GE: fp32 [G, E], f_i per group of tokens; G = B sequences for seq_aux_loss, else 1.
        tokens_G: fp32 [G], tokens per group that P is a mean over. Zero where a whole group is masked.
        micro_batch_tokens: fp32 scalar, unmasked tokens of this data-parallel rank's micro-batch (for the z-loss).
    """

    fraction_GE: Tensor
    tokens_G: Tensor
    micro_batch_tokens: Tensor


def count_experts(expert_ids_TK: Tensor, num_experts: int, groups: int = 1) -> Tensor:
    """Rows per group and expert: int64 [G, E], where token t is in group t % G. Ids of -1 are not counted."""
    bins = torch.where(expert_ids_TK < 0, num_experts, expert_ids_TK)
    if groups > 1:
        group_T = torch.arange(expert_ids_TK.shape[0], device=expert_ids_TK.device) % groups
        bins = bins + group_T[:, None] * (num_experts + 1)
    counts = torch.zeros(groups * (num_experts + 1), dtype=torch.int64, device=bins.device)
    counts.scatter_add_(0, bins.reshape(-1), torch.ones_like(bins).reshape(-1))
    return counts.view(groups, num_experts + 1)[:, :num_experts]


def sum_over(tensor: Tensor, group: Group) -> Tensor:
    """Sum over a process group, without autograd. Returns the tensor itself where there is nothing to add."""
    return tensor if group.size == 1 else all_reduce_(tensor.clone(), group)


def load_share(
    expert_ids_TK: Tensor, num_experts: int, kind: str, batch_size: int, tokens: Group, dp: Group, running_E: Tensor
) -> LoadShare:
    """Count the routed rows that load-balancing loss ``kind`` compares with the scores.

    Args:
        expert_ids_TK: chosen experts of this rank's tokens, -1 for masked tokens.
        kind: aux_loss, seq_aux_loss or global_aux_loss; anything else counts as aux_loss does.
        batch_size: B.
        tokens: ranks that share the micro-batch's tokens, ``ctx.tokens``.
        dp: ranks with other micro-batches (for global_aux_loss).
        running_E: int64 [E], for global_aux_loss: rows of this step's earlier micro-batches; this one is added to it.

    Every rank of ``tokens`` (for global_aux_loss also of ``dp``) must call this.
    """
    topk = expert_ids_TK.shape[1]
    groups = batch_size if kind == "seq_aux_loss" else 1
    counts_GE = sum_over(count_experts(expert_ids_TK, num_experts, groups), tokens)
    # Every unmasked token has K choices, so rows / K counts tokens.
    micro_batch_tokens = counts_GE.sum() / topk
    if kind == "global_aux_loss":
        counts_GE = sum_over(counts_GE, dp)
        # P is a mean over all ranks' tokens, and gradients are averaged over dp afterwards: hence tokens / dp here.
        tokens_G = counts_GE.sum(1) / (topk * dp.size)
        running_E += counts_GE[0]
        counts_GE = running_E[None]
    else:
        tokens_G = counts_GE.sum(1) / topk
    fraction_GE = counts_GE / counts_GE.sum(1, keepdim=True).clamp(min=1)
    return LoadShare(fraction_GE, tokens_G, micro_batch_tokens)


def load_balancing_loss(scores_TE: Tensor, share: LoadShare) -> Tensor:
    """This rank's part of ``mean_g E * sum_i f_gi P_gi``, unscaled; see the module's docstring.

    Args:
        scores_TE: scores of this rank's tokens, zero for masked ones; differentiable.
        share: fractions and token counts. Groups without tokens are left out of the mean.
    """
    groups, num_experts = share.fraction_GE.shape
    total_GE = scores_TE.reshape(-1, groups, num_experts).sum(0)
    loss_G = num_experts * (share.fraction_GE.to(total_GE) * total_GE).sum(1) / share.tokens_G.clamp(min=1)
    return loss_G.sum() / (share.tokens_G > 0).sum().clamp(min=1)


def load_importance_loss(
    scores_TE: Tensor, threshold_T: Tensor, noise: float, token_mask_T: Tensor | None = None
) -> Tensor:
    """Tutel's ``load_importance_loss``, after the losses of Shazeer et al. (arXiv 1701.06538, appendix A), unscaled.

        (CV^2(sum_t p_te) + CV^2(sum_t Phi((p_te - l_t) / (noise / E)))) / 2

    with CV^2 the unbiased variance over the experts e divided by the squared mean, and Phi the normal distribution. The
    paper compares logits with logits; Tutel compares the probability p with the noisy logit l of the token's last choice.
    That is kept as it is, because models were trained with it.

    Args:
        scores_TE: p, softmax of the logits without noise; differentiable.
        threshold_T: l; differentiable.
        noise: ``moe_router_gate_noise``, above 0.
        token_mask_T: bool, True for tokens that count.
    """
    num_experts = scores_TE.shape[1]
    if num_experts == 1:
        return scores_TE.new_zeros(())
    z_TE = (scores_TE - threshold_T[:, None]) * (num_experts / noise)
    load_TE = 0.5 * (1.0 + torch.erf(z_TE / math.sqrt(2.0)))
    if token_mask_T is not None:
        scores_TE, load_TE = (x.masked_fill(~token_mask_T[:, None], 0.0) for x in (scores_TE, load_TE))
    return (_squared_variation(scores_TE.sum(0)) + _squared_variation(load_TE.sum(0))) / 2.0


def _squared_variation(x_E: Tensor) -> Tensor:
    return x_E.var() / (x_E.mean() ** 2 + 1e-10)


def z_loss(logits_TE: Tensor, num_tokens: Tensor, token_mask_T: Tensor | None = None) -> Tensor:
    """This rank's part of ``mean_t (log sum_e exp logit_te)^2``, unscaled (ST-MoE, arXiv 2202.08906, eq. 5).

    Args:
        logits_TE: router logits; differentiable.
        num_tokens: unmasked tokens of the whole micro-batch, over all ranks that share it.
        token_mask_T: bool, True for tokens that count.
    """
    squares_T = torch.logsumexp(logits_TE, dim=-1).square()
    if token_mask_T is not None:
        squares_T = squares_T.masked_fill(~token_mask_T, 0)
    return squares_T.sum() / num_tokens.clamp(min=1)
