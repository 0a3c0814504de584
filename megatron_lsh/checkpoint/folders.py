"""Names and life of checkpoint folders: Megatron's layout, made safe against a crash at any moment.

    SAVE/latest_checkpointed_iteration.txt   the iteration to resume from, or "release"
    SAVE/iter_0000100/                       one complete checkpoint
    SAVE/iter_0000100.incomplete/            being written, or left behind by a crash; never loaded, removed by the next save
    SAVE/iter_0000100.old/                   the previous iter_0000100 while the same iteration is saved again

A checkpoint is written into ``.incomplete``; its manifest comes last; then the folder is renamed and only then the
tracker file moves. Whatever the moment of a crash, the tracker names a complete checkpoint. Removal takes the manifest
first, so a half-removed folder is not a checkpoint either.

Any of these may be a symbolic link, into another run's folder for one. It is loaded from as if it were a folder; but
what is removed or replaced is the link, never what it leads to.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_lsh.checkpoint.manifest import MANIFEST, sync_folder, write_atomically

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
_NAME = re.compile(r"iter_(\d{7,})(\.old)?")
_LEFTOVER = re.compile(r"iter_\d{7,}\.incomplete|\.write_test_\d+|" + re.escape(TRACKER + ".tmp"))


@dataclass(frozen=True)
class Tracker:
    """Content of the tracker file: an iteration, ``release``, or a reason why it is neither."""

    iteration: int | None = None
    release: bool = False
    problem: str | None = None


def iteration_folder(root: Path, iteration: int) -> Path:
    """SAVE/iter_0000100"""
    return root / f"iter_{iteration:07d}"


def incomplete_folder(root: Path, iteration: int) -> Path:
    folder = iteration_folder(root, iteration)
    return folder.with_name(folder.name + ".incomplete")


def old_folder(root: Path, iteration: int) -> Path:
    folder = iteration_folder(root, iteration)
    return folder.with_name(folder.name + ".old")


def read_tracker(root: Path) -> Tracker | None:
    """None without a tracker file. Never raises: damage is a `problem`."""
    path = root / TRACKER
    try:
        text = path.read_bytes().decode().strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        return Tracker(problem=f"{path} cannot be read: {error}")
    if text == RELEASE:
        return Tracker(release=True)
    if re.fullmatch(r"[0-9]+", text):
        return Tracker(iteration=int(text))
    return Tracker(problem=f"{path} holds {text[:40]!r} instead of an iteration")


def write_tracker(root: Path, iteration: int) -> None:
    """Atomic: a reader sees the old or the new iteration."""
    write_atomically(root / TRACKER, str(iteration).encode())


def list_folders(root: Path) -> list[tuple[int, Path]]:
    """(iteration, folder) of everything that looks like a checkpoint, newest first; ``.old`` after the plain folder."""
    found = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for path in root.iterdir():
            match = _NAME.fullmatch(path.name)
            if match and path.is_dir():
                found.append((int(match[1]), path))
    return sorted(found, key=lambda item: (-item[0], item[1].name))


def list_leftovers(root: Path) -> list[Path]:
    """Folders and files of saves that never finished."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return sorted(path for path in root.iterdir() if _LEFTOVER.fullmatch(path.name))
    return []


def candidates(root: Path, tracker: Tracker | None) -> list[tuple[int, Path]]:
    """Folders in the order in which to try them.

    The tracker's choice first. If that is damaged: older ones, newest first; then newer ones than the tracker says, which
    exist if the tracker was moved back by hand, if it is damaged, or if a crash hit just before it would have moved.
    """
    found = list_folders(root)
    if tracker is None or tracker.problem is not None:
        return found
    if tracker.release:
        return [(0, root / RELEASE), *found]
    limit = tracker.iteration if tracker.iteration is not None else 0
    return [item for item in found if item[0] <= limit] + [item for item in found if item[0] > limit]


def remove_leftovers(root: Path) -> list[str]:
    """Remove what crashed saves left behind. Returns what could not be removed, and why."""
    return _remove_each(list_leftovers(root))[1]


def start_folder(root: Path, iteration: int) -> Path:
    """Create an empty ``.incomplete`` folder. Raises OSError."""
    root.mkdir(parents=True, exist_ok=True)
    folder = incomplete_folder(root, iteration)
    remove(folder)
    folder.mkdir()
    return folder


def commit(root: Path, iteration: int, track: bool = True) -> Path:
    """Give the complete folder its final name and, with `track`, move the tracker file, durably. Returns the final folder.

    A checkpoint of the same iteration becomes ``.old`` until `tidy`. Raises OSError; then everything is as before, but
    for the new checkpoint, which is gone.
    """
    final, old = iteration_folder(root, iteration), old_folder(root, iteration)
    replaces = os.path.lexists(final)
    if replaces:
        remove_checkpoint(old)
        os.rename(final, old)
    try:
        os.rename(incomplete_folder(root, iteration), final)
        sync_folder(root)
        if track:
            write_tracker(root, iteration)
    except OSError:
        remove_checkpoint(final)
        if replaces:
            os.rename(old, final)
        raise
    return final


def tidy(root: Path, iteration: int, retain_interval: int | None) -> tuple[list[Path], list[str]]:
    """After `iteration` is saved and tracked: remove ``.old`` folders and, with --save-retain-interval, every older
    checkpoint whose iteration is not a multiple of it. Newer folders (of a run that was rolled back) stay.

    Returns what was removed, and what could not be, with the reasons."""
    superfluous = []
    for found, path in list_folders(root):
        superseded = path.suffix == ".old" and found <= iteration
        expired = retain_interval is not None and found < iteration and found % retain_interval != 0
        if superseded or expired:
            superfluous.append(path)
    return _remove_each(superfluous)


def _remove_each(paths: list[Path]) -> tuple[list[Path], list[str]]:
    """(what was removed, what could not be removed and why): one that stays does not keep the others."""
    removed, problems = [], []
    for path in paths:
        try:
            remove_checkpoint(path)
            removed.append(path)
        except OSError as error:
            problems.append(f"{path}: {error.strerror or error}")
    return removed, problems


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint, manifest first. Does nothing if it is not there. Raises OSError."""
    if folder.is_dir() and not folder.is_symlink():
        manifest = folder / MANIFEST
        if os.path.lexists(manifest):
            manifest.unlink()
            sync_folder(folder)
    remove(folder)


def remove(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link without what it leads to; nothing if there is none.

    Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)  # links in it are unlinked, too
    else:
        path.unlink(missing_ok=True)
