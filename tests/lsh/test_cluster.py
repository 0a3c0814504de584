"""Clusters against a dictionary of (expert, codes)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lsh.lsh import cluster_by_code


def check_consistent(clusters, num_rows):
    """What every Clusters object promises."""
    assert clusters.num_rows == num_rows and int(clusters.counts_E.sum()) == clusters.num_clusters
    assert torch.equal(torch.bincount(clusters.cluster_N, minlength=clusters.num_clusters), clusters.sizes_C)
    assert (clusters.sizes_C > 0).all()
    assert torch.equal(clusters.order_N.sort().values, torch.arange(num_rows))
    assert (clusters.cluster_N[clusters.order_N].diff() >= 0).all()
    for start, size, cluster in zip(clusters.offsets_C, clusters.sizes_C, range(clusters.num_clusters), strict=True):
        members = clusters.order_N[start : start + size]
        assert (clusters.cluster_N[members] == cluster).all() and (members.diff() > 0).all()


@given(
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    num_hashes=st.integers(1, 4),
    num_codes=st.sampled_from([2, 4, 2**20]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_matches_a_dictionary(counts, num_hashes, num_codes, seed):
    generator = torch.Generator().manual_seed(seed)
    num_rows = sum(counts)
    # Few distinct codes so that rows do collide, spread over the whole range so that packing is put to the test.
    codes = torch.randint(0, 2, (num_rows, num_hashes), generator=generator) * (num_codes - 1)
    clusters = cluster_by_code(codes, torch.tensor(counts), num_codes)
    check_consistent(clusters, num_rows)
    expert_N = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).tolist()
    groups = {}
    for row in range(num_rows):
        groups.setdefault((expert_N[row], *codes[row].tolist()), []).append(row)
    assert sorted(groups.values()) == sorted(
        [(clusters.cluster_N == c).nonzero().flatten().tolist() for c in range(clusters.num_clusters)]
    )
    assert clusters.counts_E.tolist() == [sum(key[0] == e for key in groups) for e in range(len(counts))]
    first_row = [int((clusters.cluster_N == c).nonzero()[0]) for c in range(clusters.num_clusters)]
    assert first_row == sorted(first_row), "clusters must be numbered by their first rows, hence in expert order"


def test_without_merging_clusters_keep_row_order():
    codes = torch.randperm(40)[:, None]
    assert torch.equal(cluster_by_code(codes, torch.tensor([15, 25]), 40).cluster_N, torch.arange(40))


def test_codes_too_wide_for_one_integer_still_separate():
    """Nine codes of 20 bits do not fit 63 bits; a difference in the first or last code must still count."""
    codes = torch.zeros(4, 9, dtype=torch.int64)
    codes[1, 0] = codes[2, 8] = 2**20 - 1
    clusters = cluster_by_code(codes, torch.tensor([4]), 2**20)
    assert clusters.num_clusters == 3
    assert clusters.cluster_N[0] == clusters.cluster_N[3]


@pytest.mark.parametrize("counts", [[0], [0, 0, 0], [1], [0, 1, 0]])
def test_empty_and_single(counts):
    clusters = cluster_by_code(torch.zeros(sum(counts), 2, dtype=torch.int64), torch.tensor(counts), 16)
    check_consistent(clusters, sum(counts))
    assert clusters.counts_E.tolist() == counts
