"""Budgeted clusters: exact sizes, nesting, and cuts at the shortest common prefixes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lsh.lsh.budget import cluster_by_budget, row_budgets
from tests.lsh.test_cluster import check_consistent


def cluster(codes, counts, budgets, projection=None):
    codes, budgets = torch.as_tensor(codes), torch.as_tensor(budgets)
    if projection is None:
        projection = torch.randn(codes.shape[0], 3, generator=torch.Generator().manual_seed(0))
    return cluster_by_budget(codes, projection, torch.as_tensor(counts), budgets, int(budgets.sum()), 16)


def common_prefix(a, b):
    length = 0
    while length < len(a) and a[length] == b[length]:
        length += 1
    return length


def plain_budget(codes, projection, budget):
    """The definition for one expert: sort, measure every link, cut the budget's weakest ones."""
    order = sorted(range(len(codes)), key=lambda row: (codes[row], row))
    links = []
    for position in range(1, len(order)):
        here, before = order[position], order[position - 1]
        gap = sum((a - b) ** 2 for a, b in zip(projection[here], projection[before], strict=True))
        links.append((common_prefix(codes[here], codes[before]), -gap, position))
    cuts = {position for _, _, position in sorted(links)[: budget - 1]}
    groups = []
    for position, row in enumerate(order):
        if position == 0 or position in cuts:
            groups.append(set())
        groups[-1].add(row)
    return {frozenset(group) for group in groups}


@given(st.integers(1, 30), st.integers(1, 4), st.integers(2, 5), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_matches_the_definition(num_rows, num_hashes, alphabet, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, alphabet, (num_rows, num_hashes), generator=generator)
    projection = torch.randn(num_rows, 3, generator=generator, dtype=torch.float64)
    for budget in {1, (num_rows + 1) // 2, num_rows}:
        clusters = cluster(codes, [num_rows], [budget], projection)
        got = {frozenset((clusters.cluster_N == c).nonzero().flatten().tolist()) for c in range(budget)}
        assert got == plain_budget(codes.tolist(), projection.tolist(), budget)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=5), st.floats(0.05, 1.0), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_budget_is_met_exactly_in_every_expert(counts, rate, seed):
    counts = torch.tensor(counts)
    codes = torch.randint(0, 4, (int(counts.sum()), 3), generator=torch.Generator().manual_seed(seed))
    budgets = row_budgets(counts, rate)
    clusters = cluster(codes, counts, budgets)
    check_consistent(clusters, int(counts.sum()))
    assert torch.equal(clusters.counts_E, budgets)
    assert (budgets <= torch.ceil(counts * rate + 1e-6)).all() and ((budgets > 0) == (counts > 0)).all()


def test_more_budget_only_splits():
    codes = torch.randint(0, 3, (50, 4), generator=torch.Generator().manual_seed(1))
    coarse = cluster(codes, [50], [5])
    for budget in (6, 12, 30, 50):
        fine = cluster(codes, [50], [budget])
        pairs = torch.stack([fine.cluster_N, coarse.cluster_N]).unique(dim=1)
        assert pairs.shape[1] == budget, "each finer cluster must lie in one coarser cluster"
        coarse = fine


def test_full_budget_keeps_row_order():
    codes = torch.randint(0, 2, (20, 3))
    assert torch.equal(cluster(codes, [12, 8], [12, 8]).cluster_N, torch.arange(20))


@pytest.mark.parametrize(
    ("rows", "rate", "budget"),
    [(30, 0.1, 3), (5, 0.2, 1), (6, 0.2, 2), (1, 0.01, 1), (0, 0.5, 0), (7, 1.0, 7), (5, 1e-10, 1), (0, 1e-10, 0)],
)
def test_row_budgets(rows, rate, budget):
    assert row_budgets(torch.tensor([rows]), rate).tolist() == [budget]
