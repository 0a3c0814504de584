"""A thread beside the training: it tells the other ranks where this one is, and ends a rank that hangs."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType

import torch.distributed as dist

from megatron_lsh.errors import MegatronLSHError
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.training.faults import StopRequest, tell
from megatron_lsh.training.heartbeat import LOST, Heartbeats

PATIENCE_S = 30.0
"""how long a rank may go on after another one failed: what they do together cannot succeed any more"""
SAVING = "saving a checkpoint"
TRAINING = "training step"
# How gloo and NCCL say that somebody is not there, beside torch's own exceptions.
_CONTACT_LOST = re.compile(r"gloo|NCCL|Connection (closed|reset) by peer", re.IGNORECASE)


@dataclass
class Place:
    """Where a rank is. The main thread moves it on, the watching thread reads it."""

    phase: str = "set-up"
    iteration: int = 0
    stage: int | None = None
    """of a pipeline"""
    since: float = field(default_factory=time.monotonic)

    def enter(self, phase: str, iteration: int) -> None:
        self.phase, self.iteration, self.since = phase, iteration, time.monotonic()

    @property
    def seconds(self) -> float:
        """Time spent there."""
        return time.monotonic() - self.since

    def __str__(self) -> str:
        where = self.phase if self.stage is None else f"{self.phase} of pipeline stage {self.stage}"
        return f"iteration {self.iteration}, {where}" if self.iteration else where


class Watch:
    """Watches over this rank's part of a run; a context manager around everything that the ranks do together.

    On the way out of an error that means "somebody is not there", the error becomes a MegatronLSHError that says who is
    missing, and where in the run. A rank that was told to stop, or that lives on after another one failed, and then does not
    move, ends itself with status 1: torchrun would wait for it.

    Args:
        timeout: --distributed-timeout-minutes. Saving may take longer: there, the time-outs of the other ranks decide.
        announce: whether to tell of an iteration that takes longer than `timeout`. By default on GPUs, where NCCL then ends
            the process without an exception.
        record: writes down what this rank did last, when a rank is lost or hangs; returns a line about it.
    """

    def __init__(
        self,
        ctx: ParallelContext,
        stop: StopRequest,
        timeout: timedelta,
        place: Place,
        announce: bool | None = None,
        record: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._rank, self._stop, self._place, self._timeout_s = ctx.rank, stop, place, timeout.total_seconds()
        self._announce = ctx.device.type == "cuda" if announce is None else announce
        self._record = record
        self._hearts = Heartbeats(ctx.rank, ctx.world.size)
        self._main = threading.get_ident()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        if (
            error is None or getattr(error, "reported_by", None) is not None
        ):  # all ranks raise it, and end by themselves
            self._beat(ended=True)
            return
        lost = contact_lost(error)
        self._beat(failure=LOST if lost else f"{type(error).__name__}: {error}")
        self._hearts.fail()
        if lost:
            self._write_record()
            technical = " ".join(str(error).split())[:300]
            raise MegatronLSHError(
                f"lost contact with another rank in {self._place}: {self._hearts.who_is_missing()}. Resume from the last "
                f"checkpoint ({technical})"
            ) from error

    def _beat(self, *, ended: bool = False, failure: str | None = None) -> None:
        self._hearts.beat(str(self._place), self._place.seconds, ended=ended, failure=failure)

    def _run(self) -> None:
        asked: float | None = None
        failed: float | None = None
        announced = -1
        while not self._over.wait(self._hearts.period_s):
            if self._stop.launcher.gone:
                self._hearts.silence()
            self._beat()
            now, still = time.monotonic(), self._place.seconds
            if asked is None and self._stop.requested:
                asked = now
            if failed is None and self._hearts.somebody_failed():
                failed = now
            if failed is not None and min(now - failed, still) > PATIENCE_S:
                self._give_up("another rank failed, and this one does not come to an end")
            if asked is not None and self._place.phase != SAVING and min(now - asked, still) > self._timeout_s:
                self._give_up(
                    f"{self._stop.reason}, but for {still:.0f} s nothing moved (--distributed-timeout-minutes)"
                )
            late = self._place.phase == TRAINING and still > self._timeout_s
            if self._announce and late and announced != self._place.iteration:
                announced = self._place.iteration
                missing = self._hearts.who_is_missing()
                tell(f"[rank {self._rank}] {self._place} takes longer than --distributed-timeout-minutes: {missing}")

    def _write_record(self) -> None:
        said = self._record()
        if said is not None:
            tell(said)

    def _give_up(self, why: str) -> None:
        self._write_record()
        frame = sys._current_frames().get(self._main)
        at = traceback.extract_stack(frame)[-1] if frame is not None else None
        where = "" if at is None else f" at {at.filename}, line {at.lineno}, in {at.name}"
        tell(f"[rank {self._rank}] hangs in {self._place}{where}: {why}. It ends; resume from the last checkpoint")
        os._exit(1)


def contact_lost(error: BaseException) -> bool:
    """Whether a backend says that another rank is not there, or does not answer in time."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and _CONTACT_LOST.search(str(error)) is not None
    )
