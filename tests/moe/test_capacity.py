"""Capacity and drop policies against plain Python loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_lsh.moe.capacity import expert_capacity, within_capacity


def naive_keep(ids: Tensor, probs: Tensor, num_experts: int, capacity: int, policy: str) -> Tensor:
    keep = torch.zeros(ids.shape, dtype=torch.bool)
    for e in range(num_experts):
        slots = [(t, k) for t in range(ids.shape[0]) for k in range(ids.shape[1]) if ids[t, k] == e]
        if policy == "probs":
            slots.sort(key=lambda slot: -float(probs[slot]))  # stable: the earlier token wins a tie
        for slot in slots[:capacity]:
            keep[slot] = True
    return keep


def test_capacity_formula() -> None:
    assert expert_capacity(num_tokens=10, topk=2, num_experts=8, factor=1.0) == 3
    assert expert_capacity(num_tokens=10, topk=2, num_experts=8, factor=1.25) == 4
    assert expert_capacity(num_tokens=0, topk=2, num_experts=8, factor=2.0) == 0


@pytest.mark.parametrize(
    ("policy", "kept"), [("probs", [False, True, True, False]), ("position", [True, True, False, False])]
)
def test_policies_by_hand(policy: str, kept: list[bool]) -> None:
    ids = torch.tensor([[0], [0], [0], [0]])
    probs = torch.tensor([[0.1], [0.9], [0.5], [0.2]])
    assert within_capacity(ids, probs, num_experts=2, capacity=2, policy=policy)[:, 0].tolist() == kept


def test_ties_and_masked_tokens() -> None:
    ids = torch.tensor([[-1, -1], [1, 0], [1, 2], [1, 0]])
    probs = torch.full((4, 2), 0.5)
    keep = within_capacity(ids, probs, num_experts=3, capacity=1, policy="probs")
    assert keep.tolist() == [[False, False], [True, True], [False, True], [False, False]]


def test_unknown_policy() -> None:
    with pytest.raises(ValueError, match="fifo"):
        within_capacity(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), 1, 1, "fifo")


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_routing_equals_loops(data: st.DataObject) -> None:
    num_experts, topk = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    slots = st.tuples(st.integers(-1, num_experts - 1), st.sampled_from([0.0, 0.25, 0.5, 0.75]))
    flat = data.draw(st.lists(slots, max_size=8 * topk))
    flat = flat[: len(flat) // topk * topk]
    ids = torch.tensor([i for i, _ in flat], dtype=torch.int64).reshape(-1, topk)
    probs = torch.tensor([p for _, p in flat]).reshape(-1, topk)
    capacity, policy = data.draw(st.integers(0, 5)), data.draw(st.sampled_from(["probs", "position"]))
    keep = within_capacity(ids, probs, num_experts, capacity, policy)
    assert torch.equal(keep, naive_keep(ids, probs, num_experts, capacity, policy))


def test_equals_megatrons_dense_formulation() -> None:
    """Megatron takes, per expert, the top-k over tokens of a dense [T, E] matrix of weights."""
    torch.manual_seed(0)
    tokens, topk, num_experts, factor = 64, 2, 8, 0.75
    logits = torch.randn(tokens, num_experts) + torch.linspace(0, 2, num_experts)
    probs, ids = logits.softmax(-1).topk(topk)
    dense = torch.zeros(tokens, num_experts).scatter(1, ids, probs)
    capacity = expert_capacity(tokens, topk, num_experts, factor)
    kept = torch.zeros_like(dense).scatter(0, dense.topk(capacity, dim=0).indices, 1.0)
    keep = within_capacity(ids, probs, num_experts, capacity, "probs")
    ours = torch.zeros(tokens, num_experts).scatter(1, ids, probs * keep)
    assert torch.equal(ours, dense * kept)
    assert (~keep).sum() > 10
