"""Interpolated restoration, and members in the place of means: values, gradients, exactness, improvement."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lsh import lsh
from megatron_lsh.lsh.interpolate import RIDGE, WIDTH
from tests.lsh.test_compress_restore import CLUSTERS, make_clusters

COUNTS = torch.tensor([3, 0, 4])  # experts 0 and 2 have 2 clusters of CLUSTERS each


def plain(rows, weight):
    """The formula of the module, expert by expert and with an explicit inverse."""
    member_C = lsh.nearest_members(rows, CLUSTERS)
    points = rows[member_C]
    outputs = torch.tanh(points @ weight)
    restored = []
    for row, cluster in zip(rows, CLUSTERS.cluster_N, strict=True):
        mine = slice(0, 2) if cluster < 2 else slice(2, 4)
        c, y = points[mine], outputs[mine]
        scale = (WIDTH * (c[:, None] - c[None]).square().sum(2).mean()).detach()

        def k(x, c=c, scale=scale):
            return torch.exp(-(x[..., None, :] - c).square().sum(-1) / scale)

        fitted = torch.inverse(k(c) + RIDGE * torch.eye(2)) @ (y - y.mean(0))
        restored.append(outputs[cluster] + (k(row) - k(points[cluster])) @ fitted)
    return torch.stack(restored)


def ours(rows, weight):
    points, residual = lsh.compress_to_members(rows, CLUSTERS, lsh.nearest_members(rows, CLUSTERS), with_residual=False)
    assert residual is None
    return lsh.interpolate(torch.tanh(points @ weight), rows, points, CLUSTERS, COUNTS)


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((7, 5), (5, 5))]


def test_values_and_gradients_equal_the_plain_formula(inputs):
    results = []
    for function in (plain, ours):
        out = function(*inputs)
        results.append((out, *torch.autograd.grad(out.pow(3).sum(), inputs)))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_gradcheck_at_fixed_scale(inputs):
    """`s` is a constant to the gradient, so the check must not see it move: it is fixed by points that do not."""
    rows, weight = inputs
    points = rows.detach()[[0, 1, 3, 4]]

    def function(x, y):
        return lsh.interpolate(y, x, points, CLUSTERS, COUNTS)

    assert torch.autograd.gradcheck(function, (rows, torch.tanh(points @ weight).detach().requires_grad_()))


@pytest.mark.parametrize("with_residual", [True, False])
def test_gradcheck_of_members(inputs, with_residual):
    member_C = lsh.nearest_members(inputs[0].detach(), CLUSTERS)

    def function(rows):
        sent, residual = lsh.compress_to_members(rows, CLUSTERS, member_C, with_residual=with_residual)
        return (sent, residual) if with_residual else sent

    assert torch.autograd.gradcheck(function, (inputs[0],))


def test_gradient_of_an_empty_clusters_member():
    """It is a row of another cluster: what it receives comes on top of that row's own gradient."""
    clusters = lsh.Clusters.from_assignment(torch.tensor([0, 0, 2]), torch.tensor([2, 0, 1]), torch.tensor([3]))
    rows = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    member_C = lsh.nearest_members(rows, clusters)
    assert member_C.tolist()[1:] == [2, 2]

    def function(x):
        return lsh.compress_to_members(x, clusters, member_C, with_residual=True)

    assert torch.autograd.gradcheck(function, (rows,))


def test_rows_that_were_sent_get_their_expert_output():
    torch.manual_seed(1)
    rows = torch.randn(7, 8)
    member_C = lsh.nearest_members(rows, CLUSTERS)
    out = torch.randn(4, 8)
    restored = lsh.interpolate(out, rows, rows[member_C], CLUSTERS, COUNTS)
    torch.testing.assert_close(restored[member_C], out, rtol=0, atol=1e-5)


