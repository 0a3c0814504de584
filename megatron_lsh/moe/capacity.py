"""Capacity factor: bound the rows of each expert and drop the rest.

Shapes: T tokens on this rank, K experts per token, E experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def expert_capacity(
    num_tokens: int | Tensor, topk: int, num_experts: int, factor: float, rounding: str = "ceil"
) -> int | Tensor:
    """Rows one expert may receive from one rank: ``ceil(T K / E * factor)`` (GShard, arXiv 2006.16668, section 2.2).

    Rounded as Tutel does ("tutel", ``extract_critical``): ``K int(factor * ceil(T / E))``. T counts real tokens only. Where
    some are masked it is known on the device: a scalar tensor, like the result then.
    """
    if rounding == "tutel":
        if isinstance(num_tokens, Tensor):
            return topk * torch.floor(factor * torch.ceil(num_tokens.double() / num_experts))
        return topk * int(factor * -(-num_tokens // num_experts))
    if isinstance(num_tokens, Tensor):
        return torch.ceil(num_tokens.double() * topk / num_experts * factor)
    return math.ceil(num_tokens * topk / num_experts * factor)


def within_capacity(
    expert_ids_TK: Tensor,
    probs_TK: Tensor,
    num_experts: int,
    capacity: int | Tensor,
    policy: str,
    best_T: Tensor | None = None,
) -> Tensor:
    """Which choices fit.

    Args:
        expert_ids_TK: int64, -1 where there is no choice (masked token).
        probs_TK: routing weights, any floating dtype.
        capacity: rows per expert; a number, or a scalar tensor on the device.
        policy: ``"probs"`` keeps each expert's rows of largest weight (the earlier token wins a tie), ``"position"``
            the rows of its first tokens, ``"batch-priority"`` first choices before second ones, and among equal choices
            those of the tokens with the largest best score (Riquelme et al., arXiv 2106.05974, in Tutel's order).
        best_T: the best score of each token, for the last of these.

    Returns:
        bool [T, K]; False where a choice is over capacity or there was none.
    """
    num_tokens, topk = expert_ids_TK.shape
    slots = num_tokens * topk
    # No choice sorts behind the last expert.
    ids = torch.where(expert_ids_TK < 0, num_experts, expert_ids_TK).reshape(-1)
    if policy == "probs":
        preference = torch.sort(probs_TK.detach().reshape(-1), descending=True, stable=True).indices
    elif policy == "batch-priority":
        assert best_T is not None
        order_T = torch.sort(best_T.detach(), descending=True, stable=True).indices
        preference = (order_T * topk + torch.arange(topk, device=ids.device)[:, None]).reshape(-1)
    elif policy == "position":
        preference = torch.arange(slots, device=ids.device)
    else:
        raise ValueError(f"drop policy {policy!r} is not one of probs, position, batch-priority")
    # Stable: within an expert the slots stay in order of preference.
    sorted_ids, by_expert = torch.sort(ids[preference], stable=True)
    first_E = torch.searchsorted(sorted_ids, torch.arange(num_experts + 1, device=ids.device))
    rank_in_expert = torch.arange(slots, device=ids.device) - first_E[sorted_ids]
    keep = torch.empty(slots, dtype=torch.bool, device=ids.device)
    keep[preference[by_expert]] = (rank_in_expert < capacity) & (sorted_ids < num_experts)
    return keep.view(num_tokens, topk)
