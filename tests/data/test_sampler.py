from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lsh.data.sampler import micro_batch_indices

small = st.integers(1, 5)


@given(st.integers(0, 1000), small, small, small)
def test_ranks_read_the_global_batch_once(consumed: int, micro: int, steps: int, dp: int) -> None:
    ranks = np.stack([micro_batch_indices(consumed, micro, steps, rank, dp) for rank in range(dp)], axis=1)
    assert ranks.shape == (steps, dp, micro)
    assert ranks.reshape(-1).tolist() == [*range(consumed, consumed + steps * dp * micro)]


@given(st.integers(0, 1000), small, small, small, small)
def test_more_ranks_regroup_the_same_micro_batches(consumed: int, micro: int, steps: int, dp: int, factor: int) -> None:
    def micro_batches(steps: int, dp: int) -> list[list[int]]:
        by_rank = [micro_batch_indices(consumed, micro, steps, rank, dp).tolist() for rank in range(dp)]
        return [by_rank[rank][step] for step in range(steps) for rank in range(dp)]

    assert micro_batches(steps * factor, dp) == micro_batches(steps, dp * factor)


def test_refuses_nonsense() -> None:
    for arguments in ((-1, 1, 1, 0, 1), (0, 0, 1, 0, 1), (0, 1, 0, 0, 1), (0, 1, 1, 1, 1)):
        with pytest.raises(ValueError, match="make no batch"):
            micro_batch_indices(*arguments)