def test_one_row_per_cluster_is_exact_to_the_bit():
    rows = torch.randn(5, 8, requires_grad=True)
    clusters = make_clusters([0, 1, 2, 3, 4], [3, 2])
    for with_residual in (True, False):
        member_C = lsh.nearest_members(rows, clusters)
        assert member_C.tolist() == [0, 1, 2, 3, 4]
        sent, residual = lsh.compress_to_members(rows, clusters, member_C, with_residual=with_residual)
        out = lsh.interpolate(torch.tanh(sent), rows, sent, clusters, torch.tensor([3, 2]))
        if residual is not None:
            out = out + residual
        upstream = torch.randn(5, 8)
        (grad,) = torch.autograd.grad(out, rows, upstream)
        (exact,) = torch.autograd.grad(torch.tanh(rows), rows, upstream)
        assert torch.equal(sent, rows) and torch.equal(out, torch.tanh(rows)) and torch.equal(grad, exact)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_members_are_their_clusters_rows_nearest_to_the_mean(num_rows, num_clusters, seed):
    torch.manual_seed(seed)
    used, cluster_N = torch.randint(0, num_clusters, (num_rows,)).unique(return_inverse=True)
    clusters = make_clusters(cluster_N.tolist(), [len(used)])
    rows = torch.randn(num_rows, 3)
    member_C = lsh.nearest_members(rows, clusters)
    for cluster, member in enumerate(member_C.tolist()):
        mine = rows[cluster_N == cluster]
        distances = (mine - mine.mean(0)).norm(dim=1)
        assert cluster_N[member] == cluster
        assert (rows[member] - mine.mean(0)).norm() <= distances.min() + 1e-5


@pytest.mark.parametrize("members", [True, False])
def test_outputs_of_a_smooth_expert_come_closer(members):
    """The reason it exists: rows on a curved sheet, an expert that bends on it, a fifth of the rows sent."""
    torch.manual_seed(0)
    rows = torch.tanh(torch.randn(400, 3) @ torch.randn(3, 32)) + 0.02 * torch.randn(400, 32)
    expert = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.SiLU(), torch.nn.Linear(64, 32))
    counts = torch.tensor([400])
    budgets = lsh.row_budgets(counts, 0.2)
    projection = lsh.project(rows, lsh.make_rotation(32, 6, 8, seed=0))
    clusters = lsh.refine(rows, lsh.cluster_projection(projection, counts, budgets, 80, 6), counts, 1)
    if members:
        sent, _ = lsh.compress_to_members(rows, clusters, lsh.nearest_members(rows, clusters), with_residual=False)
    else:
        sent, _ = lsh.compress(rows, clusters, with_residual=False)
    out, exact = expert(sent), expert(rows)
    error_none = (lsh.restore(out, None, clusters) - exact).square().sum()
    error = (lsh.interpolate(out, rows, sent, clusters, counts) - exact).square().sum()
    assert error < 0.35 * error_none


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_rows_single_rows_and_none(dtype):
    """Nothing to interpolate between: every row gets its representative's output, gradients are finite."""
    clusters = lsh.Clusters.from_assignment(
        torch.tensor([0, 0, 0, 2]), torch.tensor([3, 0, 1]), torch.tensor([2, 1, 0])
    )
    rows = torch.ones(4, 6, dtype=dtype, requires_grad=True)
    sent, _ = lsh.compress_to_members(rows, clusters, lsh.nearest_members(rows, clusters), with_residual=False)
    out = (sent * 2).requires_grad_()
    restored = lsh.interpolate(out, rows, sent, clusters, torch.tensor([3, 1, 0]))
    restored.float().square().sum().backward()
    assert restored.dtype == dtype and torch.equal(restored, torch.full_like(rows, 2))
    assert rows.grad.isfinite().all()

    empty = lsh.Clusters.from_assignment(*(torch.zeros(n, dtype=torch.int64) for n in (0, 0, 2)))
    none = torch.zeros(0, 6, dtype=dtype)
    assert lsh.nearest_members(none, empty).shape == (0,)
    assert lsh.interpolate(none, none, none, empty, torch.zeros(2, dtype=torch.int64)).shape == (0, 6)
