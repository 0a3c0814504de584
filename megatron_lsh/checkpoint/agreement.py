"""Ranks that succeed together or fail together, with a checkpoint's errors; see parallel/agreement.py.

Every step that can fail on one rank alone (a full disk, a missing file) runs inside `Ranks.each`, `collect` or
`coordinator`, which exchange the outcome before anybody goes on. So an error on one rank is the same `CheckpointError`
on every rank, and no rank waits for one that has already given up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_lsh.errors import CheckpointError, DamagedCheckpoint, MegatronLSHError
from megatron_lsh.parallel.agreement import Outcome, attempt, exchange
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
        outcome = attempt(function, _FAILURES)
        self._raise_first(what, exchange(self._problem(outcome), self.group))
        return outcome.value  # type: ignore[return-value]

    def collect(self, what: str, function: Callable[[], T]) -> list[T]:
        """As `each`, but return every rank's result, in rank order. Results are pickled."""
        outcome = attempt(function, _FAILURES)
        outcomes = exchange((self._problem(outcome), outcome.value), self.group)
        self._raise_first(what, [problem for problem, _ in outcomes])
        return [value for _, value in outcomes]  # type: ignore[misc]

    def coordinator(self, what: str, function: Callable[[], T]) -> T:
        """Run `function` on rank 0 and return its result on every rank. Collective. Raises as `each` does."""
        outcome: Outcome[T] = attempt(function, _FAILURES) if self.is_coordinator else Outcome()
        box = [(self._problem(outcome), outcome.value)]
        if self.group is not None:
            dist.broadcast_object_list(box, src=0, group=self.group)
        problem, value = box[0]
        self._raise_first(what, [problem])
        return value  # type: ignore[return-value]

    def _problem(self, outcome: Outcome[T]) -> Problem | None:
        return None if outcome.error is None else Problem.of(outcome.error, self.rank)

    @staticmethod
    def _raise_first(what: str, problems: list[Problem | None]) -> None:
        for problem in problems:
            if problem is not None:
                raise (DamagedCheckpoint if problem.damage else CheckpointError)(f"{what}: {problem.text}")


def describe(error: BaseException, rank: int) -> str:
    """One line that says what failed where. DCP's exception already carries the failures of all ranks."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (error, _) = min(error.failures.items(), key=lambda item: item[0])
    if isinstance(error, MegatronLSHError):
        return str(error)
    text = " ".join(str(error).split()) or "no message"
    return f"rank {rank}: {type(error).__name__}: {text}"
