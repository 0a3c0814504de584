"""Products of rows in groups: the definition, group by group, whatever the order of the rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lsh.ops import Groups, PlainOps, choose

OPERATIONS = {"plain": PlainOps(), "chosen": choose(torch.zeros(0))}


@pytest.mark.parametrize("kind", OPERATIONS)
@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 140), st.integers(0, 9)), min_size=1, max_size=5),
    st.integers(9, 11),
    st.integers(1, 70),
    st.booleans(),
    st.integers(0, 99),
)
def test_products_of_groups(kind, gaps_counts_widths, block, features, ordered, seed):
    generator = torch.Generator().manual_seed(seed)
    starts, end = [], 0
    for gap, count, _ in gaps_counts_widths:
        starts.append(end + gap)
        end += gap + count
    num_rows = end + 2
    counts, widths = ([numbers[i] for numbers in gaps_counts_widths] for i in (1, 2))
    order = torch.randperm(num_rows, generator=generator) if ordered else None
    place = torch.arange(num_rows) if order is None else order
    groups = Groups(*map(torch.tensor, (starts, counts, widths)), order)
    there = torch.arange(block) < torch.tensor(widths).unsqueeze(1)
    matrices = torch.randn(len(widths), block, features, generator=generator) * there.unsqueeze(2)
    wide, narrow = (torch.randn(num_rows, n, generator=generator) for n in (features, block))

    product, transposed = torch.zeros(num_rows, features), torch.zeros(num_rows, block)
    outer = torch.zeros(matrices.shape)
    for g, (start, count, width) in enumerate(zip(starts, counts, widths, strict=True)):
        rows = place[start : start + count]
        narrow[start : start + count, width:] = 0
        product[rows] = narrow[start : start + count] @ matrices[g]
        transposed[start : start + count] = wide[rows] @ matrices[g].T
        outer[g] = narrow[start : start + count].T @ wide[rows]
    ops = OPERATIONS[kind]
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(ops.grouped(narrow, matrices, groups), product, **close)
    torch.testing.assert_close(ops.grouped(wide, matrices, groups, True), transposed, **close)
    torch.testing.assert_close(ops.grouped_outer(narrow, wide, groups), outer, **close)
