"""What is in a save folder, without loading it and without communicating."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_lsh.checkpoint import folders
from megatron_lsh.checkpoint.manifest import Manifest, ManifestError, check_file, read_manifest
from megatron_lsh.checkpoint.metadata import incomplete
from megatron_lsh.checkpoint.saved import read_config, read_state
from megatron_lsh.errors import DamagedCheckpoint


@dataclass(frozen=True)
class CheckpointInfo:
    """One checkpoint folder.

    Attributes:
        problem: None if it is valid, else what is wrong and with which file.
        tracked: whether the tracker file names it, so that a plain --load takes it.
        verified: whether the hashes were checked, or only the manifest and the sizes.
    """

    folder: Path
    iteration: int
    problem: str | None
    tracked: bool
    verified: bool
    manifest: Manifest | None = None
    progress: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def valid(self) -> bool:
        return self.problem is None


def inspect(root: str | Path, *, hashes: bool = False) -> list[CheckpointInfo]:
    """Checkpoints below `root`, newest first; empty if there are none. Local: call it on one rank.

    Checks each manifest and the file sizes, and with `hashes` the content of every file.
    """
    root = Path(root)
    tracker = folders.read_tracker(root)
    found = folders.list_folders(root)
    release = root / folders.RELEASE
    if release.is_dir():
        found = [(0, release), *found]
    result = []
    for iteration, folder in found:
        tracked = tracker is not None and (
            tracker.release if folder == release else folder == folders.iteration_folder(root, tracker.iteration or 0)
        )
        result.append(inspect_folder(folder, iteration, tracked=tracked, hashes=hashes))
    return result


def inspect_folder(folder: Path, iteration: int, *, tracked: bool = False, hashes: bool = True) -> CheckpointInfo:
    """One checkpoint. Never raises: what is wrong is the `problem`."""
    try:
        manifest = read_manifest(folder)
    except ManifestError as error:
        return CheckpointInfo(folder, iteration, str(error), tracked, hashes)
    problems = (check_file(folder, entry, hashes=hashes) for entry in manifest.files)
    problem = next((text for text in problems if text is not None), None) or incomplete(folder, manifest) or None
    progress: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    config: dict[str, Any] = {}
    try:
        config = read_config(folder)
        saved = read_state(folder)
        progress, extra = saved.progress, saved.extra
    except DamagedCheckpoint as error:
        problem = problem or str(error)
    return CheckpointInfo(
        folder,
        iteration,
        problem,
        tracked,
        hashes,
        manifest,
        progress,
        extra,
        config,
    )
