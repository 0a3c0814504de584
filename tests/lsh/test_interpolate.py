"""Interpolated restoration, and members in the place of means: values, gradients, exactness, improvement."""

from contextlib import nullcontext
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lsh import lsh
from megatron_lsh.lsh.blocks import block_widths
from megatron_lsh.lsh.cost import LEAST, MOST, choose_restoration, operations
from megatron_lsh.lsh.interpolate import FORMS, RIDGE, WIDTH
from megatron_lsh.ops import reference_only
from tests.lsh import looped_interpolation
from tests.lsh.test_compress_restore import CLUSTERS, make_clusters

GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))

# Expert 0 has clusters 0-1, expert 1 none, expert 2 clusters 2-6: one block, or two of 2 and 3.
WIDE = make_clusters([0, 1, 0, 2, 3, 3, 4, 5, 2, 6, 4, 3, 6], [2, 0, 5])


def plain(rows, weight, clusters, members, blocks):
    """The formula of the module, row by row and with an explicit inverse; `blocks` are (first, last + 1) clusters."""
    member_C = lsh.nearest_members(rows, clusters)
    means = torch.stack([rows[clusters.cluster_N == c].mean(0) for c in range(clusters.num_clusters)])
    points = rows[member_C] if members else means
    outputs = torch.tanh(points @ weight)
    restored = []
    for number, (row, cluster) in enumerate(zip(rows, clusters.cluster_N, strict=True)):
        (mine,) = (slice(*block) for block in blocks if block[0] <= cluster < block[1])
        c, y = points[mine], outputs[mine]
        scale = (WIDTH * (c[:, None] - c[None]).square().sum(2).mean()).detach()

        def k(x, c=c, scale=scale):
            return torch.exp(-(x[..., None, :] - c).square().sum(-1) / scale)

        fitted = torch.inverse(k(c) + RIDGE * torch.eye(len(c), dtype=c.dtype)) @ (y - y.mean(0))
        change = 0 if members and number in member_C else (k(row) - k(points[cluster])) @ fitted
        restored.append(outputs[cluster] + change)
    return torch.stack(restored)


def ours(rows, weight, clusters, members, **settings):
    if not members:
        points, member_C = lsh.compress(rows, clusters, with_residual=False)[0], None
    else:
        member_C = lsh.nearest_members(rows, clusters)
        points, residual = lsh.compress_to_members(rows, clusters, member_C, with_residual=False)
        assert residual is None
    return lsh.interpolate(torch.tanh(points @ weight), rows, points, clusters, member_C, **settings)


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((13, 5), (5, 5))]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("members", [True, False])
@pytest.mark.parametrize(("block", "blocks"), [(5, [(0, 2), (2, 7)]), (4, [(0, 2), (2, 4), (4, 7)])])
def test_values_and_gradients_equal_the_plain_formula(inputs, form, members, block, blocks):
    expected, got = plain(*inputs, WIDE, members, blocks), ours(*inputs, WIDE, members, block=block, form=form)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad(out.pow(3).sum(), inputs) for out in (expected, got)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_at_fixed_scale(inputs, form):
    """`s` is a constant to the gradient, so the check must not see it move: it is fixed by points that do not."""
    rows, weight = inputs
    points = rows.detach()[[0, 1, 3, 4, 6, 7, 9]]

    def function(x, y):
        return lsh.interpolate(y, x, points, WIDE, block=3, form=form)

    assert torch.autograd.gradcheck(function, (rows, torch.tanh(points @ weight).detach().requires_grad_()))


def clustered(counts, hidden, rate, dtype=torch.float64):
    """Rows of a few kinds around an offset, their clusters and members."""
    torch.manual_seed(sum(counts))
    rows = torch.randn(20, hidden)[torch.randint(20, (sum(counts),))] + 0.5 * torch.randn(sum(counts), hidden)
    rows = (rows + 3 * torch.randn(hidden)).to(dtype)
    counts_E = torch.tensor(counts)
    budgets_E = lsh.row_budgets(counts_E, rate)
    projection = lsh.project(rows.float(), lsh.make_rotation(hidden, 6, 16, seed=1))
    start = lsh.cluster_projection(projection, counts_E, budgets_E, int(budgets_E.sum()), 6)
    clusters = lsh.refine(rows, start, counts_E)
    return rows, clusters, lsh.nearest_members(rows, clusters)


