"""Group membership against tables written by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lsh.config.parallel import ParallelConfig
from megatron_lsh.errors import ConfigError
from megatron_lsh.parallel.context import offline_context
from megatron_lsh.parallel.layout import Coordinates, ParallelLayout

# (world, tp, ep): (tp groups, dp groups, ep groups, edp groups)
TABLES = {
    (1, 1, 1): ([[0]], [[0]], [[0]], [[0]]),
    (8, 2, 4): (
        [[0, 1], [2, 3], [4, 5], [6, 7]],
        [[0, 2, 4, 6], [1, 3, 5, 7]],
        [[0, 1, 2, 3], [4, 5, 6, 7]],
        [[0, 4], [1, 5], [2, 6], [3, 7]],
    ),
    (8, 1, 8): (
        [[0], [1], [2], [3], [4], [5], [6], [7]],
        [[0, 1, 2, 3, 4, 5, 6, 7]],
        [[0, 1, 2, 3, 4, 5, 6, 7]],
        [[0], [1], [2], [3], [4], [5], [6], [7]],
    ),
    (8, 2, 8): (
        [[0, 1], [2, 3], [4, 5], [6, 7]],
        [[0, 2, 4, 6], [1, 3, 5, 7]],
        [[0, 1, 2, 3, 4, 5, 6, 7]],
        [[0], [1], [2], [3], [4], [5], [6], [7]],
    ),
    (4, 2, 2): (
        [[0, 1], [2, 3]],
        [[0, 2], [1, 3]],
        [[0, 1], [2, 3]],
        [[0, 2], [1, 3]],
    ),
    (6, 1, 3): (
        [[0], [1], [2], [3], [4], [5]],
        [[0, 1, 2, 3, 4, 5]],
        [[0, 1, 2], [3, 4, 5]],
        [[0, 3], [1, 4], [2, 5]],
    ),
    # EP does not divide DP: 8 experts' ranks over DP 2, and 4 over DP 6.
    (8, 4, 8): (
        [[0, 1, 2, 3], [4, 5, 6, 7]],
        [[0, 4], [1, 5], [2, 6], [3, 7]],
        [[0, 1, 2, 3, 4, 5, 6, 7]],
        [[0], [1], [2], [3], [4], [5], [6], [7]],
    ),
    (12, 2, 4): (
        [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]],
        [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]],
        [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]],
        [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]],
    ),
    # TP larger than EP.
    (8, 4, 2): (
        [[0, 1, 2, 3], [4, 5, 6, 7]],
        [[0, 4], [1, 5], [2, 6], [3, 7]],
        [[0, 1], [2, 3], [4, 5], [6, 7]],
        [[0, 2, 4, 6], [1, 3, 5, 7]],
    ),
}


@pytest.mark.parametrize(("sizes", "groups"), TABLES.items(), ids=str)
def test_groups_are_as_written_by_hand(sizes: tuple[int, int, int], groups: tuple[list[list[int]], ...]) -> None:
    layout = ParallelLayout(*sizes)
    assert (layout.tp_groups(), layout.dp_groups(), layout.ep_groups(), layout.edp_groups()) == groups


def test_coordinates() -> None:
    layout = ParallelLayout(12, tp=2, ep=4)
    assert layout.coordinates(0) == Coordinates(tp=0, dp=0, ep=0, edp=0)
    assert layout.coordinates(7) == Coordinates(tp=1, dp=3, ep=3, edp=1)
    assert (layout.dp, layout.edp) == (6, 3)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4))
def test_groups_partition_the_world_and_agree_with_coordinates(tp: int, ep: int, copies: int) -> None:
    layout = ParallelLayout(tp * ep * copies, tp, ep)
    for kind in ("tp", "dp", "ep", "edp"):
        groups = getattr(layout, f"{kind}_groups")()
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
        assert {len(group) for group in groups} == {getattr(layout, kind)}
        for group in groups:
            assert [getattr(layout.coordinates(rank), kind) for rank in group] == list(range(len(group)))


@pytest.mark.parametrize(
    ("config", "world", "words"),
    [
        (ParallelConfig(tensor_model_parallel_size=3), 8, ["tensor_model_parallel_size is 3", "8", "[1, 2, 4, 8]"]),
        (ParallelConfig(expert_model_parallel_size=16), 8, ["expert_model_parallel_size is 16", "8"]),
        (ParallelConfig(expert_model_parallel_size=0), 8, ["expert_model_parallel_size is 0"]),
        (ParallelConfig(pipeline_model_parallel_size=4), 8, ["pipeline_model_parallel_size is 4", "set it to 1"]),
        (ParallelConfig(context_parallel_size=2), 8, ["context_parallel_size is 2"]),
        (ParallelConfig(expert_tensor_parallel_size=2), 8, ["expert_tensor_parallel_size is 2"]),
        (ParallelConfig(), 0, ["world size is 0"]),
    ],
)
def test_sizes_that_do_not_fit_are_refused(config: ParallelConfig, world: int, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        ParallelLayout.from_config(config, world)
    assert all(word in str(error.value) for word in words), error.value


def test_offline_context_knows_groups_without_torch_distributed() -> None:
    ctx = offline_context(ParallelLayout(8, tp=2, ep=4), rank=5, sequence_parallel=True)
    assert ctx.ep.ranks == (4, 5, 6, 7)
    assert (ctx.ep.rank, ctx.ep.size, ctx.ep.process_group) == (1, 4, None)
    assert (ctx.tp.ranks, ctx.dp.ranks, ctx.edp.ranks) == ((4, 5), (1, 3, 5, 7), (1, 5))
    assert ctx.dense_mesh is None and ctx.sequence_parallel and ctx.device.type == "meta"
    assert not offline_context(sequence_parallel=True).sequence_parallel  # nothing to split over one rank
