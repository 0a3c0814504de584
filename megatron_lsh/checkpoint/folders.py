"""Names and life of checkpoint folders: Megatron's layout, made safe against a crash at any moment.

    SAVE/latest_checkpointed_iteration.txt   the iteration to resume from, or "release"
    SAVE/iter_0000100/                       one complete checkpoint
    SAVE/iter_0000100.incomplete/            being written, or left behind by a crash; never loaded, removed by the next save
    SAVE/iter_0000100.old/                   the previous iter_0000100 while the same iteration is saved again

A checkpoint is written into ``.incomplete``; its manifest comes last; then the folder is renamed and only then the
tracker file moves. Whatever the moment of a crash, the tracker names a complete checkpoint. Removal takes the manifest
first, so a half-removed folder is not a checkpoint either.
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
_INCOMPLETE = re.compile(r"iter_(\d{7,})\.incomplete")


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


def list_incomplete(root: Path) -> list[Path]:
    """Folders of saves that never finished."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return sorted(path for path in root.iterdir() if _INCOMPLETE.fullmatch(path.name))
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


def start_folder(root: Path, iteration: int) -> Path:
    """Remove what crashed saves left behind and create an empty ``.incomplete`` folder. Raises OSError."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in list_incomplete(root):
        shutil.rmtree(leftover)
    folder = incomplete_folder(root, iteration)
    folder.mkdir()
    return folder


def commit(root: Path, iteration: int) -> Path:
    """Give the complete folder its final name and move the tracker file, durably. Returns the final folder.

    A checkpoint of the same iteration becomes ``.old`` until `tidy`. Raises OSError; then everything is as before, but
    for the new checkpoint, which is gone.
    """
    final, old = iteration_folder(root, iteration), old_folder(root, iteration)
    replaces = final.exists()
    if replaces:
        remove_checkpoint(old)
        os.rename(final, old)
    try:
        os.rename(incomplete_folder(root, iteration), final)
        sync_folder(root)
        write_tracker(root, iteration)
    except OSError:
        remove_checkpoint(final)
        if replaces:
            os.rename(old, final)
        raise
    return final


def tidy(root: Path, iteration: int, retain_interval: int | None) -> list[Path]:
    """After `iteration` is saved and tracked: remove ``.old`` folders and, with --save-retain-interval, every older
    checkpoint whose iteration is not a multiple of it. Newer folders (of a run that was rolled back) stay."""
    removed = []
    for found, path in list_folders(root):
        superseded = path.suffix == ".old" and found <= iteration
        expired = retain_interval is not None and found < iteration and found % retain_interval != 0
        if superseded or expired:
            remove_checkpoint(path)
            removed.append(path)
    return removed


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint, manifest first. Does nothing if it is not there. Raises OSError."""
    if not folder.exists():
        return
    manifest = folder / MANIFEST
    if manifest.exists():
        manifest.unlink()
        sync_folder(folder)
    shutil.rmtree(folder)