def restored_with_gradients(function, rows, clusters, member_C, members, dtype, **settings):
    x = rows.to(dtype).requires_grad_()
    if members:
        points, _ = lsh.compress_to_members(rows.to(dtype), clusters, member_C, with_residual=False)
    else:
        points, _ = lsh.compress(rows.to(dtype), clusters, with_residual=False)
    generator = torch.Generator().manual_seed(5)
    weight, upstream = (torch.randn(n, rows.shape[1], generator=generator) for n in (rows.shape[1], len(rows)))
    points = points.detach().requires_grad_()
    weight, upstream = weight.to(rows.device), upstream.to(rows.device)
    out = torch.tanh(points.detach().double() @ weight.double() / 4).to(dtype).requires_grad_()
    y = function(out, x, points, clusters, member_C if members else None, **settings)
    return [y, *torch.autograd.grad(y, (out, x, points), upstream.to(dtype))]


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("members", [True, False])
@pytest.mark.parametrize(
    ("counts", "block"), [([200, 0, 57, 3, 1], 16), ([300, 150], 128), ([64] * 8, 4), ([700, 9], 64)]
)
def test_all_forms_are_the_loop_over_blocks(counts, block, members, kernels):
    """In fp64 values and gradients are within 1e-12; in fp32 the error against fp64 is at most twice the loop's (three times
    in the form that is for bf16)."""
    case = clustered(counts, 24, 0.3)
    with nullcontext() if kernels else reference_only():
        loop = looped_interpolation.interpolate
        exact, before = (
            restored_with_gradients(loop, *case, members, dtype, block=block)
            for dtype in (torch.float64, torch.float32)
        )
        for form in FORMS:
            got, rounded = (
                restored_with_gradients(lsh.interpolate, *case, members, dtype, block=block, form=form)
                for dtype in (torch.float64, torch.float32)
            )
            for ours, want, ours32, loop32 in zip(got, exact, rounded, before, strict=True):
                assert (ours - want).norm() <= 1e-12 * want.norm()
                assert (ours32 - want).norm() <= (3 if form == "differences" else 2) * (loop32 - want).norm()


@pytest.mark.parametrize("experts", [1, 4])
@pytest.mark.parametrize("block", [24, 128])
def test_products_of_bf16_lose_a_hundredth_of_the_change(experts, block):
    """Of rows far from the origin, whose clusters are close together: products of the rows themselves would lose it all."""
    rows, clusters, member_C = clustered([240] * experts, 64, 0.25)
    rows = (4 + rows).bfloat16().double()
    case = (lsh.interpolate, rows, clusters, member_C, True)
    exact, got = (
        restored_with_gradients(*case, dtype, block=block, form=form)
        for dtype, form in ((torch.float64, "weights"), (torch.bfloat16, "differences"))
    )
    own_ND = restored_with_gradients(*case, torch.float64, block=1, form="weights")[0]
    (want, *gradients), (ours, *ours_gradients) = exact, got
    rounded = (want.bfloat16().double() - want).norm()
    assert (ours - want).norm() <= rounded + 0.01 * (want - own_ND).norm()
    for ours, want in zip(ours_gradients, gradients, strict=True):
        assert (ours - want).norm() <= 0.02 * want.norm()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=str)
def test_on_a_device_it_is_that_in_fp64_on_the_cpu(form, dtype, limit, device):
    """Of rows that have bf16's numbers, so that nothing but the arithmetic differs."""
    rows, clusters, member_C = clustered([300, 0, 150, 9], 24, 0.3)
    rows = rows.bfloat16().double()
    exact = restored_with_gradients(lsh.interpolate, rows, clusters, member_C, True, torch.float64, form=form)
    there = lsh.Clusters(*(getattr(clusters, f.name).to(device) for f in fields(lsh.Clusters)))
    inputs = (rows.to(device), there, member_C.to(device))
    got = restored_with_gradients(lsh.interpolate, *inputs, True, dtype, form=form)
    for ours, want in zip(got, exact, strict=True):
        assert ours.dtype == dtype and (ours.cpu().double() - want).norm() <= limit * want.norm()


