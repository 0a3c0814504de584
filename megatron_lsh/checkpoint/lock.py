"""One run at a time in a save folder: the file ``SAVE/.lock`` says which one it is.

Two runs with one --save take each other's checkpoints away. So a run writes into the file who it is and touches it every
`BEAT_S` seconds; a run that finds the file of another decides by what the two have in common:

    the same batch or torchrun job, we are a later attempt    that run is over: its scheduler ended it before starting us
    the same running kernel and pid namespace                 whether there is that pid, with that start time
    neither: another host or container, or no telling         whether the file is touched

and takes the folder, or refuses to start. Neither a restart after kill -9 nor a requeue has to wait. All it needs of a file
system is exclusive creation, renaming and modification times; ``flock`` is not to be had on every NFS.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from megatron_lsh.checkpoint.manifest import write_atomically
from megatron_lsh.errors import CheckpointError

LOCK = ".lock"
BEAT_S = 10.0
SILENT_S = 90.0
"""a run that did not touch its file for so long is over; several beats, because file systems stall"""


@dataclass(frozen=True)
class Owner:
    """A process that has the lock, or wants it.

    Attributes:
        boot, namespace: of the running kernel, and of the pids (containers have their own); without both equal, nothing
            can be said about `pid`. Empty where there is no /proc.
        started: of the process, in clock ticks since the boot; a pid that is given again gets another one.
        batch, launcher: ids of the batch job and of torchrun's; empty without one.
        restarts: how often the two were started again.
        since: when it took the lock, UTC, for people to read.
        token: another one each time that a lock is taken.
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
        """What a lock file says; None if that is no owner."""
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


class SaveLock:
    """The right to save in a folder, for as long as this object lives; given back when it is collected or the program ends.

    Attributes:
        root: the folder.
    """

    def __init__(self, root: Path, me: Owner | None = None, beat_s: float = BEAT_S, silent_s: float = SILENT_S) -> None:
        """Take it. Creates the folder.

        Args:
            me, beat_s, silent_s: another identity and other times, for tests.

        Raises:
            CheckpointError: another run has it; says which.
            OSError: the folder cannot be written.
        """
        self.root = root
        self._beat_s, self._silent_s = beat_s, silent_s
        self._me = me or Owner.here()
        if root.is_symlink() and not root.exists():
            raise CheckpointError(f"it is a link to {os.readlink(root)}, which is not there")
        root.mkdir(parents=True, exist_ok=True)
        self._take()
        # Neither thread nor finalizer may keep this object alive: the lock is given back when nobody uses it any more.
        stop = threading.Event()
        path, token = root / LOCK, self._me.token
        threading.Thread(target=_beat, args=(path, token, beat_s, stop), daemon=True, name="save-lock").start()
        self.release = weakref.finalize(self, _release, path, token, os.getpid(), stop)

    def confirm(self) -> None:
        """Before something in the folder is changed: the right must not have passed to another run meanwhile.

        Raises CheckpointError; OSError if the folder cannot be written. A folder that was emptied is locked again.
        """
        path = self.root / LOCK
        if not os.path.lexists(path):
            self.root.mkdir(parents=True, exist_ok=True)
            self._take()
        owner = _read(path)
        if owner is not None and not owner.is_process_of(self._me):
            raise CheckpointError(
                f"another run has taken it over: {owner}. It took this run for dead, which was silent for more than "
                f"{self._silent_s:.0f} s. Nothing was written"
            )

    def _take(self) -> None:
        path = self.root / LOCK
        seen: tuple[int, int] | None = None
        began = time.monotonic()
        while True:
            with _alone(self.root, self._me) as now_ns:
                touched = _touched(path)
                owner = _read(path)
                if touched is None or self._may_replace(owner, touched, now_ns, seen, began):
                    write_atomically(path, self._me.serialise())
                    return
            seen = touched
            # Clocks may differ where clients set the times themselves: it must also be silent while we look.
            time.sleep(1.5 * self._beat_s)

    def _may_replace(
        self, owner: Owner | None, touched: tuple[int, int], now_ns: int, seen: tuple[int, int] | None, began: float
    ) -> bool:
        """Whether to take the lock away; False if it takes another look. Raises CheckpointError if another run has it.

        Args:
            touched, seen: inode and time in ns of the file now and at the look before.
            now_ns: the file system's time.
            began: when we first looked, of the monotonic clock.
        """
        if owner is not None and owner.is_process_of(self._me):
            return True
        over = None if owner is None else is_over(owner, self._me)
        if over is not None:
            if over:
                return True
            raise CheckpointError(f"another run saves there: {owner}. Stop that one first, or give another --save")
        age_s = (now_ns - touched[1]) / 1e9
        if age_s < -self._beat_s and seen in (None, touched):
            # Touched in the future: a clock was set back since, and only our own watching tells how long it is silent.
            return time.monotonic() - began >= self._silent_s
        if age_s >= self._silent_s and seen in (None, touched):
            return seen is not None
        raise CheckpointError(
            f"another run saves there: {owner or 'which one cannot be read'}, last heard of {max(age_s, 0):.0f} s ago. "
            f"Stop that one first, or give another --save. If it is dead, the folder is free {self._silent_s:.0f} s "
            f"after that, or when {self.root / LOCK} is removed"
        )


def held_here(root: Path) -> bool:
    """Whether this process has the right to save in a folder, or was interrupted while it took it."""
    owner = _read(root / LOCK)
    return owner is not None and owner.is_process_of(Owner.here())


@contextlib.contextmanager
def _alone(root: Path, me: Owner) -> Iterator[int]:
    """Inside, no other process decides about the lock of this folder. Gives the file system's time in ns."""
    path = root / (LOCK + ".deciding")
    seen, since = None, time.monotonic()
    while True:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            break
        except FileExistsError:
            other, touched = _read(path), _touched(path)
            if touched != seen:
                seen, since = touched, time.monotonic()
            # Deciding takes milliseconds: whoever is at it for longer was killed.
            if (other is not None and is_over(other, me)) or time.monotonic() - since > BEAT_S:
                path.unlink(missing_ok=True)
            else:
                time.sleep(0.05)
    try:
        with open(descriptor, "wb") as stream:
            stream.write(me.serialise())
        yield path.stat().st_mtime_ns
    finally:
        path.unlink(missing_ok=True)


def _beat(path: Path, token: str, beat_s: float, stop: threading.Event) -> None:
    """Touch the file again and again while it is ours."""
    while not stop.wait(beat_s):
        with contextlib.suppress(OSError):
            if (owner := _read(path)) is not None and owner.token == token:
                os.utime(path)  # no time given: on NFS the server's


def _release(path: Path, token: str, pid: int, stop: threading.Event) -> None:
    stop.set()
    owner = _read(path) if os.getpid() == pid else None  # a forked child has a copy of the object, and no right
    if owner is not None and owner.token == token:
        with contextlib.suppress(OSError):
            path.unlink()


def _read(path: Path) -> Owner | None:
    try:
        return Owner.parse(path.read_bytes()) if path.is_file() else None
    except OSError:
        return None


def _touched(path: Path) -> tuple[int, int] | None:
    """(inode, modification time in ns); None if there is no such file."""
    try:
        status = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


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
