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
import os
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

from megatron_lsh.checkpoint.manifest import write_atomically
from megatron_lsh.errors import CheckpointError
from megatron_lsh.parallel.owner import Owner, is_over

LOCK = ".lock"
BEAT_S = 10.0
SILENT_S = 90.0
"""a run that did not touch its file for so long is over; several beats, because file systems stall"""


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
            raise CheckpointError(
                f"it is a link to {os.readlink(root)}, which is not there. Remove the link, or give another --save"
            )
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