class Calls(TorchDispatchMode):
    """How many operations are launched."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernels", [True, False])
def test_launches_do_not_grow_with_experts_or_blocks(form, kernels):
    counted = []
    # Products of differences have one launch in bf16. They put rows in order where an expert has several blocks.
    dtype, cases = torch.float32, [(8, 128), (64, 128), (8, 2)]
    if form == "differences":
        dtype, cases = torch.bfloat16, [(8, 3), (16, 3), (8, 2)]
    with nullcontext() if kernels else reference_only():
        for experts, block in cases:
            case = clustered([512 // experts] * experts, 8, 0.25, torch.float32)
            with Calls() as calls:
                restored_with_gradients(lsh.interpolate, *case, True, dtype, block=block, form=form)
            counted.append(calls.count)
    assert len(set(counted)) == 1, counted


def test_the_cost_function_chooses_form_and_block():
    wide, narrow = choose_restoration(4096, 14336, True, 0.2), choose_restoration(2048, 768, True, 0.2)
    assert wide.block > 1000 and wide.share <= MOST
    assert choose_restoration(4096, 14336, True, 0.2, wide.block + 64).share > MOST
    assert narrow.block == LEAST and narrow.share > MOST
    assert choose_restoration(4096, None, True, 0.2).block == LEAST
    for block, hidden in ((128, 4096), (128, 128), (1024, 1024)):
        found = choose_restoration(hidden, 1024, False, 0.2, block)
        assert operations(found.form, block, hidden, 0.2) == min(operations(f, block, hidden, 0.2) for f in FORMS[:2])
    assert {choose_restoration(4096, 1, True, 0.2, block).form for block in (64, 2048)} == set(FORMS[:2])


@pytest.mark.parametrize("form", FORMS)
def test_the_first_half_needs_no_output_and_both_equal_the_whole(inputs, form):
    """It runs while rows travel. To the bit, gradients included."""
    rows, weight = inputs
    member_C = lsh.nearest_members(rows, WIDE)
    points, _ = lsh.compress_to_members(rows, WIDE, member_C, with_residual=False)
    finish = lsh.prepare_interpolation(rows, points, WIDE, member_C, block=4, form=form)
    out = torch.tanh(points @ weight)
    halves, whole = finish(out), lsh.interpolate(out, rows, points, WIDE, member_C, block=4, form=form)
    assert torch.equal(halves, whole)
    gradients = [torch.autograd.grad(y.pow(3).sum(), inputs, retain_graph=True) for y in (halves, whole)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@given(st.lists(st.integers(0, 300), min_size=1, max_size=9), st.integers(2, 64))
@settings(max_examples=60, deadline=None)
def test_blocks_are_equal_runs_of_one_experts_clusters(counts, most):
    widths = iter(block_widths(counts, most))
    for count in counts:
        mine = [next(widths) for _ in range(-(-count // most))]
        assert sum(mine) == count and (not mine or max(mine) <= min(most, min(mine) + 1))
    assert not list(widths)


@pytest.mark.parametrize("with_residual", [True, False])
def test_gradcheck_of_members(inputs, with_residual):
    member_C = lsh.nearest_members(inputs[0].detach(), WIDE)

    def function(rows):
        sent, residual = lsh.compress_to_members(rows, WIDE, member_C, with_residual=with_residual)
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
    restored = lsh.interpolate(out, rows, rows[member_C], CLUSTERS, member_C)
    assert torch.equal(restored[member_C], out)
    restored = lsh.interpolate(out, rows, rows[member_C], CLUSTERS)  # f at both sides of the difference
    torch.testing.assert_close(restored[member_C], out, rtol=0, atol=1e-5)


def test_one_row_per_cluster_is_exact_to_the_bit():
    rows = torch.randn(5, 8, requires_grad=True)
    clusters = make_clusters([0, 1, 2, 3, 4], [3, 2])
    for with_residual in (True, False):
        member_C = lsh.nearest_members(rows, clusters)
        assert member_C.tolist() == [0, 1, 2, 3, 4]
        sent, residual = lsh.compress_to_members(rows, clusters, member_C, with_residual=with_residual)
        out = lsh.interpolate(torch.tanh(sent), rows, sent, clusters, member_C)
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
    member_C = lsh.nearest_members(rows, clusters) if members else None
    if member_C is None:
        sent, _ = lsh.compress(rows, clusters, with_residual=False)
    else:
        sent, _ = lsh.compress_to_members(rows, clusters, member_C, with_residual=False)
    out, exact = expert(sent), expert(rows)
    error_none = (lsh.restore(out, None, clusters) - exact).square().sum()
    at_once, in_two, in_eight = (
        (lsh.interpolate(out, rows, sent, clusters, member_C, block=block) - exact).square().sum()
        for block in (80, 40, 10)
    )
    assert at_once < 0.35 * error_none
    assert at_once < in_two < in_eight < error_none


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_rows_single_rows_and_none(dtype):
    """Nothing to interpolate between: every row gets its representative's output, gradients are finite."""
    clusters = lsh.Clusters.from_assignment(
        torch.tensor([0, 0, 0, 2]), torch.tensor([3, 0, 1]), torch.tensor([2, 1, 0])
    )
    rows = torch.ones(4, 6, dtype=dtype, requires_grad=True)
    member_C = lsh.nearest_members(rows, clusters)
    sent, _ = lsh.compress_to_members(rows, clusters, member_C, with_residual=False)
    out = (sent * 2).requires_grad_()
    restored = lsh.interpolate(out, rows, sent, clusters, member_C)
    restored.float().square().sum().backward()
    assert restored.dtype == dtype and torch.equal(restored, torch.full_like(rows, 2))
    assert rows.grad.isfinite().all()

    empty = lsh.Clusters.from_assignment(*(torch.zeros(n, dtype=torch.int64) for n in (0, 0, 2)))
    none = torch.zeros(0, 6, dtype=dtype)
    assert lsh.nearest_members(none, empty).shape == (0,)
    assert lsh.interpolate(none, none, none, empty).shape == (0, 6)
