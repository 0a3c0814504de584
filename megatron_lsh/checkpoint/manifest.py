"""``manifest.json``: the last file of a checkpoint to be written, and the first to be removed.

It lists every file with size and SHA-256, because torch.distributed.checkpoint loads most flipped bits without noticing.
A folder without a valid manifest is not a checkpoint. The manifest protects itself with the SHA-256 of its own text.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, TypeGuard

from megatron_lsh.errors import DamagedCheckpoint

MANIFEST = "manifest.json"
FORMAT = 1
_TYPES = MappingProxyType(
    {
        "iteration": int,
        "layout": dict,
        "config_sha256": str,
        "torch_version": str,
        "package_version": str,
        "created": str,
    }
    | {"has_optimizer": bool, "has_rng": bool, "format": int}
)


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


class ManifestError(DamagedCheckpoint):
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
        if path.exists() and not path.is_file():  # a pipe would never end
            raise ManifestError(f"{path} is not a file")
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
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise ManifestError(f"{path} is damaged (its own checksum does not match)")
    if isinstance(manifest.format, int) and manifest.format > FORMAT:
        raise ManifestError(f"{path} has format {manifest.format}; this version reads up to {FORMAT}")
    # The checksum is no signature: whoever means harm can write one that matches.
    if (problem := _wrong_value(manifest)) is not None:
        raise ManifestError(f"{path} is not one that was written by this framework: {problem}")
    return manifest


def _wrong_value(manifest: Manifest) -> str | None:
    """The first value of a type or a kind that no save writes."""
    for name, kind in _TYPES.items():
        if type(getattr(manifest, name)) is not kind:
            return f"{name} ({getattr(manifest, name)!r}) must be of type {kind.__name__}"
    if manifest.iteration < 0:
        return f"iteration ({manifest.iteration}) must be at least 0"
    names = set()
    for entry in manifest.files:
        if not is_plain_name(entry.name) or entry.name in names:
            return f"the file name {entry.name!r} must be one inside of the folder, listed once"
        if type(entry.size) is not int or entry.size < 0 or not re.fullmatch("[0-9a-f]{64}", str(entry.sha256)):
            return f"{entry.name} must have a size and a SHA-256, not {entry.size!r} and {entry.sha256!r}"
        names.add(entry.name)
    return None


def is_plain_name(name: object) -> TypeGuard[str]:
    """Whether `name` is a relative path in its simplest spelling, which cannot lead out of a folder (links apart)."""
    if not isinstance(name, str) or not name or "\\" in name or "\0" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and str(path) == name and name != "."


def hash_file(path: Path, root: Path | None = None) -> FileEntry:
    """Size and SHA-256 of one file, by its name inside `root` (by default the folder that it is in). Raises OSError."""
    digest = hashlib.sha256()
    size = 0
    with open(path, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
            size += len(block)
    return FileEntry(path.name if root is None else path.relative_to(root).as_posix(), size, digest.hexdigest())


def check_file(folder: Path, entry: FileEntry, *, hashes: bool = True) -> str | None:
    """None if the file is as the manifest says, else one sentence naming the file. Sizes only if not `hashes`.

    A link that leads out of the folder is a fault: what it leads to is not this checkpoint's, and changes without it.
    """
    path = folder / entry.name
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            return f"{path} is a link that leads out of the checkpoint, to {path.resolve()}"
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return f"{path} is not a file"
        size = status.st_size
        if size != entry.size:
            return f"{path} has {size} bytes instead of {entry.size}"
        if hashes and hash_file(path).sha256 != entry.sha256:
            return f"{path} is damaged (SHA-256 does not match the manifest)"
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle (Python < 3.13)
        return f"{path} cannot be read: {getattr(error, 'strerror', None) or error}"
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
        temporary.unlink(missing_ok=True)  # of a crash, or a link: writing must not follow it
        with open(temporary, "xb") as stream:
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
