"""Whose is it: processes that own a file, and whether another process can tell that the owner is gone.

Clocks say little about that: one may be set forward or back, and differs from host to host. So an owner is told by its host,
boot, pid and start time, and by its batch or torchrun job; only across hosts or containers does nothing but silence remain.
"""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path


@dataclass(frozen=True)
class Owner:
    """A process that holds something in a file system, such as a lock, or wants it.

    Attributes:
        boot, namespace: of the running kernel, and of the pids (containers have their own); without both equal, nothing
            can be said about `pid`. Empty where there is no /proc.
        started: of the process, in clock ticks since the boot; a pid that is given again gets another one.
        batch, launcher: ids of the batch job and of torchrun's; empty without one.
        restarts: how often the two were started again.
        since: when it took it, UTC, for people to read.
        token: another one each time that something is taken.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    started: int
    batch: str
    launcher: str
    restarts: tuple[int, int]
    since: str
    token: str

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> Owner:
        """This process."""
        launcher = environment.get("TORCHELASTIC_RUN_ID", "")
        batch = (environment.get(name, "") for name in ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID"))
        return cls(
            host=socket.gethostname(),
            boot=_text("/proc/sys/kernel/random/boot_id"),
            namespace=_namespace(),
            pid=os.getpid(),
            started=_start_time(os.getpid()) or 0,
            batch=next(filter(None, batch), ""),
            launcher="" if launcher == "none" else launcher,  # what torchrun calls every job without --rdzv-id
            restarts=(_number(environment, "SLURM_RESTART_COUNT"), _number(environment, "TORCHELASTIC_RESTART_COUNT")),
            since=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
            token=uuid.uuid4().hex,
        )

    @classmethod
    def parse(cls, text: bytes) -> Owner | None:
        """What a file says; None if that is no owner."""
        try:
            values = json.loads(text)
            first, second = values.pop("restarts")
            owner = cls(**values, restarts=(first, second))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        numbers = (owner.pid, owner.started, *owner.restarts)
        texts = (owner.host, owner.boot, owner.namespace, owner.batch, owner.launcher, owner.since, owner.token)
        fits = all(type(n) is int and 0 <= n < 1 << 62 for n in numbers) and all(isinstance(t, str) for t in texts)
        return owner if fits and owner.pid > 0 else None

    def serialise(self) -> bytes:
        return (json.dumps(asdict(self), indent=1) + "\n").encode()

    def shares_pids_with(self, other: Owner) -> bool:
        kernel = (self.boot, self.namespace) == (other.boot, other.namespace)
        return kernel and (self.boot != "" or self.host == other.host)

    def is_process_of(self, other: Owner) -> bool:
        return self.shares_pids_with(other) and (self.pid, self.started) == (other.pid, other.started)

    def is_attempt_before(self, other: Owner) -> bool:
        """Whether this was an attempt of the same job, and `other` is a later one."""
        if self.batch and self.batch == other.batch and self.restarts[0] < other.restarts[0]:
            return True
        same = (self.batch, self.launcher, self.restarts[0]) == (other.batch, other.launcher, other.restarts[0])
        return same and self.launcher != "" and self.restarts[1] < other.restarts[1]

    def __str__(self) -> str:
        job = f"batch job {self.batch}, " if self.batch else ""
        return f"{job}process {self.pid} on {self.host}, there since {self.since}"


def is_over(owner: Owner, me: Owner) -> bool | None:
    """Whether the run of `owner` is over, as far as the process `me` can tell; None if it cannot."""
    if owner.is_attempt_before(me):
        return True
    if owner.shares_pids_with(me):
        return not _is_running(owner)
    return None


def _is_running(owner: Owner) -> bool:
    try:
        os.kill(owner.pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's
    started = _start_time(owner.pid)
    return started is None or started == owner.started  # None: processes of others may be hidden in /proc


def _start_time(pid: int) -> int | None:
    """In clock ticks since the boot (proc(5): field 22 of stat); -1 for a process that is dead and only not yet waited for.

    None where that cannot be read.
    """
    text = _text(f"/proc/{pid}/stat")
    if not text:
        return None
    state, *fields = text[text.rindex(")") + 1 :].split()  # the name before it may hold anything
    return -1 if state in "ZX" else int(fields[18])


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0
