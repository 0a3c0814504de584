"""Interpolation in the leading coordinates of rows and outputs: its formula, its limits, and that it pays."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from megatron_lsh import lsh
from megatron_lsh.config.moe import LSHConfig
from megatron_lsh.lsh.blocks import block_widths
from megatron_lsh.lsh.cost import LARGEST, LEAST, MOST, WIDER, choose_restoration, operations
from megatron_lsh.lsh.interpolate import RIDGE, WIDTH
from megatron_lsh.moe.compressors.lsh import Sent, interpolated
from megatron_lsh.moe.layer_pass import ReplayMemo
from megatron_lsh.ops import reference_only
from megatron_lsh.plan.memory import restoration_bytes
from tests.lsh.test_interpolate import Calls, clustered, restored_with_gradients
from tests.moe.test_dispatchers import make_layer, single, tokens
from tests.training.helpers import tiny_config


def plain(out, rows, points, clusters, member_C, block, rank):
    """The formula of the module, block by block. Directions are taken from singular value decompositions: for outputs of
    what the range finder sees, a start of evenly spaced points times Y^T Y; for rows of the covariance with them."""
    first, y = 0, out[clusters.cluster_N]
    for width in block_widths(clusters.counts_E.tolist(), block):
        mine, inside = slice(first, first + width), clusters.cluster_N - first
        n = ((inside >= 0) & (inside < width) & ~torch.isin(torch.arange(len(rows)), member_C)).nonzero().squeeze(1)
        first += width
        if width == 1:
            continue

        with torch.no_grad():
            x, z = (t[mine] - t[mine].mean(0) for t in (points, out))
            start = z[(torch.arange(rank) * width) // rank]
            u = torch.linalg.svd(start @ z.T @ z, full_matrices=False)[2].T
            v = torch.linalg.svd((z @ u).T @ x, full_matrices=False)[2].T
        c = points[mine] @ v
        scale = (WIDTH * (c[:, None] - c[None]).square().sum(2).mean()).detach()

        def k(x, c=c, scale=scale):
            return torch.exp(-(x[:, None] - c[None]).square().sum(2) / scale)

        centred = out[mine] - out[mine].mean(0)
        fitted = torch.linalg.solve(k(c) + RIDGE * torch.eye(width, dtype=c.dtype), centred @ u)
        y = y.index_add(0, n, (k(rows[n] @ v) - k(c)[inside[n]]) @ fitted @ u.T)
    return y


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize(("counts", "block", "rank"), [([200, 0, 57, 40], 16, 4), ([300, 150], 128, 8)])
def test_values_and_gradients_equal_the_plain_formula(counts, block, rank, kernels):
    case = clustered(counts, 24, 0.3)
    with nullcontext() if kernels else reference_only():
        exact = restored_with_gradients(plain, *case, True, torch.float64, block=block, rank=rank)
        for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 3e-4)):
            got = restored_with_gradients(lsh.interpolate_leading, *case, True, dtype, block=block, rank=rank)
            for ours, want in zip(got, exact, strict=True):
                assert ours.dtype == dtype and (ours - want).norm() <= limit * want.norm()


def test_gradcheck_at_fixed_directions():
    """Directions and scale are constants to the gradient: the check must not see points or outputs move."""
    rows, clusters, member_C = clustered([8, 5], 4, 0.4)
    points = rows[member_C]
    out = torch.tanh(points).detach()

    def function(x):
        return lsh.interpolate_leading(out, x, points, clusters, member_C, block=3, rank=2)

    assert torch.autograd.gradcheck(function, (rows.clone().requires_grad_(),))


def test_all_coordinates_are_the_full_form_and_so_are_few_representatives():
    """What the flag chooses. To the bit; and as many coordinates as there are, by the other way, but for rounding."""
    case = clustered([60, 30], 8, 0.3)
    full = restored_with_gradients(lsh.interpolate, *case, True, torch.float64, block=9)

    def chosen(out, rows, points, clusters, member_C, **settings):
        sent = Sent(points, None, member_C)
        return interpolated(9, "outputs", **settings)(rows, sent, clusters, torch.tensor([60, 30]))(out)

    for few in ({"rank": 8}, {"rank": 9}, {"rank": 2, "beyond": 18}):
        same = restored_with_gradients(chosen, *case, True, torch.float64, **few)
        assert all(torch.equal(a, b) for a, b in zip(same, full, strict=True))
    other = restored_with_gradients(chosen, *case, True, torch.float64, rank=2, beyond=17)
    assert not torch.equal(other[0], full[0])
    whole = restored_with_gradients(lsh.interpolate_leading, *case, True, torch.float64, block=18, rank=8)
    full = restored_with_gradients(lsh.interpolate, *case, True, torch.float64, block=18)
    for ours, want in zip(whole, full, strict=True):
        assert (ours - want).norm() <= 1e-5 * want.norm()


@given(st.lists(st.integers(0, 30), min_size=1, max_size=4), st.integers(1, 9), st.integers(2, 9), st.booleans())
@settings(max_examples=15, deadline=None)
def test_any_counts_and_what_was_sent_keeps_its_output(counts, rank, block, members):
    """One representative, fewer than coordinates, none at all, all rows in one block."""
    if max(counts) < 2:
        return  # every row is sent
    case = clustered(counts, 10, 0.3, torch.float32)
    y, *gradients = restored_with_gradients(
        lsh.interpolate_leading, *case, members, torch.float32, block=block, rank=rank
    )
    assert y.isfinite().all() and all(g.isfinite().all() for g in gradients)
    if members:
        _, clusters, member_C = case
        out = restored_with_gradients(lsh.interpolate, *case, True, torch.float32, block=block)[0]
        owns_C = clusters.cluster_N[member_C] == torch.arange(clusters.num_clusters)
        assert torch.equal(y[member_C[owns_C]], out[member_C[owns_C]])


def test_rounding_makes_no_directions():
    """Two points have one direction, three two: more coordinates than these change nothing, on whichever rank."""
    rows, clusters, member_C = clustered([30, 20], 8, 0.3, torch.float32)
    out = torch.tanh(rows[member_C])
    for block in (2, 3):

        def restored(rank, noise, block=block):
            generator = torch.Generator().manual_seed(noise)
            shaken = out * (1 + 1e-6 * noise * torch.randn(out.shape, generator=generator))
            return lsh.interpolate_leading(shaken, rows, rows[member_C], clusters, member_C, block=block, rank=rank)

        wanted = restored(block - 1, 0)
        for rank in (block - 1, block, 5):
            for noise in (0, 1, 2):
                torch.testing.assert_close(restored(rank, noise), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kernels", [True, False])
def test_rows_and_outputs_that_are_not_finite_are_read_nowhere_else(kernels):
    """No index follows from a number of theirs: what comes is not finite, and other experts' rows are as ever."""
    rows, clusters, member_C = clustered([40, 30], 8, 0.3, torch.float32)
    out = torch.tanh(rows[member_C])
    with nullcontext() if kernels else reference_only():
        clean = lsh.interpolate_leading(out, rows, rows[member_C], clusters, member_C, block=128, rank=3)
        for bad in (float("nan"), float("inf")):
            broken, wrong = rows.clone(), out.clone()
            broken[int(member_C[0])], wrong[1] = bad, bad
            for x, o in ((broken, out), (rows, wrong)):
                x = x.clone().requires_grad_()
                y = lsh.interpolate_leading(o, x, x.detach()[member_C], clusters, member_C, block=128, rank=3)
                y.sum().backward()
                assert not y[:40].isfinite().all() and torch.equal(y[40:], clean[40:])
                assert x.grad[40:].isfinite().all()


