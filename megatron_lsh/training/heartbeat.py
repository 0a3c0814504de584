"""Heartbeats in the store that the ranks met at, from which a rank that loses contact learns who is not there any more.

A rank that is killed, or whose node dies, says nothing. The others learn of it from their backend, as a closed connection or
a time-out that names no rank.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from megatron_lsh.training.faults import process_state

BEAT_S = 2.0
"""between two heartbeats, of a rank of a small run"""
BEATS_MISSED = 4
"""after which a rank is taken for lost"""
LOST = "lost contact"
"""the failure of a rank that another one's failure brought about"""


@dataclass(frozen=True)
class Beat:
    """What a rank says about itself."""

    number: int
    place: str
    seconds: float
    """for which it has been there"""
    process: int
    parent: int
    host: str
    processes: str
    """within which process numbers mean something: the host, and the container on it"""
    ended: bool = False
    failure: str | None = None

    @classmethod
    def of_this_process(cls, number: int, place: str, seconds: float, ended: bool, failure: str | None) -> Beat:
        host = socket.gethostname()
        return cls(number, place, seconds, os.getpid(), os.getppid(), host, _process_space(), ended, failure)

    @property
    def gone(self) -> bool:
        """Whether it is of this host and its process is no more. Of other hosts only silence tells."""
        if self.processes != _process_space():
            return False
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return process_state(self.process)[0] == "Z"

    def decided(self, before: Beat | None) -> bool:
        """Whether it is known what became of this rank: it goes on, has ended or failed, or its process is gone."""
        return before is None or self.number > before.number or self.ended or self.failure is not None or self.gone

    def kill_frozen(self) -> bool:
        """Kill this rank if it has the same parent: torchrun would wait for it, for the whole of its grace period."""
        if self.processes != _process_space() or not self.parent == os.getppid() == process_state(self.process)[1]:
            return False
        with contextlib.suppress(OSError):
            os.kill(self.process, signal.SIGKILL)
            return True
        return False

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"


class Heartbeats:
    """This rank's heartbeat, and those of the others. Silent where there is one rank, or no store that can be reached."""

    def __init__(self, rank: int, size: int) -> None:
        self.period_s = max(BEAT_S, size / 250)  # one store serves all ranks
        self._rank, self._size, self._number = rank, size, 0
        self._store = _connect() if size > 1 else None

    def beat(self, place: str, seconds: float, *, ended: bool = False, failure: str | None = None) -> None:
        """Say where this rank is."""
        self._number += 1
        beat = Beat.of_this_process(self._number, place, seconds, ended, failure)
        self._set(str(self._rank), json.dumps(asdict(beat)))

    def fail(self) -> None:
        """Let all ranks know that they cannot succeed any more."""
        self._set("failed", str(self._rank))

    def somebody_failed(self) -> bool:
        try:
            return self._store is not None and self._store.check(["failed"])
        except RuntimeError:
            self.silence()
            return False

    def who_is_missing(self) -> str:
        """Which of the other ranks failed or is not there; else where they are. Waits for their next heartbeats."""
        if self._store is None:
            return "nothing is known of it, because the ranks' store, of rank 0 or its launcher, cannot be reached"
        before = now = self._read()
        for _ in range(BEATS_MISSED):
            if before is None or now is None or all(beat.decided(before.get(rank)) for rank, beat in now.items()):
                break
            time.sleep(self.period_s)
            now = self._read()
        if before is None or now is None:
            return "the ranks' store is gone, with rank 0 or its launcher"
        return _in_words(now, before, [rank for rank in range(self._size) if rank != self._rank])

    def silence(self) -> None:
        """The store is gone with the launcher: do not knock at it, which makes torch print stack traces."""
        self._store = None

    def _set(self, key: str, value: str) -> None:
        if self._store is None:
            return
        try:
            self._store.set(key, value)
        except RuntimeError:
            self.silence()

    def _read(self) -> dict[int, Beat] | None:
        """The last heartbeat of every other rank that has had one; None if the store is gone."""
        assert self._store is not None
        known = [rank for rank in range(self._size) if rank != self._rank]
        try:
            if not self._store.check([str(rank) for rank in known]):
                known = [rank for rank in known if self._store.check([str(rank)])]
            texts = self._store.multi_get([str(rank) for rank in known]) if known else []
        except RuntimeError:
            return None
        return {rank: Beat(**json.loads(text)) for rank, text in zip(known, texts, strict=True)}


def _connect() -> dist.Store | None:
    """A connection of our own to the store of torchrun or of rank 0: the main thread may be waiting on the other one."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if address is None or port is None:
        return None
    try:
        store = dist.TCPStore(
            address, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10)
        )
    except (RuntimeError, ValueError):  # the ranks met in another way
        return None
    return dist.PrefixStore(f"megatron_lsh/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _in_words(now: Mapping[int, Beat], before: Mapping[int, Beat], ranks: list[int]) -> str:
    parts, alive = [], []
    for rank in ranks:
        beat = now.get(rank)
        if beat is None:
            parts.append(f"rank {rank} never came as far as this")
        elif beat.failure not in (None, LOST):
            parts.insert(0, f"rank {rank} ({beat}) failed in {beat.place}: {beat.failure}")
        elif beat.failure is None and not beat.ended:
            if beat.gone or not beat.decided(before.get(rank)):
                parts.append(_silence(rank, beat))
            else:
                alive.append(f"rank {rank} ({beat}) answers, and has been in {beat.place} for {beat.seconds:.0f} s")
    parts = parts or alive
    more = f"; and {len(parts) - 8} more" if len(parts) > 8 else ""
    return "; ".join(parts[:8]) + more or "all others have lost contact, too, or have ended"


def _silence(rank: int, beat: Beat) -> str:
    last = f"rank {rank} ({beat}), last heard of in {beat.place},"
    if beat.gone:
        return f"{last} is gone; a process that the system kills says nothing (out of memory? see dmesg)"
    if beat.kill_frozen():
        return f"{last} does not answer any more; it was frozen, and has been killed"
    return f"{last} does not answer any more: look at its node"


def _process_space() -> str:
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()
