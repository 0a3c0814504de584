"""The order in which stages run micro-batches: complete, without a circle of ranks that wait, and small in memory."""

from __future__ import annotations

from collections import deque

import pytest

from megatron_lsh.config.pipeline import Stages
from megatron_lsh.parallel.pipeline import (
    Action,
    bubble_share,
    iteration_time,
    passes_at_once,
    training_order,
    warm_up_passes,
)

CASES = [
    (ranks, chunks, micro_batches)
    for ranks in (1, 2, 3, 4)
    for chunks in (1, 2, 3)
    for micro_batches in (1, 2, 3, 4, 6, 8, 12)
    if ranks > 1 or chunks == 1
    if chunks == 1 or micro_batches % ranks == 0
]


def simulated(stages: Stages, micro_batches: int) -> tuple[list[int], int]:
    """Run all ranks in lockstep, one pass of equal length each per tick, with links that keep the order of what is sent.

    Returns how many passes each rank keeps at most, and the ticks. Raises AssertionError where all ranks wait, or where what
    arrives is not what a rank is about to run.
    """
    orders = [deque(training_order(stages, rank, micro_batches)) for rank in range(stages.ranks)]
    virtual = stages.ranks * stages.chunks
    sent: dict[
        tuple[bool, int], deque[tuple[int, int]]
    ] = {}  # (forward, receiving rank) -> (virtual stage, micro-batch)
    kept, most, ticks = [0] * stages.ranks, [0] * stages.ranks, 0
    while any(orders):
        done: list[tuple[int, Action]] = []
        for rank, order in enumerate(orders):
            if not order:
                continue
            action = order[0]
            stage = action.chunk * stages.ranks + rank
            starts = stage == 0 if action.forward else stage == virtual - 1
            queue = sent.get((action.forward, rank))
            if not starts:
                if not queue:
                    continue
                assert queue.popleft() == (stage, action.micro_batch)
            done.append((rank, order.popleft()))
        assert done, "all ranks wait"
        for rank, action in done:
            stage = action.chunk * stages.ranks + rank + (1 if action.forward else -1)
            if 0 <= stage < virtual:
                queue = sent.setdefault((action.forward, stage % stages.ranks), deque())
                queue.append((stage, action.micro_batch))
            kept[rank] += 1 if action.forward else -1
            most[rank] = max(most[rank], kept[rank])
        ticks += 1
    return most, ticks


@pytest.mark.parametrize(("ranks", "chunks", "micro_batches"), CASES)
def test_every_rank_runs_each_pass_once_and_nobody_waits_for_ever(ranks: int, chunks: int, micro_batches: int) -> None:
    stages = Stages(ranks, chunks)
    for rank in range(ranks):
        order = training_order(stages, rank, micro_batches)
        forwards = [(chunk, number) for forward, chunk, number in order if forward]
        backwards = [(chunk, number) for forward, chunk, number in order if not forward]
        wanted = {(chunk, number) for chunk in range(chunks) for number in range(micro_batches)}
        assert set(forwards) == set(backwards) == wanted and len(order) == 2 * len(wanted)
        for chunk in range(chunks):  # gradients add up in the same order in every layout
            assert [number for where, number in backwards if where == chunk] == list(range(micro_batches))
    most, ticks = simulated(stages, micro_batches)
    assert most == [passes_at_once(stages, rank, micro_batches) for rank in range(ranks)]
    if micro_batches >= ranks:  # the formula of arXiv:2104.04473, section 2.2
        work = 2 * micro_batches * chunks
        assert 1 - work / ticks == pytest.approx(bubble_share(stages, micro_batches))


def test_one_stage_runs_one_forward_and_one_backward_pass_in_turn() -> None:
    order = training_order(Stages(), 0, 3)
    assert [(forward, number) for forward, _, number in order] == [(f, n) for n in range(3) for f in (True, False)]


def test_the_first_stage_keeps_as_many_micro_batches_as_there_are_stages() -> None:
    assert [warm_up_passes(Stages(4), rank) for rank in range(4)] == [3, 2, 1, 0]
    assert [warm_up_passes(Stages(4, 2), rank) for rank in range(4)] == [10, 8, 6, 4]  # Megatron-LM's numbers


def played(stages: Stages, micro_batches: int, send: float) -> float:
    """When the last rank is done, if a stage's work on a micro-batch takes 1, a third of it forward."""
    orders = [deque(training_order(stages, rank, micro_batches)) for rank in range(stages.ranks)]
    clocks, left = [0.0] * stages.ranks, dict[tuple[bool, int, int], float]()
    virtual = stages.ranks * stages.chunks
    while any(orders):
        for rank, order in enumerate(orders):
            while order:
                forward, chunk, number = order[0]
                stage = chunk * stages.ranks + rank
                before = (forward, stage - 1 if forward else stage + 1, number)
                if 0 <= before[1] < virtual:
                    if before not in left:
                        break
                    clocks[rank] = max(clocks[rank], left[before] + send)
                order.popleft()
                clocks[rank] += (1 if forward else 2) / 3 / stages.chunks
                left[forward, stage, number] = clocks[rank]
    return max(clocks)


@pytest.mark.parametrize(("ranks", "chunks", "micro_batches"), CASES)
def test_an_iteration_takes_as_long_as_its_schedule_played(ranks: int, chunks: int, micro_batches: int) -> None:
    stages = Stages(ranks, chunks)
    for send in (0.0, 0.02, 0.1, 0.3, 1.0):
        found = iteration_time(stages, micro_batches, 1.0, 2 * chunks * send)
        exact = played(stages, micro_batches, send)
        if chunks == 1:
            part_of_a_round = micro_batches % ranks and micro_batches > ranks
            assert found == pytest.approx(exact) or (part_of_a_round and exact <= found <= exact + 2 * ranks * send)
        else:
            assert 0.92 * exact <= found <= (1.1 if micro_batches >= 6 * ranks else 1.4) * exact
