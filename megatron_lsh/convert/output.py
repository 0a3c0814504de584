"""A folder that is either complete or not there: written under another name, renamed at the end."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_lsh.checkpoint.manifest import sync_folder
from megatron_lsh.errors import CheckpointError

_RESERVE = 64 * 2**20  # headers, small files, file system overhead


@contextmanager
def new_folder(target: Path, nbytes: int) -> Iterator[Path]:
    """Gives an empty ``target.incomplete`` to write into, and renames it to `target` if the block succeeds.

    Whatever ends the block (an error, Ctrl-C, SystemExit), nothing of it is left behind. After a kill the ``.incomplete``
    folder remains; the next conversion to `target` removes it.

    Args:
        nbytes: what will be written, about.

    Raises:
        CheckpointError: `target` is not empty, or the disk is full, at the start or on the way.
    """
    partial = target.with_name(target.name + ".incomplete")
    made: list[Path] = []
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
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        yield partial
        sync_folder(partial)
        if target.exists():
            target.rmdir()
        os.rename(partial, target)
        sync_folder(target.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in reversed(made):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        if isinstance(error, OSError):
            raise CheckpointError(f"{target} could not be written: {_reason(error)}") from error
        raise


def _make(folder: Path) -> list[Path]:
    """Create a folder and its parents; returns those that were not there."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing[::-1]


def _reason(error: OSError) -> str:
    text = error.strerror or str(error)
    place = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        return f"{text}{place}: make room, or give another --save"
    return f"{text}{place}: give another --save, or mend this one"
