"""The order in which a rank of a pipeline runs its chunks. Arithmetic only.

1F1B and interleaved 1F1B as in Narayanan et al., arXiv:2104.04473: after a warm-up each rank runs one forward and one
backward pass in turn, so that it keeps activations of as many micro-batches as there are stages, and not of all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from megatron_lsh.config.pipeline import Stages


class Action(NamedTuple):
    """One pass of one micro-batch through one chunk of a rank."""

    forward: bool
    chunk: int
    micro_batch: int


def forward_order(stages: Stages, micro_batches: int) -> Iterator[tuple[int, int]]:
    """(chunk, micro-batch) of the forward passes, alike on every rank: `ranks` micro-batches through all chunks in turn."""
    for first in range(0, micro_batches, stages.ranks):
        for chunk in range(stages.chunks):
            for micro_batch in range(first, min(first + stages.ranks, micro_batches)):
                yield chunk, micro_batch


def training_order(stages: Stages, rank: int, micro_batches: int) -> list[Action]:
    """What rank number `rank` of a pipeline runs in one iteration. With chunks, micro-batches are a multiple of ranks."""
    forwards = [Action(True, chunk, number) for chunk, number in forward_order(stages, micro_batches)]
    # Backward passes meet the micro-batches in the same order, and the chunks in the reverse one.
    backwards = [Action(False, stages.chunks - 1 - chunk, number) for _, chunk, number in forwards]
    warm_up = min(warm_up_passes(stages, rank), len(forwards))
    steady = [action for pair in zip(forwards[warm_up:], backwards, strict=False) for action in pair]
    return forwards[:warm_up] + steady + backwards[len(forwards) - warm_up :]


def warm_up_passes(stages: Stages, rank: int) -> int:
    """Forward passes of a rank before its first backward pass follows one; so many and one more are kept at once."""
    later = stages.ranks - 1 - rank
    return later if stages.chunks == 1 else 2 * later + (stages.chunks - 1) * stages.ranks


def passes_at_once(stages: Stages, rank: int, micro_batches: int) -> int:
    """Passes through one chunk each whose activations a rank keeps at most."""
    return min(warm_up_passes(stages, rank) + 1, micro_batches * stages.chunks)


def bubble_share(stages: Stages, micro_batches: int) -> float:
    """Share of an iteration in which a rank waits for others, if all passes take equally long and nothing travels."""
    idle = (stages.ranks - 1) / stages.chunks
    return idle / (micro_batches + idle)


def iteration_time(stages: Stages, micro_batches: int, work: float, sending: float) -> float:
    """How long an iteration takes in the schedule of :func:`training_order`, in the unit of the arguments.

    While a micro-batch travels, a rank works on the others that are under way; so much of the travelling is hidden. With one
    chunk per rank there are `ranks` of them: a round through all stages and back takes ``ranks work + 2 (ranks - 1) sends``,
    and `ranks` micro-batches are done after it. Exact there, for whole rounds; a test plays the schedules. With several
    chunks the formula is up to 10% off for two rounds or more, and up to a third too long for one in which sending takes
    as long as the work.

    Args:
        work: a stage's on one micro-batch, forward and backward.
        sending: of one micro-batch to the next stage and of its gradient to the one before, for all chunks of a rank.
    """
    ranks, chunks = stages.ranks, stages.chunks
    if chunks == 1:
        rounds = -(-micro_batches // ranks)
        sends = rounds * (ranks - 1) + max(min(micro_batches, ranks) - 2, 0)
        return (micro_batches + ranks - 1) * work + sends * sending
    places = ranks * chunks
    steady = max(work, (places * work + (places - 1) * sending) / (2 * places - 1))
    return micro_batches * steady + ((ranks - 1) * work + (places - 1) * sending) / chunks
