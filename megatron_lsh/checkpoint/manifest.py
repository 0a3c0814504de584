"""``manifest.json``: the last file of a checkpoint to be written, and the first to be removed.

It lists every file with size and SHA-256, because torch.distributed.checkpoint loads most flipped bits without noticing.
A folder without a valid manifest is not a checkpoint. The manifest protects itself with the SHA-256 of its own text.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint: name inside the folder, size in bytes, SHA-256 in hex."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of.

    Attributes:
        layout: world_size, tp, ep, dp, edp and shard_optimizer of the run that wrote it.
        config_sha256: of config.json, to compare the settings of two checkpoints at a glance.
        created: UTC, ISO 8601.
    """

    iteration: int
    files: tuple[FileEntry, ...]
    layout: dict[str, Any]
    config_sha256: str
    torch_version: str
    package_version: str
    created: str
    has_optimizer: bool
    has_rng: bool
    format: int = FORMAT
    sha256: str = field(default="", compare=False)

    @property
    def total_bytes(self) -> int:
        return sum(entry.size for entry in self.files)


class ManifestError(Exception):
    """A manifest that is missing or damaged."""


def _serialise(manifest: Manifest, checksum: str) -> bytes:
    body = asdict(manifest) | {"sha256": checksum}
    return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write and fsync the manifest under a temporary name, rename it, fsync the folder. Call last."""
    text = _serialise(manifest, hashlib.sha256(_serialise(manifest, "")).hexdigest())
    write_atomically(folder / MANIFEST, text)


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest itself (not the files it lists). Raises ManifestError."""
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise ManifestError(f"{path} is missing: the checkpoint is incomplete") from None
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error}") from None
    try:
        body = json.loads(text)
        files = tuple(FileEntry(**entry) for entry in body.pop("files"))
        manifest = Manifest(files=files, **body)
        # Comparing the whole text, not only the parsed values, catches a flipped bit in white space as well.
        intact = text == _serialise(manifest, hashlib.sha256(_serialise(manifest, "")).hexdigest())
    except (ValueError, TypeError, KeyError, AttributeError):
        intact = False
    if not intact:
        raise ManifestError(f"{path} is damaged (its own checksum does not match)")
    if manifest.format > FORMAT:
        raise ManifestError(f"{path} has format {manifest.format}; this version reads up to {FORMAT}")
    return manifest


def hash_file(path: Path) -> FileEntry:
    """Size and SHA-256 of one file. Raises OSError."""
    digest = hashlib.sha256()
    size = 0
    with open(path, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
            size += len(block)
    return FileEntry(path.name, size, digest.hexdigest())


def check_file(folder: Path, entry: FileEntry, *, hashes: bool = True) -> str | None:
    """None if the file is as the manifest says, else one sentence naming the file. Sizes only if not `hashes`."""
    path = folder / entry.name
    try:
        size = path.stat().st_size
        if size != entry.size:
            return f"{path} has {size} bytes instead of {entry.size}"
        if hashes and hash_file(path).sha256 != entry.sha256:
            return f"{path} is damaged (SHA-256 does not match the manifest)"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror or error}"
    return None


def share(files: Iterable[FileEntry], rank: int, size: int) -> list[FileEntry]:
    """The files that `rank` of `size` ranks hashes: largest first, each to the rank with the fewest bytes so far."""
    load = [0] * size
    mine = []
    for entry in sorted(files, key=lambda entry: (-entry.size, entry.name)):
        target = load.index(min(load))
        load[target] += entry.size + 4096  # an empty file costs something too
        if target == rank:
            mine.append(entry)
    return mine


def write_atomically(path: Path, text: bytes) -> None:
    """Replace the content of `path`: after a crash it is the old or the new text, after the return durably the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """fsync a folder: makes the creations, renames and removals in it durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
