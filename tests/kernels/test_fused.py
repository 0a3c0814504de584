"""The path over tokens: values and gradients against the plain formula, and against the path over rows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_lsh import lsh
from megatron_lsh.moe.permute import permute, sort_by_expert, unpermute
from megatron_lsh.ops import accumulator, choice, reference_only
from tests.kernels.conftest import Backend

pytestmark = pytest.mark.usefixtures("cpu_kernels")


def routed(
    num_tokens: int, topk: int, experts: int, features: int, dtype: torch.dtype, seed: int = 0, drop: float = 0.0
):
    """Tokens, routing and any clustering of their rows; some choices have no row."""
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.rand(num_tokens, experts, generator=generator).topk(topk).indices
    ids_TK = ids_TK.masked_fill(torch.rand(num_tokens, topk, generator=generator) < drop, -1)
    num_rows = int((ids_TK >= 0).sum())
    permutation = sort_by_expert(ids_TK, experts, num_rows)
    budgets_E = lsh.row_budgets(permutation.counts_E, 0.4)
    parts, first = [torch.zeros(0, dtype=torch.int64)], 0
    for count, budget in zip(permutation.counts_E.tolist(), budgets_E.tolist(), strict=True):
        parts.append(torch.randint(budget, (count,), generator=generator) + first if count else parts[0])
        first += budget
    cluster_N = torch.cat(parts)
    clusters = lsh.Clusters.from_assignment(cluster_N, torch.bincount(cluster_N, minlength=first), budgets_E)
    return SimpleNamespace(
        x=torch.randn(num_tokens, features, generator=generator).to(dtype).requires_grad_(),
        probs=torch.rand(num_tokens, topk, generator=generator).to(accumulator(dtype)).requires_grad_(),
        weight=torch.randn(features, features, generator=generator).div_(features**0.5).to(dtype).requires_grad_(),
        grad=torch.randn(num_tokens, features, generator=generator).to(dtype),
        ids=ids_TK, experts=experts, permutation=permutation, clusters=clusters,
    )  # fmt: skip


def by_tokens(c: SimpleNamespace, residual: str) -> Tensor:
    p, slots = c.permutation, lsh.clusters_of_slots(c.clusters, c.permutation.row_of_TK)
    centroids = lsh.compress_tokens(c.x, p.token_of_row_N, c.clusters, slots)
    out = torch.tanh(centroids @ c.weight)
    x = None if residual == "none" else c.x
    kept = centroids.detach() if residual == "identity" else None
    return lsh.restore_tokens(out, c.probs, x, kept, p.token_of_row_N, p.row_of_TK, c.clusters, slots)


def by_rows(c: SimpleNamespace, residual: str) -> Tensor:
    rows, _, permutation = permute(c.x, c.ids, c.experts, c.clusters.num_rows)
    centroids, kept = lsh.compress(rows, c.clusters, with_residual=residual != "none")
    out = lsh.restore(torch.tanh(centroids @ c.weight), kept if residual == "identity" else None, c.clusters)
    if residual == "straight-through":
        assert kept is not None
        out = lsh.straight_through(out, kept)
    return unpermute(out, c.probs, permutation)


def results(function, c: SimpleNamespace, residual: str) -> list[Tensor]:
    y = function(c, residual)
    return [y, *torch.autograd.grad(y, (c.x, c.probs, c.weight), c.grad)]


@pytest.mark.parametrize("residual", ["identity", "none", "straight-through"])
@given(st.integers(0, 40), st.integers(1, 4), st.integers(4, 9), st.integers(1, 20), st.integers(0, 999), st.booleans())
@settings(max_examples=40, deadline=None)
def test_equals_the_path_over_rows(residual, num_tokens, topk, experts, features, seed, dropping):
    c = routed(num_tokens, topk, experts, features, torch.float64, seed, drop=0.3 if dropping else 0.0)
    with reference_only():
        expected, plain = results(by_rows, c, residual), results(by_tokens, c, residual)
    for got in (plain, results(by_tokens, c, residual), results(by_rows, c, residual)):
        for ours, want in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("residual", ["identity", "none"])
def test_gradcheck(residual):
    c = routed(6, 2, 3, 3, torch.float64, drop=0.2)

    def run(x: Tensor, probs: Tensor, weight: Tensor) -> Tensor:
        return by_tokens(SimpleNamespace(**{**vars(c), "x": x, "probs": probs, "weight": weight}), residual)

    # With the identity, centroids are a function of x that the op's derivative knows of; gradcheck differentiates it, too.
    assert torch.autograd.gradcheck(run, (c.x, c.probs, c.weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", ["identity", "none", "straight-through"])
def test_close_to_fp64_in_training_dtypes(dtype, residual):
    c = routed(60, 2, 4, 33, dtype)
    double = SimpleNamespace(**vars(c))
    for name in ("x", "probs", "weight"):
        setattr(double, name, getattr(c, name).detach().double().requires_grad_())
    double.grad = c.grad.double()
    for got, want in zip(results(by_tokens, c, residual), results(by_tokens, double, residual), strict=True):
        assert (got.double() - want).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("residual", ["identity", "none"])
def test_one_row_per_cluster_is_exact_to_the_bit(dtype, residual):
    c = routed(50, 2, 4, 24, dtype)
    n = c.clusters.num_rows
    order, one = torch.arange(n), torch.ones(n, dtype=torch.int64)
    c.clusters = lsh.Clusters(order, one, c.permutation.counts_E, order, order)

    def plain(c: SimpleNamespace, residual: str) -> Tensor:
        rows, _, permutation = permute(c.x, c.ids, c.experts, n)
        return unpermute(torch.tanh(rows @ c.weight), c.probs, permutation)

    for got, want in zip(results(by_tokens, c, residual), results(plain, c, residual), strict=True):
        assert torch.equal(got, want)


def test_clusters_are_those_of_the_path_over_rows():
    c = routed(200, 2, 4, 32, torch.float32)
    rotation = lsh.make_rotation(32, 6, 16, seed=1)
    counts_E = c.permutation.counts_E
    budgets_E = lsh.row_budgets(counts_E, 0.2)
    index_N, num_clusters = c.permutation.token_of_row_N, int(budgets_E.sum())

    def run(source: Tensor, index_N: Tensor | None, hashes: int = 6) -> lsh.Clusters:
        projection = lsh.project(source, rotation)
        start = lsh.cluster_projection(projection, counts_E, budgets_E, num_clusters, hashes, index_N)
        return lsh.refine(source, start, counts_E, 2, index_N)

    x = c.x.detach()
    got = run(x, index_N)
    with reference_only():
        for expected in (run(x[index_N], None), run(x, index_N)):
            for name in lsh.Clusters.__dataclass_fields__:
                assert torch.equal(getattr(got, name), getattr(expected, name)), name


def test_keys_that_do_not_fit_are_left_to_the_reference():
    projection, counts_E, budgets_E = torch.randn(20, 640), torch.tensor([20]), torch.tensor([6])
    got = lsh.cluster_projection(projection, counts_E, budgets_E, 6, 10)  # 10 codes of 7 bits
    with reference_only():
        expected = lsh.cluster_projection(projection, counts_E, budgets_E, 6, 10)
    assert torch.equal(got.cluster_N, expected.cluster_N)


def test_each_backend_computes_the_same(backend: Backend, monkeypatch: pytest.MonkeyPatch):
    c = routed(40, 2, 4, 16, torch.float32)
    expected = {residual: results(by_tokens, c, residual) for residual in ("identity", "none", "straight-through")}
    on_device = SimpleNamespace(**vars(c))
    for name in ("x", "probs", "weight"):
        setattr(on_device, name, getattr(c, name).detach().to(backend.device).requires_grad_())
    on_device.grad = c.grad.to(backend.device)
    for name in ("permutation", "clusters"):
        whole = getattr(c, name)
        fields = {field: getattr(whole, field).to(backend.device) for field in whole.__dataclass_fields__}
        setattr(on_device, name, type(whole)(**fields))
    monkeypatch.setattr(choice, "KERNELS", backend.functions)
    for residual, want in expected.items():
        for ours, plain in zip(results(by_tokens, on_device, residual), want, strict=True):
            torch.testing.assert_close(ours.cpu(), plain, rtol=1e-4, atol=1e-4)
