"""Group membership against tables written by hand and against counting through all coordinates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, combinations, product
from math import prod

import pytest

from megatron_lsh.config.parallel import ParallelConfig
from megatron_lsh.errors import ConfigError
from megatron_lsh.parallel.context import offline_context
from megatron_lsh.parallel.layout import ParallelLayout

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
    assert (layout.groups("tp"), layout.groups("dp"), layout.groups("ep"), layout.groups("edp")) == groups


DENSE = ("pp", "dp", "cp", "tp")
EXPERT = ("pp", "edp", "ep_node", "ep_local", "etp")


def naive_groups(layout: ParallelLayout, cut: tuple[str, ...], names: tuple[str, ...]) -> list[list[int]]:
    """Count through all coordinates, the last one fastest; ranks are together if the coordinates of no other dimension
    differ."""
    together: dict[tuple[int, ...], list[int]] = {}
    for rank, place in enumerate(product(*(range(getattr(layout, name)) for name in cut))):
        together.setdefault(tuple(i for name, i in zip(cut, place, strict=True) if name not in names), []).append(rank)
    return list(together.values())


def small_layouts() -> Iterator[tuple[ParallelLayout, tuple[str, ...]]]:
    """Every way to cut worlds of up to 12 ranks, dense and expert."""
    for world in (1, 2, 4, 6, 8, 12):
        divisors = [n for n in range(1, world + 1) if world % n == 0]
        for pp, a, b in product(divisors, repeat=3):
            if world % (pp * a * b) == 0:
                yield ParallelLayout(world, pp=pp, cp=a, tp=b), DENSE
                for ep_local in (n for n in divisors if a % n == 0):
                    yield ParallelLayout(world, pp=pp, ep=a, etp=b, ep_local=ep_local), EXPERT


def test_every_group_of_every_small_layout_is_that_of_counting_through() -> None:
    for layout, cut in small_layouts():
        assert prod(getattr(layout, name) for name in cut) == layout.world_size
        for names in chain.from_iterable(combinations(cut, n) for n in range(len(cut) + 1)):
            groups = naive_groups(layout, cut, names)
            assert layout.groups(*names) == groups
            assert all(layout.group_of(rank, *names) == tuple(group) for group in groups for rank in group)
        assert layout.groups("ep") == layout.groups("ep_local", "ep_node")


def test_rank_order_is_megatrons() -> None:
    """Its documented example: 16 ranks, tensor parallel 2, pipeline parallel 4."""
    layout = ParallelLayout(16, tp=2, pp=4)
    assert layout.groups("tp") == [[r, r + 1] for r in range(0, 16, 2)]
    assert layout.groups("pp") == [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]]
    assert layout.groups("dp") == [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15]]


def test_dimensions_of_both_cuts_make_no_group() -> None:
    for names in (("tp", "ep"), ("dp", "edp"), ("replicas",)):
        with pytest.raises(ValueError, match="dimensions of one cut"):
            ParallelLayout(8, tp=2, ep=4).groups(*names)


@pytest.mark.parametrize(
    ("layout", "nodes", "ranks_per_node"),
    [
        (ParallelLayout(8, ep=8), "aaaaaaaa", 8),
        (ParallelLayout(8, ep=8), "aaaabbbb", 4),
        (ParallelLayout(8, ep=8), "abcdefgh", 1),
        (ParallelLayout(8, ep=4), "aaaabbbb", 4),
        (ParallelLayout(8, ep=4), "aabbccdd", 2),
        (ParallelLayout(8, ep=4, etp=2), "aaaabbbb", 2),
        (ParallelLayout(8, ep=8), "aaabbbbb", None),  # nodes of different sizes
        (ParallelLayout(8, ep=4), "aaaaaabb", None),  # one group within a node, one across
        (ParallelLayout(4, ep=4), "abab", None),  # ranks dealt out in turn
        (ParallelLayout(24, ep=12), "a" * 8 + "b" * 8 + "c" * 8, None),
    ],
)
def test_expert_parallel_groups_meet_nodes(layout: ParallelLayout, nodes: str, ranks_per_node: int | None) -> None:
    node_of_rank = [ord(node) for node in nodes]
    assert layout.ep_ranks_per_node(node_of_rank) == ranks_per_node
    assert layout.on_nodes(node_of_rank) == replace(layout, ep_local=ranks_per_node or 1)


def test_ranks_of_a_node_and_ranks_of_equal_place_in_all_nodes() -> None:
    layout = ParallelLayout(16, ep=8).on_nodes([rank // 4 for rank in range(16)])
    assert (layout.ep_node, layout.ep_local) == (2, 4)
    assert layout.groups("ep_local") == [list(range(first, first + 4)) for first in (0, 4, 8, 12)]
    assert layout.groups("ep_node")[:5] == [[0, 4], [1, 5], [2, 6], [3, 7], [8, 12]]


@pytest.mark.parametrize(
    ("config", "world", "words"),
    [
        (
            ParallelConfig(tensor_model_parallel_size=3),
            8,
            ["parallel.tensor_model_parallel_size (3) must divide", "(8)", "[1, 2, 4, 8]"],
        ),
        (ParallelConfig(expert_model_parallel_size=16), 8, ["parallel.expert_model_parallel_size (16) must", "(8)"]),
        (ParallelConfig(expert_model_parallel_size=0), 8, ["parallel.expert_model_parallel_size (0) must"]),
        (ParallelConfig(pipeline_model_parallel_size=3), 8, ["parallel.pipeline_model_parallel_size (3) must", "(8)"]),
        (ParallelConfig(context_parallel_size=3), 8, ["parallel.context_parallel_size (3) must divide", "(8)"]),
        (ParallelConfig(expert_tensor_parallel_size=2), 8, ["parallel.expert_tensor_parallel_size (2) must be 1"]),
        (ParallelConfig(), 0, ["world size (0) must"]),
    ],
)
def test_sizes_that_do_not_fit_are_refused(config: ParallelConfig, world: int, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        ParallelLayout.from_config(config, world)
    assert all(word in str(error.value) for word in words), error.value


def test_products_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"pipeline_model_parallel_size \(4\) times .*tensor_model_parallel_size \(4\)"
    ):
        ParallelLayout(8, tp=4, pp=4)
    with pytest.raises(ConfigError, match=r"ranks per node .* \(3\) must divide .*expert_model_parallel_size \(4\)"):
        ParallelLayout(12, ep=4, ep_local=3)


def test_offline_context_knows_groups_without_torch_distributed() -> None:
    ctx = offline_context(ParallelLayout(8, tp=2, ep=4), rank=5, sequence_parallel=True)
    assert ctx.ep.ranks == (4, 5, 6, 7)
    assert (ctx.ep.rank, ctx.ep.size, ctx.ep.process_group) == (1, 4, None)
    assert (ctx.tp.ranks, ctx.dp.ranks, ctx.edp.ranks) == ((4, 5), (1, 3, 5, 7), (1, 5))
    assert ctx.dense_mesh is None and ctx.sequence_parallel and ctx.device.type == "meta"
    assert (ctx.tokens.ranks, ctx.dp_cp.ranks, ctx.pp.ranks, ctx.cp.ranks) == ((4, 5), (1, 3, 5, 7), (5,), (5,))
    assert offline_context(ParallelLayout(8, tp=2, ep=4), rank=5).tokens.ranks == (5,)  # tensor parallel copies
    assert not offline_context(sequence_parallel=True).sequence_parallel  # nothing to split over one rank


def test_offline_context_on_nodes() -> None:
    one = offline_context(ParallelLayout(8, ep=8), rank=6)
    assert (one.local_rank, set(one.node_of_rank)) == (6, {0})
    assert (one.ep_local.ranks, one.ep_node.ranks) == (tuple(range(8)), (6,))
    two = offline_context(ParallelLayout(8, ep=8), rank=6, ranks_per_node=4)
    assert (two.local_rank, two.node_of_rank) == (2, (0, 0, 0, 0, 1, 1, 1, 1))
    assert (two.ep_local.ranks, two.ep_node.ranks) == ((4, 5, 6, 7), (2, 6))
    odd = offline_context(ParallelLayout(6, ep=6), rank=5, ranks_per_node=4)
    assert (odd.ep_local.ranks, odd.ep_node.ranks) == ((5,), tuple(range(6)))
