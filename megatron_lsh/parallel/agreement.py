"""One way of failing together.

What can fail on one rank alone (a full disk, a missing file) is tried on every rank, and all hear how it went before
anybody goes on. Either all have succeeded or all raise, and no rank waits for one that has already given up.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Generic, TypeVar

import torch.distributed as dist

from megatron_lsh.errors import MegatronLSHError
from megatron_lsh.parallel.context import ParallelContext

logger = logging.getLogger(__name__)

NOTICE_S = 60.0
UNHURRIED = timedelta(days=365)  # gloo wants to know a limit

T = TypeVar("T")
Report = TypeVar("Report")


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """How an action went on one rank: what it returned, or what it raised."""

    value: T | None = None
    error: BaseException | None = None


def attempt(action: Callable[[], T], failures: tuple[type[BaseException], ...] = (Exception,)) -> Outcome[T]:
    """Run `action` and keep what it raises, if it is one of `failures`."""
    try:
        return Outcome(value=action())
    except failures as error:
        return Outcome(error=error)


def exchange(report: Report, group: dist.ProcessGroup | None) -> list[Report]:
    """The `report` of each rank of the group, in rank order; of this one alone without a group. Pickled. Collective."""
    if group is None or group.size() == 1:
        return [report]
    reports = [report] * group.size()
    dist.all_gather_object(reports, report, group=group)
    return reports


def together(ctx: ParallelContext, action: Callable[[], T]) -> T:
    """Run `action` on every rank; if it raises on any, raise on all, so that nobody waits for a rank that is gone.

    The rank that failed raises its own exception; the others raise the same message (as MegatronLSHError). `action` must
    not leave other ranks inside a collective when it fails.
    """
    outcome = attempt(action)
    reports = exchange(_report(outcome.error), ctx.world.process_group)
    failed = [(rank, report) for rank, report in enumerate(reports) if report is not None]
    if not failed:
        return outcome.value  # type: ignore[return-value]
    rank, (kind, message) = failed[0]
    error = outcome.error or MegatronLSHError(f"rank {rank} failed: {kind}: {message}")
    error.reported_by = rank  # type: ignore[attr-defined]
    raise error


def failed_everywhere(message: str) -> MegatronLSHError:
    """An error for every rank to raise at the same point; one of them will report it."""
    error = MegatronLSHError(message)
    error.reported_by = 0  # type: ignore[attr-defined]
    return error


def _report(error: BaseException | None) -> tuple[str, str] | None:
    """The exception as (type name, message); a mistake of ours with its traceback, one of the user's without."""
    if error is None:
        return None
    if isinstance(error, MegatronLSHError):
        return type(error).__name__, str(error)
    return type(error).__name__, "".join(traceback.format_exception(error))


def unhurried_barrier(ctx: ParallelContext, what: str) -> Callable[[], None]:
    """A barrier without a time limit, around work of which nobody knows how long it takes. Collective; make it before.

    --distributed-timeout-minutes bounds how far ranks that do the same may be apart. A rank that reads a corpus of
    terabytes while the others wait is another matter. The wait ends at once if a rank is gone.

    Args:
        what: is waited for, as the first two ranks say every minute.
    """
    if ctx.world.process_group is None or ctx.world.size == 1:
        return lambda: None
    group = dist.new_group(backend="gloo", timeout=UNHURRIED)

    def wait() -> None:
        work, begin, told, pause_s = dist.barrier(group=group, async_op=True), time.monotonic(), 0, 0.001
        while not work.is_completed():
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.1)
            minutes = int((time.monotonic() - begin) / NOTICE_S)
            if minutes > told and ctx.rank < 2:
                logger.warning("waiting for %s on another rank, for %d min so far", what, minutes)
            told = minutes
        work.wait()  # raises if a rank is gone
        dist.destroy_process_group(group)

    return wait