@pytest.mark.parametrize("kernels", [True, False])
def test_launches_do_not_grow_with_experts_or_blocks(kernels):
    counted = []
    with nullcontext() if kernels else reference_only():
        for experts, block in ((8, 128), (64, 128), (8, 4)):
            case = clustered([512 // experts] * experts, 8, 0.25, torch.float32)
            with Calls() as calls:
                restored_with_gradients(lsh.interpolate_leading, *case, True, torch.float32, block=block, rank=3)
            counted.append(calls.count)
    assert len(set(counted)) == 1, counted


def test_a_replay_is_equal_to_the_bit():
    layer, _ = make_layer(single(), "lsh", LSHConfig(lsh_target_rate="0.3", lsh_interpolation_rank=3))
    weights = [layer.router.weight, layer.experts.linear_fc1.weight]
    x = tokens(0)
    memo = ReplayMemo()
    found = []
    for function in (layer, lambda x: checkpoint(lambda x: layer(x, None, memo), x, use_reentrant=False)):
        y, _ = function(x)
        found.append([y.detach(), *torch.autograd.grad(y.pow(2).sum(), [x, *weights])])
    full, _ = make_layer(single(), "lsh", LSHConfig(lsh_target_rate="0.3"))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(full(x)[0].detach(), found[0][0])


def test_a_wide_fit_in_few_coordinates_is_closer_than_narrow_ones_in_all():
    """Rows around a curved sheet of 3 dimensions, a smooth expert."""
    torch.manual_seed(0)
    rows = torch.tanh(torch.randn(1500, 3) @ torch.randn(3, 48)) + 0.02 * torch.randn(1500, 48)
    expert = torch.nn.Sequential(torch.nn.Linear(48, 96), torch.nn.SiLU(), torch.nn.Linear(96, 48))
    counts_E, budgets_E = torch.tensor([1500]), torch.tensor([300])
    start = lsh.cluster_projection(lsh.project(rows, lsh.make_rotation(48, 6, 16, seed=1)), counts_E, budgets_E, 300, 6)
    clusters = lsh.refine(rows, start, counts_E)
    member_C = lsh.nearest_members(rows, clusters)
    with torch.no_grad():
        out, exact = expert(rows[member_C]), expert(rows)

    def error(way, **settings):
        y = way(out, rows, rows[member_C], clusters, member_C, **settings)
        return float((y - exact).square().sum())

    narrow = error(lsh.interpolate, block=30)
    assert error(lsh.interpolate_leading, block=300, rank=24) < 0.5 * narrow


def test_the_cost_function_chooses_coordinates():
    for hidden, width in ((512, 1024), (2048, 768), (4096, 1536)):
        whole, found = (
            choose_restoration(hidden, width, True, 0.2),
            choose_restoration(hidden, width, True, 0.2, rank=0),
        )
        assert found.rank and found.share <= MOST and found.block >= WIDER * whole.block >= WIDER * LEAST
        assert found.beyond == whole.block and found.form == whole.form
        experts = 18 * width * hidden
        assert found.share == operations("outputs", found.block, hidden, 0.2, found.rank) / experts
        # The next block, and twice as many coordinates, cost too much.
        larger = operations("outputs", found.block + 64, hidden, 0.2, found.rank)
        assert found.block == LARGEST or larger > MOST * experts
        assert operations("outputs", WIDER * whole.block, hidden, 0.2, 2 * found.rank) > MOST * experts
        assert choose_restoration(hidden, width, True, 0.2, rank=7).rank == 7
    # Wide experts afford all coordinates, very narrow ones none.
    for hidden, width in ((4096, 14336), (128, 256), (2048, None)):
        assert choose_restoration(hidden, width, True, 0.2, rank=0) == choose_restoration(hidden, width, True, 0.2)


@pytest.mark.parametrize("flags", ["", "--lsh-interpolation-rank 8", "--lsh-interpolation-block 2048"])
def test_the_dry_run_counts_what_is_kept_for_the_backward_pass(flags):
    """Against the bytes of all tensors that autograd saves, less rows, representatives and outputs, counted anyway."""
    base = "--moe-token-dispatcher-type lsh --moe-ffn-hidden-size 64 --hidden-size 64 --num-attention-heads 4 "
    cfg = tiny_config(base + "--num-experts 2 " + flags)
    counts = [1500, 1500]
    rows, clusters, member_C = clustered(counts, 64, 0.2, torch.float32)
    found = choose_restoration(64, 64, True, 0.2, cfg.lsh.lsh_interpolation_block, cfg.lsh.lsh_interpolation_rank)
    inputs = [x.clone().requires_grad_() for x in (rows[member_C], rows, rows[member_C])]
    known, kept = {x.data_ptr() for x in inputs}, {}

    def pack(x):
        if x.is_floating_point() and x.data_ptr() not in known:
            kept[x.data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out, x, points = inputs
        restore = interpolated(found.block, found.form, found.rank, found.beyond)
        y = restore(x, Sent(points, None, member_C), clusters, torch.tensor(counts))(out)
    assert y.requires_grad
    assert restoration_bytes(cfg, sum(counts), 64, 64) == pytest.approx(sum(kept.values()), rel=0.1)
