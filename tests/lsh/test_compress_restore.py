"""Compression and restoration: values, gradients, exactness at one row per cluster."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lsh.lsh import Clusters, compress, residual_energy, restore


def make_clusters(assignment, counts):
    cluster_N = torch.tensor(assignment, dtype=torch.int64)
    sizes = torch.bincount(cluster_N)
    return Clusters.from_assignment(cluster_N, sizes, torch.tensor(counts))


CLUSTERS = make_clusters([0, 1, 0, 2, 3, 3, 3], [2, 0, 2])


def plain(rows, weight, clusters, residual):
    """The formula of docs/lsh.md in ordinary autograd: means, an expert, restoration."""
    centroids = torch.stack([rows[clusters.cluster_N == c].mean(0) for c in range(clusters.num_clusters)])
    out = torch.tanh(centroids @ weight)[clusters.cluster_N]
    return out + (rows - centroids[clusters.cluster_N]) if residual else out


def ours(rows, weight, clusters, residual):
    centroids, kept = compress(rows, clusters, with_residual=residual)
    return restore(torch.tanh(centroids @ weight), kept, clusters)


@pytest.mark.parametrize("residual", [True, False])
def test_values_and_gradients_equal_the_plain_formula(residual):
    torch.manual_seed(0)
    rows = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    results = []
    for function in (plain, ours):
        out = function(rows, weight, CLUSTERS, residual)
        results.append((out, *torch.autograd.grad(out.pow(3).sum(), (rows, weight))))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("residual", [True, False])
def test_gradcheck(residual):
    rows = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r, w: ours(r, w, CLUSTERS, residual), (rows, weight))


def test_stated_gradient():
    """grad row_n = g_n + (J^T G - G)_j / n_j with the residual: the formula the documentation gives."""
    rows = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    jacobian = torch.randn(5, 5, dtype=torch.float64)
    g = torch.randn(7, 5, dtype=torch.float64)
    centroids, kept = compress(rows, CLUSTERS, with_residual=True)
    (got,) = torch.autograd.grad(restore(centroids @ jacobian, kept, CLUSTERS), rows, g)
    summed = torch.zeros(4, 5, dtype=torch.float64).index_add_(0, CLUSTERS.cluster_N, g)
    expected = g + ((summed @ jacobian.T - summed) / CLUSTERS.sizes_C[:, None])[CLUSTERS.cluster_N]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [True, False])
def test_one_row_per_cluster_is_exact_to_the_bit(dtype, residual):
    torch.manual_seed(1)
    permutation = torch.randperm(50)
    clusters = make_clusters(permutation.tolist(), [50])
    rows = torch.randn(50, 24, dtype=dtype, requires_grad=True)
    weight = torch.randn(24, 24, dtype=dtype, requires_grad=True)
    g = torch.randn(50, 24, dtype=dtype)
    direct = torch.tanh(rows[permutation.argsort()] @ weight)[permutation]
    expected = (direct, *torch.autograd.grad(direct, (rows, weight), g))
    out = ours(rows, weight, clusters, residual)
    for want, got in zip(expected, (out, *torch.autograd.grad(out, (rows, weight), g)), strict=True):
        assert torch.equal(want, got)


def test_equal_rows_lose_nothing():
    rows = torch.randn(1, 8).repeat(6, 1)
    clusters = make_clusters([0] * 6, [6])
    centroids, kept = compress(rows, clusters, with_residual=True)
    torch.testing.assert_close(centroids, rows[:1])
    missed, total = residual_energy(rows, centroids, clusters)
    assert missed <= 1e-6 * total
    torch.testing.assert_close(restore(centroids, kept, clusters), rows)


@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_residuals_sum_to_zero_and_energy_is_theirs(num_rows, num_clusters, seed):
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, num_clusters, (num_rows,), generator=generator)
    assignment = torch.unique(raw, return_inverse=True)[1]
    clusters = make_clusters(assignment.tolist(), [int(assignment.max()) + 1])
    rows = torch.randn(num_rows, 6, dtype=torch.float64, generator=generator)
    centroids, kept = compress(rows, clusters, with_residual=True)
    sums = torch.zeros_like(centroids).index_add_(0, clusters.cluster_N, kept)
    torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-12)
    missed, total = residual_energy(rows, centroids, clusters)
    torch.testing.assert_close(missed, kept.square().sum(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(total, rows.square().sum())


def test_no_rows():
    rows = torch.empty(0, 8, requires_grad=True)
    clusters = make_clusters([], [0, 0])
    centroids, kept = compress(rows, clusters, with_residual=True)
    out = restore(centroids, kept, clusters)
    out.sum().backward()
    assert out.shape == (0, 8) and rows.grad.shape == (0, 8)
