"""Rows that are not finite: no index leaves its range, whatever the sign of a NaN, and every implementation agrees."""

from __future__ import annotations

import struct

import pytest
import torch
from torch import Tensor

from megatron_lsh.ops.plain import PlainOps
from tests.kernels.conftest import Backend

HASHES, WIDTH = 3, 4
#: NaN of both signs, as the division 0/0 makes them on one processor and another, and infinities of both signs.
POISON = [
    *(struct.unpack("f", struct.pack("I", bits))[0] for bits in (0x7FC00000, 0xFFC00000, 0x7F800001)),
    float("inf"),
    -float("inf"),
]


def poisoned(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Normal numbers, some of which are replaced: single ones, whole rows, or nearly all."""
    rows = torch.randn(shape, generator=generator)
    share = [0.02, 0.3, 1.0][int(torch.randint(3, (), generator=generator))]
    poison = torch.tensor(POISON)[torch.randint(len(POISON), shape, generator=generator)]
    whole_rows = torch.rand((), generator=generator) < 0.5
    where = torch.rand((shape[0], 1) if whole_rows else shape, generator=generator) < share
    return torch.where(where, poison, rows)


def check_clusters(name: str, got: tuple[Tensor, ...], counts: list[int], budgets: list[int]) -> None:
    cluster, order, sizes, offsets = got
    assert torch.equal(order.sort().values, torch.arange(sum(counts))), name
    assert torch.equal(sizes, torch.bincount(cluster, minlength=sum(budgets))) and (sizes > 0).all(), name
    assert torch.equal(offsets, sizes.cumsum(0) - sizes), name
    expert_of_cluster = torch.arange(len(counts)).repeat_interleave(torch.tensor(budgets))
    assert torch.equal(expert_of_cluster[cluster], torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_thousand_random_cases(backend: Backend, dtype: torch.dtype) -> None:
    """Plan, nearest and regroup; more rows than clusters may be no numbers at all."""
    generator, plain = torch.Generator().manual_seed(0), PlainOps()
    for _ in range(80 if backend.name == "emulated" else 500):  # by the emulator a case takes 20 ms
        counts = torch.randint(0, 9, (3,), generator=generator).tolist()
        budgets = [-(-n // 3) for n in counts]
        if not sum(counts):
            continue
        rows, projection = (poisoned((sum(counts), columns), generator) for columns in (5, HASHES * WIDTH))
        rows = rows.to(dtype)
        ends = [torch.tensor(numbers, device=backend.device).cumsum(0) for numbers in (counts, budgets)]
        where = backend.device
        planned = backend.functions.plan(projection.to(where), None, *ends, sum(budgets), HASHES)
        expected = plain.plan(projection, None, *(end.cpu() for end in ends), sum(budgets), HASHES)
        check_clusters("plan", expected, counts, budgets)
        for ours, want in zip(planned, expected, strict=True):
            assert torch.equal(ours.cpu(), want)
        centroids = backend.functions.segment(rows.to(where), None, None, *planned[1:], True)
        nearest, distance = backend.functions.nearest(rows.to(where), None, centroids, *ends)
        expert = torch.arange(3).repeat_interleave(torch.tensor(counts))
        first, last = ends[1].cpu() - torch.tensor(budgets), ends[1].cpu()
        assert (nearest.cpu() >= first[expert]).all() and (nearest.cpu() < last[expert]).all()
        regrouped = backend.functions.regroup(nearest, distance, *ends, sum(budgets))
        expected = plain.regroup(nearest.cpu(), distance.cpu(), *(end.cpu() for end in ends), sum(budgets))
        check_clusters("regroup", expected, counts, budgets)
        for ours, want in zip(regrouped, expected, strict=True):
            assert torch.equal(ours.cpu(), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_are_not_finite_where_those_of_plain_pytorch_are_not(backend: Backend, dtype: torch.dtype) -> None:
    generator, plain = torch.Generator().manual_seed(1), PlainOps()
    for features in (3, 8):
        rows, grad, centroids = (poisoned((n, features), generator).to(dtype) for n in (12, 12, 4))
        index = torch.randint(-1, 4, (12, 2), generator=generator)
        weight = poisoned((12, 2), generator)
        cluster = torch.randint(4, (12,), generator=generator)
        sizes = torch.bincount(cluster, minlength=4)
        order, offsets = torch.argsort(cluster, stable=True), sizes.cumsum(0) - sizes
        for name, arguments in (
            ("segment", (rows, None, None, order, offsets, sizes, True)),
            ("segment", (rows, None, weight[:, 0].contiguous(), order, offsets, sizes, False)),
            ("segment_residual", (rows, order, offsets, sizes)),
            ("combine", (centroids, index, weight, rows, centroids)),
            ("dots", (grad, centroids, index, rows, centroids)),
            ("spread", (grad, weight, centroids, centroids, index, torch.tensor([1, 2, 3, 4]))),
        ):
            on_device = [x.to(backend.device) if isinstance(x, Tensor) else x for x in arguments]
            got, want = getattr(backend.functions, name)(*on_device), getattr(plain, name)(*arguments)
            for ours, expected in zip(*((x,) if isinstance(x, Tensor) else x for x in (got, want)), strict=True):
                torch.testing.assert_close(ours.cpu(), expected, rtol=2e-2, atol=2e-2, equal_nan=True, msg=name)


@pytest.mark.parametrize("format", ["fp8", "int8", "int4"])
def test_a_row_that_is_not_finite_is_none_on_the_other_end_of_the_wire(backend: Backend, format: str) -> None:
    rows = torch.ones(len(POISON) + 1, 7)
    rows[: len(POISON), 3] = torch.tensor(POISON)
    functions = backend.functions
    for noise in (None, torch.rand(rows.shape)):
        noise = noise if noise is None or format != "fp8" else None
        payload = functions.encode(rows.to(backend.device), None if noise is None else noise.to(backend.device), format)
        decoded = functions.decode(payload, format, 7, torch.float32).cpu()
        assert not decoded[:-1].isfinite().any(1).any() and decoded[-1].isfinite().all()
