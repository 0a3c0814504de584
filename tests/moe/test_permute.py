"""Permutation against plain Python loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_lsh.moe.permute import permute, sort_by_expert, unpermute


def naive_permute(x: Tensor, ids: Tensor, num_experts: int) -> tuple[Tensor, list[int], list[tuple[int, int]]]:
    slots = [
        (t, k) for e in range(num_experts) for t in range(ids.shape[0]) for k in range(ids.shape[1]) if ids[t, k] == e
    ]
    rows = torch.stack([x[t] for t, _ in slots]) if slots else x[:0]
    counts = [sum(int(ids[t, k]) == e for t, k in slots) for e in range(num_experts)]
    return rows, counts, slots


def naive_unpermute(rows: Tensor, probs: Tensor, slots: list[tuple[int, int]]) -> Tensor:
    tokens: list[Tensor] = [torch.zeros(rows.shape[1], dtype=rows.dtype) for _ in range(probs.shape[0])]
    for n, (t, k) in enumerate(slots):
        tokens[t] = tokens[t] + probs[t, k] * rows[n]
    return torch.stack(tokens) if tokens else rows.new_zeros(0, rows.shape[1])


def test_by_hand() -> None:
    x = torch.tensor([[1.0], [2.0], [3.0]])
    ids = torch.tensor([[2, 0], [0, 2], [2, -1]])
    rows, counts, permutation = permute(x, ids, 4, num_rows=5)
    assert rows.flatten().tolist() == [1, 2, 1, 2, 3]  # expert 0: tokens 0, 1; expert 2: tokens 0, 1, 2
    assert counts.tolist() == [2, 0, 3, 0] and counts.dtype == torch.int64
    assert permutation.row_of_TK.tolist() == [[2, 0], [1, 3], [4, -1]]
    assert permutation.token_of_row_N.tolist() == [0, 1, 0, 1, 2]
    y = unpermute(rows * 10, torch.tensor([[0.5, 0.25], [1.0, 1.0], [2.0, 7.0]]), permutation)
    assert y.flatten().tolist() == [7.5, 40, 60]


def test_without_num_rows_the_tail_is_zero() -> None:
    x = torch.ones(3, 2)
    ids = torch.tensor([[1, -1], [-1, -1], [0, 1]])
    rows, _, permutation = permute(x, ids, 2)
    assert rows[:, 0].tolist() == [1, 1, 1, 0, 0, 0]
    rows = rows.clone()
    rows[3:] = float("nan")  # whatever an exchange left there
    y = unpermute(rows, torch.tensor([[1.0, float("nan")], [1, 1], [1, 1]]), permutation)
    assert y[:, 0].tolist() == [1, 0, 2]


@st.composite
def routings(draw: st.DrawFn) -> tuple[Tensor, int]:
    num_experts = draw(st.integers(1, 5))
    topk = draw(st.integers(1, min(3, num_experts)))
    used = draw(st.lists(st.integers(0, num_experts - 1), min_size=topk, unique=True))  # others stay empty
    masked = st.just([-1] * topk)
    chosen = st.permutations(used).map(lambda order: order[:topk])
    partly = st.lists(st.sampled_from([*used, -1]), min_size=topk, max_size=topk)
    tokens = draw(st.lists(st.one_of(chosen, masked, partly), max_size=9))
    return torch.tensor(tokens, dtype=torch.int64).reshape(len(tokens), topk), num_experts


@settings(max_examples=150, deadline=None)
@given(routings(), st.booleans(), st.integers(0, 2**31))
def test_any_routing_equals_loops(routing: tuple[Tensor, int], trim: bool, seed: int) -> None:
    ids, num_experts = routing
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ids.shape[0], 3, generator=generator, dtype=torch.float64)
    probs = torch.rand(ids.shape, generator=generator, dtype=torch.float64)
    num_rows = int((ids >= 0).sum())

    ours_x, ours_p = x.clone().requires_grad_(), probs.clone().requires_grad_()
    rows, counts, permutation = permute(ours_x, ids, num_experts, num_rows if trim else None)
    ours = unpermute(rows * rows, ours_p, permutation)
    naive_x, naive_p = x.clone().requires_grad_(), probs.clone().requires_grad_()
    naive_rows, naive_counts, slots = naive_permute(naive_x, ids, num_experts)
    naive = naive_unpermute(naive_rows * naive_rows, naive_p, slots)

    assert rows.shape[0] == (num_rows if trim else ids.numel())
    assert torch.equal(rows[:num_rows], naive_rows) and not rows[num_rows:].any()
    assert counts.tolist() == naive_counts
    torch.testing.assert_close(ours, naive)
    if not num_rows:
        return
    weight = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), (ours_x, ours_p)),
        torch.autograd.grad((naive * weight).sum(), (naive_x, naive_p)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_gradcheck() -> None:
    ids = torch.tensor([[0, 2], [-1, -1], [2, -1], [1, 0]])
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    probs = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)

    def there_and_back(x: Tensor, probs: Tensor, num_rows: int | None) -> Tensor:
        rows, _, permutation = permute(x, ids, 3, num_rows)
        return unpermute(rows.sin(), probs, permutation)

    assert torch.autograd.gradcheck(lambda x, p: there_and_back(x, p, None), (x, probs))
    assert torch.autograd.gradcheck(lambda x, p: there_and_back(x, p, 5), (x, probs))


def test_bf16_accumulates_in_fp32() -> None:
    torch.manual_seed(0)
    ids = torch.rand(32, 8).argsort(-1)  # 8 experts, every token visits all
    x = torch.randn(32, 16, dtype=torch.bfloat16, requires_grad=True)
    probs = torch.rand(32, 8, requires_grad=True)
    rows, _, permutation = permute(x, ids, 8, 256)
    rows.retain_grad()
    y = unpermute(rows, probs, permutation)
    assert rows.dtype == y.dtype == torch.bfloat16
    exact = (x.detach().double()[:, None] * probs.detach().double()[:, :, None]).sum(1)
    assert torch.equal(y, exact.float().bfloat16())  # rounded once
    grad_y = torch.randn(32, 16).bfloat16()
    y.backward(grad_y)
    assert rows.grad is not None and rows.grad.dtype == torch.bfloat16
    assert probs.grad is not None and probs.grad.dtype == torch.float32
    # The gradient of x sums eight bf16 rows and is rounded once.
    slot_grads = torch.stack([rows.grad[permutation.row_of_TK[:, k]] for k in range(8)]).double()
    assert x.grad is not None and torch.equal(x.grad, slot_grads.sum(0).float().bfloat16())


def test_many_experts_need_wide_keys() -> None:
    ids = torch.tensor([[40_000], [3], [39_999]])
    permutation = sort_by_expert(ids, 50_000)
    assert permutation.token_of_row_N.tolist() == [1, 2, 0]
    assert int(permutation.counts_E[40_000]) == 1 and int(permutation.counts_E.sum()) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_is_deterministic_and_equals_cpu() -> None:
    torch.manual_seed(0)
    ids = torch.randint(-1, 8, (4096, 4))
    x, probs, grad = torch.randn(4096, 64), torch.rand(4096, 4), torch.randn(4096, 64)

    def run(device: str) -> list[Tensor]:
        x_, probs_ = x.to(device).requires_grad_(), probs.to(device).requires_grad_()
        rows, counts, permutation = permute(x_, ids.to(device), 8)
        y = unpermute(rows, probs_, permutation)
        return [t.cpu() for t in (counts, y, *torch.autograd.grad(y, (x_, probs_), grad.to(device)))]

    first, second, cpu = run("cuda"), run("cuda"), run("cpu")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for a, b in zip(first, cpu, strict=True):
        torch.testing.assert_close(a, b)
