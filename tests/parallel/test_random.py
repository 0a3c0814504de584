"""Which ranks draw the same numbers, and saving the state."""

from __future__ import annotations

import io
import random

import numpy as np
import torch

from megatron_lsh.parallel.context import ParallelContext, offline_context
from megatron_lsh.parallel.layout import ParallelLayout
from megatron_lsh.parallel.random import (
    derive_seed,
    get_rng_state,
    seed_everything,
    set_rng_state,
    tensor_parallel_rng,
)


def context(rank: int, sequence_parallel: bool) -> ParallelContext:
    return offline_context(ParallelLayout(4, tp=2), rank, "cpu", sequence_parallel=sequence_parallel)


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_seed_is_stable_and_has_no_collisions_by_concatenation() -> None:
    assert derive_seed(1, "a") == 7297780294385259649  # SHA-256 of b"1\0a"
    assert derive_seed(1, "12") != derive_seed(11, "2")
    assert 0 <= derive_seed("x") < 2**63


def test_ranks_draw_what_dropout_needs() -> None:
    def drawn(rank: int, sequence_parallel: bool) -> tuple[float, float, float]:
        seed_everything(5, context(rank, sequence_parallel))
        return draw()

    assert len({drawn(rank, True) for rank in range(4)}) == 4
    assert drawn(0, False) == drawn(1, False) != drawn(2, False) == drawn(3, False)
    seed_everything(6, context(0, True))
    assert draw() != drawn(0, True)


def test_split_activations_get_their_own_stream_without_sequence_parallel() -> None:
    inside, after = [], []
    for rank in (0, 1):
        ctx = context(rank, sequence_parallel=False)
        seed_everything(5, ctx)
        with tensor_parallel_rng(ctx):
            first = float(torch.rand(()))
        with tensor_parallel_rng(ctx):
            inside.append((first, float(torch.rand(()))))
        after.append(float(torch.rand(())))
    assert len({x for pair in inside for x in pair}) == 4  # differs between ranks, and from call to call
    assert after[0] == after[1]


def test_it_does_nothing_where_ranks_differ_anyway() -> None:
    ctx = context(0, sequence_parallel=True)
    seed_everything(5, ctx)
    expected = torch.rand(2).tolist()
    seed_everything(5, ctx)
    with tensor_parallel_rng(ctx):
        first = float(torch.rand(()))
    assert [first, float(torch.rand(()))] == expected


def test_state_survives_a_file_loaded_safely() -> None:
    seed_everything(3, context(0, True))
    random.gauss(0, 1), np.random.randn()  # leaves half of a pair behind, which is state too
    file = io.BytesIO()
    torch.save(get_rng_state(), file)
    expected = (draw(), random.gauss(0, 1), np.random.randn())
    draw()
    file.seek(0)
    set_rng_state(torch.load(file, weights_only=True))
    assert (draw(), random.gauss(0, 1), np.random.randn()) == expected
