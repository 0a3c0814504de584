"""Ranks that succeed together or fail together.

Every step that can fail on one rank alone (a full disk, a missing file) runs inside `Ranks.each`, `collect` or
`coordinator`, which exchange the outcome before anybody goes on. So an error on one rank is the same `CheckpointError`
on every rank, and no rank waits for one that has already given up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_lsh.errors import CheckpointError, DamagedCheckpoint, MegatronLSHError
from megatron_lsh.parallel.context import ParallelContext

T = TypeVar("T")
_FAILURES = (Exception, CheckpointException)  # DCP's own is a BaseException


@dataclass(frozen=True)
class Problem:
    """What one rank tells the others of its exception: one line, and whether the checkpoint is to blame."""

    text: str
    damage: bool

    @classmethod
    def of(cls, error: BaseException, rank: int) -> Problem:
        return cls(describe(error, rank), isinstance(error, DamagedCheckpoint))


class Ranks:
    """All ranks of the run, on a gloo group of their own.

    The group is separate from the training groups so that a background thread may use it while the training thread
    communicates, and gloo so that Python objects never pass through a GPU.

    Attributes:
        group: None in a run without ``torch.distributed``.
        rank, size: this rank and the number of ranks.
    """

    def __init__(self, ctx: ParallelContext, timeout: timedelta) -> None:
        self.rank = ctx.rank
        self.size = ctx.world.size
        self.group: dist.ProcessGroup | None = None
        if ctx.world.process_group is not None:
            self.group = dist.new_group(list(ctx.world.ranks), timeout=timeout, backend="gloo")
        elif self.size > 1:
            raise ValueError("checkpoints of several ranks need torch.distributed to be initialised")

    @property
    def is_coordinator(self) -> bool:
        return self.rank == 0

    def each(self, what: str, function: Callable[[], T]) -> T:
        """Run `function` on every rank; return this rank's result. Collective.

        Raises CheckpointError, the same on all ranks, naming the first rank on which `function` raised; a
        DamagedCheckpoint if that is what it raised. `function` must not communicate outside DCP, whose own collectives
        already agree on failure.
        """
        problem: Problem | None = None
        try:
            value = function()
        except _FAILURES as error:
            problem = Problem.of(error, self.rank)
        self._raise_first(what, self._gather(problem))
        return value

    def collect(self, what: str, function: Callable[[], T]) -> list[T]:
        """As `each`, but return every rank's result, in rank order. Results are pickled."""
        value: T | None = None
        problem: Problem | None = None
        try:
            value = function()
        except _FAILURES as error:
            problem = Problem.of(error, self.rank)
        outcomes = self._gather((problem, value))
        self._raise_first(what, [problem for problem, _ in outcomes])
        return [value for _, value in outcomes]

    def coordinator(self, what: str, function: Callable[[], T]) -> T:
        """Run `function` on rank 0 and return its result on every rank. Collective. Raises as `each` does."""
        outcome: tuple[Problem | None, Any] = (None, None)
        if self.is_coordinator:
            try:
                outcome = (None, function())
            except _FAILURES as error:
                outcome = (Problem.of(error, self.rank), None)
        if self.group is not None:
            box = [outcome]
            dist.broadcast_object_list(box, src=0, group=self.group)
            outcome = box[0]
        problem, value = outcome
        self._raise_first(what, [problem])
        return value

    @staticmethod
    def _raise_first(what: str, problems: list[Problem | None]) -> None:
        for problem in problems:
            if problem is not None:
                raise (DamagedCheckpoint if problem.damage else CheckpointError)(f"{what}: {problem.text}")

    def _gather(self, item: Any) -> list[Any]:
        if self.group is None:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=self.group)
        return items


def describe(error: BaseException, rank: int) -> str:
    """One line that says what failed where. DCP's exception already carries the failures of all ranks."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (error, _) = min(error.failures.items(), key=lambda item: item[0])
    if isinstance(error, MegatronLSHError):
        return str(error)
    text = " ".join(str(error).split()) or "no message"
    return f"rank {rank}: {type(error).__name__}: {text}"
