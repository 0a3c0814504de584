"""A folder that is either complete or not there: written under another name, renamed at the end."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_lsh.checkpoint.lock import LOCK, SaveLock, held_here
from megatron_lsh.checkpoint.manifest import sync_folder
from megatron_lsh.errors import CheckpointError

_RESERVE = 64 * 2**20  # headers, small files, file system overhead


@contextmanager
def new_folder(target: Path, nbytes: int) -> Iterator[Path]:
    """Gives an empty ``target.incomplete`` to write into, and renames it to `target` if the block succeeds.

    Whatever ends the block (an error, Ctrl-C, SystemExit), nothing of it is left behind. After a kill the ``.incomplete``
    folder remains; the next conversion to `target` empties it. That of a conversion that still runs is left alone.

    Args:
        nbytes: what will be written, about.

    Raises:
        CheckpointError: `target` is not empty, another conversion writes it, or the disk is full, sooner or later.
    """
    partial = target.with_name(target.name + ".incomplete")
    made: list[Path] = []
    lock: SaveLock | None = None
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise CheckpointError(f"{target} already exists: give another --save, or remove it (rm -r {target})")
        made = _make(target.parent)
        free = shutil.disk_usage(target.parent).free
        if free < nbytes + _RESERVE:
            raise CheckpointError(
                f"{target} needs {nbytes / 1e9:.2f} GB and {target.parent} has {free / 1e9:.2f} GB free: make room, or give "
                "another --save"
            )
        lock = _take(partial)
        yield partial
        lock.release()
        sync_folder(partial)
        if target.exists():
            target.rmdir()
        os.rename(partial, target)
        sync_folder(target.parent)
    except BaseException as error:
        if lock is not None:
            lock.release()
            shutil.rmtree(partial, ignore_errors=True)
        for folder in reversed(made):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        if (cause := _error_of_the_disk(error)) is not None:
            raise CheckpointError(f"{target} could not be written: {_reason(cause)}") from error
        raise


def _take(partial: Path) -> SaveLock:
    """The right to write the folder, which is empty then but for the lock."""
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise CheckpointError(f"{partial} is in the way: remove it, or give another --save")
    fresh = not partial.exists()
    try:
        lock = SaveLock(partial)
    except CheckpointError as error:
        raise CheckpointError(f"{partial}: {error}") from None
    except BaseException:
        if held_here(partial) or (fresh and not (partial / LOCK).exists()):
            shutil.rmtree(partial, ignore_errors=True)
        raise
    for path in partial.iterdir():  # of a conversion that was killed
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
    return lock


def _make(folder: Path) -> list[Path]:
    """Create a folder and its parents; returns those that were not there."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing[::-1]


def _error_of_the_disk(error: BaseException) -> OSError | None:
    """The error, or the one behind a RuntimeError: torch's writer of files loses count when the disk is full."""
    if isinstance(error, RuntimeError) and not isinstance(error, CheckpointError):
        return None if error.__context__ is None else _error_of_the_disk(error.__context__)
    return error if isinstance(error, OSError) else None


def _reason(error: OSError) -> str:
    text = error.strerror or str(error)
    place = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        return f"{text}{place}: make room, or give another --save"
    return f"{text}{place}: give another --save, or mend this one"
