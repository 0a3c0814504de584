"""Arrays that are costly to build and cheap to map: built once per node, then shared by its ranks.

An entry is a folder ``CACHE/KEY/`` with one ``.npy`` per array and the checksums of these files. It is written under
another name and renamed when complete, so a reader sees a whole entry or none, and of two builders that race, one wins and
the other's copy is thrown away. The key must be a hash of everything the content depends on; entries are then never out of
date. The checksums are compared whenever an entry is read, and an entry that differs in any way is built again: a flipped
bit in an index would give other samples, or none.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_lsh.data.mapped import MappedFile
from megatron_lsh.parallel.owner import Owner, is_over

logger = logging.getLogger(__name__)

# Name of an array -> (shape, dtype). The first dimension counts the rows that a builder yields.
Layout = Mapping[str, tuple[tuple[int, ...], np.dtype]]
Rows = Iterator[tuple[np.ndarray, ...]]
Build = Callable[[], Rows]

CHECKSUMS = "checksums.json"
READ_BYTES = 1 << 24
OWNER = "owner.json"  # who builds an entry, until it is complete
ABANDONED_S = 24 * 3600.0  # no builder of whom nothing is known, on another host, goes for a day without writing


def cache_key(**facts: object) -> str:
    """Hash of everything an entry depends on (JSON values)."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


class Entry(dict[str, np.ndarray]):
    """Arrays by name, and the files that they are mapped from (none: they are in memory)."""

    def __init__(self, arrays: Mapping[str, np.ndarray], files: tuple[MappedFile, ...] = ()) -> None:
        super().__init__(arrays)
        self._files = files

    def is_whole(self) -> bool:
        """To be asked before the arrays are read: false if a file is shorter than it was, and must be built again."""
        return all(file.is_whole() for file in self._files)


class ArrayCache:
    """Folder of entries.

    Args:
        folder: where entries are kept; None builds in memory every time.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.folder = Path(folder) if folder is not None else None
        self._writable = folder is not None

    def get(self, key: str, layout: Layout, build: Build) -> Entry:
        """The arrays of an entry, mapped read-only; builds the entry if it is missing or damaged.

        If the folder cannot be written (read-only, disk full), says so once and returns arrays in memory.

        Args:
            layout: shape and dtype of each array.
            build: yields one row per array for each index of their first dimension, in the order of ``layout``.
        """
        if self.folder is not None:
            entry = self.folder / key
            found = _load(entry, layout)
            if found is None and os.path.lexists(entry):
                logger.warning("index cache %s is damaged, or of an older version: it is built again", entry)
            if found is None and self._write(entry, layout, build):
                found = _load(entry, layout)
            if found is not None:
                return found
        return Entry(_in_memory(layout, build))

    def prepare(self, key: str, layout: Layout, build: Build) -> bool:
        """Builds an entry ahead of its first `get` if it is missing. Returns False where nothing can be kept."""
        if self.folder is None or (self.folder / key / CHECKSUMS).is_file():
            return self.folder is not None
        return self._write(self.folder / key, layout, build)

    def _write(self, entry: Path, layout: Layout, build: Build) -> bool:
        """Build and keep an entry; False if that is impossible."""
        if not self._writable:
            return False
        try:
            _write(entry, layout, build)
        except OSError as error:
            self._writable = False
            logger.warning(
                "index cache %s cannot be written (%s): building in memory on each rank; set --data-cache-path",
                self.folder,
                error,
            )
        return self._writable


class _ChecksummedFile:
    """Counts the checksum of what is written."""

    def __init__(self, path: Path) -> None:
        self.checksum = 0
        self._stream: BinaryIO = open(path, "wb")  # noqa: SIM115  (closed by close)

    def write(self, content: bytes | memoryview) -> int:
        self.checksum = zlib.crc32(content, self.checksum)
        # Plain writes, not a memory map: a full disk must raise an error, not kill the process.
        return self._stream.write(content)

    def close(self) -> None:
        self._stream.close()


def _write(entry: Path, layout: Layout, build: Build) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{entry.name[:8]}-", suffix=".tmp", dir=entry.parent))
    try:
        me = Owner.here()
        (temporary / OWNER).write_bytes(me.serialise())
        _remove_abandoned(entry.parent, me, now_s=(temporary / OWNER).stat().st_mtime)
        files = {name: _ChecksummedFile(temporary / f"{name}.npy") for name in layout}
        try:
            for file, (shape, dtype) in zip(files.values(), layout.values(), strict=True):
                header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)  # type: ignore[arg-type]
            for rows in build():
                for file, row, (_, dtype) in zip(files.values(), rows, layout.values(), strict=True):
                    file.write(np.ascontiguousarray(row, dtype=dtype).data)
        finally:
            for file in files.values():
                file.close()
        # Nothing is forced to disk: what a crash of the machine takes away, the checksums find missing.
        record = _record(entry.name, {name: file.checksum for name, file in files.items()})
        (temporary / CHECKSUMS).write_text(json.dumps(record, indent=2), encoding="utf-8")
        (temporary / OWNER).unlink()
        temporary.chmod(0o755)  # mkdtemp makes private folders; other users may share the cache
        if os.path.lexists(entry) and _load(entry, layout) is None:
            _remove(entry)
        try:
            os.rename(temporary, entry)
        except OSError:
            if not entry.exists():
                raise  # otherwise another process was faster
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _record(key: str, checksums: Mapping[str, int]) -> dict[str, object]:
    """What ``checksums.json`` holds. The key is part of it: an entry copied under another name is none."""
    return {"key": key, "crc32": checksums}


def _load(entry: Path, layout: Layout) -> Entry | None:
    """The arrays of an entry, or None if it is not there or not as it was written."""
    try:
        files = tuple(MappedFile(entry / f"{name}.npy") for name in layout)
        record = json.loads((entry / CHECKSUMS).read_bytes())
        if record != _record(entry.name, {name: _checksum(entry / f"{name}.npy") for name in layout}):
            return None
        # An empty array cannot be mapped.
        arrays = {
            name: np.load(entry / f"{name}.npy", mmap_mode="r" if all(shape) else None)
            for name, (shape, _) in layout.items()
        }
    except Exception:  # whatever is wrong with it, building it again is the way out
        return None
    if any(arrays[name].shape != shape or arrays[name].dtype != dtype for name, (shape, dtype) in layout.items()):
        return None
    return Entry({name: np.asarray(array) for name, array in arrays.items()}, files)


def _checksum(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as stream:
        while block := stream.read(READ_BYTES):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _remove(entry: Path) -> None:
    """A folder with its content; a file or a link alone."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink(missing_ok=True)


def _remove_abandoned(folder: Path, me: Owner, now_s: float) -> None:
    """Remove what builders that were killed have left behind.

    Args:
        now_s: the file system's time; no other clock is compared with its times.
    """
    for left in folder.glob(".*.tmp"):
        with suppress(OSError):
            touched_s = max(path.stat().st_mtime for path in (left, *left.iterdir()))
            owner = Owner.parse((left / OWNER).read_bytes()) if (left / OWNER).is_file() else None
            over = None if owner is None else is_over(owner, me)
            if over or (over is None and touched_s < now_s - ABANDONED_S):
                _remove(left)


def _in_memory(layout: Layout, build: Build) -> dict[str, np.ndarray]:
    arrays = {name: np.empty(shape, dtype) for name, (shape, dtype) in layout.items()}
    for index, rows in enumerate(build()):
        for array, row in zip(arrays.values(), rows, strict=True):
            array[index] = row
    return arrays
