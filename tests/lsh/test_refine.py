"""Refinement: one k-means step per expert, empty clusters refilled."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lsh.lsh import Clusters, compress, nearest_centroid, refine, residual_energy, row_budgets
from megatron_lsh.ops import choose, reference_only


def random_start(rows, counts, rate, seed):
    """Any assignment that respects experts: consecutive rows share clusters."""
    budgets = row_budgets(counts, rate)
    parts, first = [], 0
    for count, budget in zip(counts.tolist(), budgets.tolist(), strict=True):
        parts.append(torch.arange(count) * budget // max(count, 1) + first)
        first += budget
    cluster_N = torch.cat(parts)
    return Clusters.from_assignment(cluster_N, torch.bincount(cluster_N, minlength=first), budgets)


def energy(rows, clusters):
    centroids, _ = compress(rows, clusters, with_residual=False)
    return residual_energy(rows, centroids, clusters)[0].item()


@given(st.lists(st.integers(0, 25), min_size=1, max_size=4), st.floats(0.1, 0.9), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_energy_never_rises_and_budgets_stay(counts, rate, seed):
    counts = torch.tensor(counts)
    rows = torch.randn(int(counts.sum()), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    clusters = random_start(rows, counts, rate, seed)
    for _ in range(3):
        better = refine(rows, clusters, counts, steps=1)
        assert torch.equal(better.counts_E, clusters.counts_E)
        assert better.num_clusters == clusters.num_clusters
        assert energy(rows, better) <= energy(rows, clusters) + 1e-9
        # No row leaves its expert.
        ends = better.counts_E.cumsum(0)
        expert_of_cluster = torch.searchsorted(ends, better.cluster_N, right=True)
        assert torch.equal(expert_of_cluster, torch.arange(len(counts)).repeat_interleave(counts))
        clusters = better


def test_nearest_is_nearest_within_the_expert():
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(20, 4, generator=generator)
    centroids = torch.randn(7, 4, generator=generator)
    nearest, distance = nearest_centroid(rows, centroids, [8, 0, 12], [3, 0, 4])
    full = torch.cdist(rows, centroids).square()
    full[:8, 3:] = full[8:, :3] = float("inf")
    assert torch.equal(nearest, full.argmin(1))
    torch.testing.assert_close(distance, full.min(1).values, rtol=1e-4, atol=1e-5)


def test_an_empty_cluster_gets_the_farthest_row():
    rows = torch.tensor([[0.0], [0.1], [0.2], [10.0], [0.0]])
    # Both clusters start on the same mean, so one of them loses everything.
    start = Clusters.from_assignment(torch.tensor([0, 0, 0, 0, 1]), torch.tensor([4, 1]), torch.tensor([2]))
    one_empty = refine(
        rows[:4],
        Clusters.from_assignment(torch.tensor([0, 0, 0, 0]), torch.tensor([4, 0]), torch.tensor([2])),
        torch.tensor([4]),
    )
    assert (one_empty.sizes_C > 0).all()
    assert one_empty.cluster_N[3] != one_empty.cluster_N[0]
    assert refine(rows, start, torch.tensor([5])).sizes_C.sum() == 5


@pytest.mark.parametrize("by_kernels", [True, False])
def test_no_cluster_is_emptied_to_fill_another(by_kernels):
    """Row 4 is the farthest from its centroid, and alone in its cluster: it stays, and row 0 moves in its stead."""
    nearest, distance = torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0.2, 0.1, 0.0, 0.1, 5.0])
    with nullcontext() if by_kernels else reference_only():
        cluster, *_, sizes, _ = choose(distance).regroup(nearest, distance, torch.tensor([5]), torch.tensor([3]), 3)
    assert cluster.tolist() == [2, 0, 0, 0, 1] and sizes.tolist() == [3, 1, 1]


def test_coinciding_rows_stay_finite():
    rows = torch.ones(6, 3, requires_grad=True)
    clusters = refine(rows, random_start(rows, torch.tensor([6]), 0.5, 0), torch.tensor([6]))
    assert (clusters.sizes_C > 0).all()
    centroids, kept = compress(rows, clusters, with_residual=True)
    (centroids.sum() + kept.square().sum()).backward()
    assert centroids.isfinite().all() and rows.grad.isfinite().all()


def test_nothing_to_do_without_merging():
    rows = torch.ones(5, 3)
    clusters = random_start(rows, torch.tensor([5]), 1.0, 0)
    assert refine(rows, clusters, torch.tensor([5])) is clusters
