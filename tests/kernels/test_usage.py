"""Kernels as a part of PyTorch, and when they are used at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_lsh import lsh
from megatron_lsh.moe.permute import permute, unpermute
from megatron_lsh.ops import accumulator, library, reference_only
from tests.kernels.cases import Case
from tests.kernels.test_fused import routed

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.usefixtures("cpu_kernels")


def example_calls() -> dict[str, tuple]:
    """Arguments for every op."""
    case = Case([40, 0, 25], 12)
    key = torch.ops.megatron_lsh.hash(case.rows, None, case.row_ends, 3, 3)
    ends, count = (case.row_ends, case.cluster_ends), case.num_clusters
    centroids = case.floats(count, 12)
    nearest, distance = torch.ops.megatron_lsh.nearest(case.rows, None, centroids, *ends)
    weight, index = case.floats(case.num_rows), torch.randint(30, (case.num_rows,), generator=case.generator)
    c = routed(20, 2, 3, 8, torch.float32)
    slots, sizes = lsh.clusters_of_slots(c.clusters, c.permutation.row_of_TK), c.clusters.sizes_C
    wire, x, probs = torch.randn(c.clusters.num_clusters, 8), c.x.detach(), c.probs.detach()
    groups = (torch.tensor([2, 30]), torch.tensor([25, 9]), torch.tensor([5, 3]))
    payload = torch.ops.megatron_lsh.encode(wire, None, 1)
    return {
        "hash": (case.rows, None, case.row_ends, 3, 3),
        "plan": (key, case.rows, None, *ends, count, 3, 3),
        "project": (case.rows, torch.randn(12, 7)),
        "grouped": (case.rows, torch.randn(2, 5, 12), *groups, case.order[0], True),
        "grouped_outer": (torch.randn(case.num_rows, 5), case.rows, *groups, None),
        "nearest": (case.floats(30, 12), index, centroids, *ends),
        "regroup": (nearest, distance, *ends, count),
        "segment": (case.rows, None, weight, *case.order, False),
        "segment_residual": (case.rows, *case.order),
        "members": (case.rows, *case.order),
        "combine": (wire, slots, probs, x, wire),
        "dots": (c.grad, wire, slots, x, wire),
        "spread": (c.grad, probs, wire, wire, slots, sizes),
        "encode": (wire, torch.rand(wire.shape), 2),
        "decode": (payload, 1, 8, torch.bfloat16),
    }


@pytest.mark.parametrize("name", [name for name in library.SCHEMAS if name not in library.ON_GPUS])
def test_opcheck(name: str) -> None:
    """Schema, fake kernel, and agreement with AOTAutograd under dynamic shapes."""
    torch.library.opcheck(getattr(torch.ops.megatron_lsh, name).default, example_calls()[name])


def test_works_under_torch_compile() -> None:
    c = routed(20, 2, 3, 8, torch.float32)
    p, slots = c.permutation, lsh.clusters_of_slots(c.clusters, c.permutation.row_of_TK)

    def layer(x: Tensor, probs: Tensor) -> Tensor:
        centroids = lsh.compress_tokens(x * 2, p.token_of_row_N, c.clusters, slots)
        kept = centroids.detach()
        return lsh.restore_tokens(
            centroids.tanh(), probs, x * 2, kept, p.token_of_row_N, p.row_of_TK, c.clusters, slots
        ).sin()

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for got, want in zip(
        (y := compiled(c.x, c.probs), *torch.autograd.grad(y, (c.x, c.probs), c.grad)),
        (y := layer(c.x, c.probs), *torch.autograd.grad(y, (c.x, c.probs), c.grad)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """The names of our ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "megatron_lsh":
            self.called.add(function._opname)
        return function(*args, **(kwargs or {}))


def lsh_pass(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Every function of the path over rows, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 16, generator=generator).to(dtype).requires_grad_()
    probs = torch.rand(60, 2, generator=generator).to(accumulator(dtype)).requires_grad_()
    ids = torch.rand(60, 4, generator=generator).topk(2).indices
    rows, counts_E, permutation = permute(x, ids, 4, 120)
    rotation = lsh.make_rotation(16, 3, 4, seed=0).to(dtype if dtype == torch.float64 else torch.float32)
    budgets_E = lsh.row_budgets(counts_E, 0.3)
    projection = lsh.project(rows.detach(), rotation)
    start = lsh.cluster_projection(projection.float(), counts_E, budgets_E, int(budgets_E.sum()), 3)
    clusters = lsh.refine(rows.detach(), start, counts_E)
    centroids, residual = lsh.compress(rows, clusters, with_residual=True)
    y = unpermute(lsh.restore(centroids.tanh(), residual, clusters), probs, permutation)
    return [clusters.cluster_N, y, *torch.autograd.grad(y.square().sum(), (x, probs))]


ROW_OPS = {"project", "hash", "plan", "nearest", "regroup", "segment", "segment_residual", "combine", "dots", "spread"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_use_kernels_and_agree_with_the_reference(dtype: torch.dtype) -> None:
    with Recorder() as recorder:
        got = lsh_pass(dtype)
    assert recorder.called == (ROW_OPS if dtype == torch.float32 else ROW_OPS - {"project"})
    with reference_only(), Recorder() as recorder:
        expected = lsh_pass(dtype)
    assert not recorder.called
    for ours, want in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("isa", ["base", "v3"])
@pytest.mark.slow
def test_narrower_instruction_sets(isa: str) -> None:
    """The loops are compiled for three; the other tests ran the widest this processor has."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/kernels/test_ops.py", "-k", "cpu and not emulated"],
        env={**os.environ, "MEGATRON_LSH_ISA": isa}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
