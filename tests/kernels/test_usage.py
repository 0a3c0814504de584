"""Kernels as a part of PyTorch, and when they are used at all."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_lsh import lsh
from megatron_lsh.lsh import kernels
from megatron_lsh.moe.permute import permute, unpermute
from tests.kernels.cases import Case
from tests.kernels.test_tokens import routed

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
    p, order = c.permutation, (c.clusters.order_N, c.clusters.offsets_C, c.clusters.sizes_C)
    slots, sizes = lsh.clusters_of_slots(c.clusters, p.row_of_TK), c.clusters.sizes_C
    wire = torch.randn(c.clusters.num_clusters, 8, requires_grad=True)
    grad, plain_wire = c.grad, wire.detach()
    x, probs = c.x.detach(), c.probs.detach()
    payload = torch.ops.megatron_lsh.encode(plain_wire, None, 1)
    return {
        "hash": (case.rows, None, case.row_ends, 3, 3),
        "plan": (key, case.rows, None, *ends, count, 3, 3),
        "project": (case.rows, torch.randn(12, 7)),
        "nearest": (case.floats(30, 12), index, centroids, *ends),
        "regroup": (nearest, distance, *ends, count),
        "segment": (case.rows, None, weight, *case.order, False),
        "segment_residual": (case.rows, *case.order),
        "combine": (plain_wire, slots, probs, None, x, plain_wire),
        "dots": (grad, plain_wire, slots, x, plain_wire),
        "spread": (grad, probs, plain_wire, plain_wire, slots, sizes),
        "encode": (plain_wire, torch.rand(plain_wire.shape), 2),
        "decode": (payload, 1, 8, torch.bfloat16),
        "compress": (c.x, p.token_of_row_N, *order, slots),
        "restore": (wire, c.probs, c.x, plain_wire, p.token_of_row_N, p.row_of_TK, *order, slots),
    }


@pytest.mark.parametrize("name", kernels.SCHEMAS)
def test_opcheck(name: str) -> None:
    """Schema, fake kernel, autograd registration, and agreement with AOTAutograd under dynamic shapes."""
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
    probs = torch.rand(60, 2, generator=generator).to(kernels.accumulator(dtype)).requires_grad_()
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
    with kernels.reference_only(), Recorder() as recorder:
        expected = lsh_pass(dtype)
    assert not recorder.called
    for ours, want in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)


def test_backward_follows_the_forward() -> None:
    """Autograd may run backward elsewhere; what the forward pass used must suit it."""
    c = routed(30, 2, 3, 8, torch.float64)
    rows, _, permutation = permute(c.x, c.ids, c.experts, c.clusters.num_rows)
    with kernels.reference_only():
        y = unpermute(rows, c.probs, permutation)
        centroids, _ = lsh.compress(rows, c.clusters, with_residual=False)
    with Recorder() as recorder:
        torch.autograd.grad((y.sum(), centroids.sum()), (rows, c.probs))
    assert not recorder.called & {"dots", "spread"}


def test_other_devices_and_dtypes_are_left_alone() -> None:
    assert kernels.usable(torch.empty(1)) and kernels.usable(torch.empty(1, dtype=torch.float64))
    assert not kernels.usable(torch.empty(1, device="meta"))
    assert not kernels.usable(torch.empty(1, dtype=torch.complex64))


def test_the_fallback_is_announced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "no compiler on this machine"
    monkeypatch.setattr(kernels, "STATUS", kernels.Status(frozenset(), {"cpu": reason}))
    kernels._announce.cache_clear()
    with pytest.warns(UserWarning, match=reason):
        assert not kernels.usable(torch.empty(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not kernels.usable(torch.empty(1))
        lsh_pass()


def in_a_new_process(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_environment_turns_kernels_off() -> None:
    code = "import torch; from megatron_lsh.lsh import kernels; print(kernels.usable(torch.empty(1)))"
    assert in_a_new_process(code, MEGATRON_LSH_KERNELS="0").strip() == "False"


@pytest.mark.parametrize("isa", ["base", "v3"])
def test_narrower_instruction_sets(isa: str) -> None:
    """The loops are compiled for three; the other tests ran the widest this processor has."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/kernels/test_ops.py", "-k", "cpu and not emulated"],
        env={**os.environ, "MEGATRON_LSH_ISA": isa}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
