"""Arrays that are costly to build and cheap to map: built once per node, then shared by its ranks.

An entry is a folder ``CACHE/KEY/`` with one ``.npy`` per array. It is written under another name and renamed when
complete, so a reader sees a whole entry or none, and of two builders that race, one wins and the other's copy is thrown
away. The key must be a hash of everything the content depends on; entries are then never out of date.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

logger = logging.getLogger(__name__)

# Name of an array -> (shape, dtype). The first dimension counts the rows that a builder yields.
Layout = Mapping[str, tuple[tuple[int, ...], np.dtype]]
Rows = Iterator[tuple[np.ndarray, ...]]


def cache_key(**facts: object) -> str:
    """Hash of everything an entry depends on (JSON values)."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


class ArrayCache:
    """Folder of entries.

    Args:
        folder: where entries are kept; None builds in memory every time.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.folder = Path(folder) if folder is not None else None

    def get(self, key: str, layout: Layout, build: Callable[[], Rows]) -> dict[str, np.ndarray]:
        """The arrays of an entry, mapped read-only; builds the entry if it is missing or damaged.

        If the folder cannot be written (read-only, disk full), says so and returns arrays in memory.

        Args:
            layout: shape and dtype of each array.
            build: yields one row per array for each index of their first dimension, in the order of ``layout``.
        """
        if self.folder is None:
            return _in_memory(layout, build)
        entry = self.folder / key
        found = _load(entry, layout)
        if found is not None:
            return found
        try:
            self._write(entry, layout, build)
        except OSError as error:
            logger.warning(
                "index cache %s cannot be written (%s): building in memory on each rank; set --data-cache-path",
                self.folder,
                error,
            )
            return _in_memory(layout, build)
        found = _load(entry, layout)
        return found if found is not None else _in_memory(layout, build)

    def _write(self, entry: Path, layout: Layout, build: Callable[[], Rows]) -> None:
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{entry.name[:8]}-", suffix=".tmp", dir=entry.parent))
        try:
            streams = [open(temporary / f"{name}.npy", "wb") for name in layout]  # noqa: SIM115
            try:
                for stream, (shape, dtype) in zip(streams, layout.values(), strict=True):
                    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(stream, header)
                for rows in build():
                    # Plain writes, not a memory map: a full disk must raise an error, not kill the process.
                    for stream, row, (_, dtype) in zip(streams, rows, layout.values(), strict=True):
                        stream.write(np.ascontiguousarray(row, dtype=dtype).data)
                for stream in streams:
                    stream.flush()
                    os.fsync(stream.fileno())
            finally:
                for stream in streams:
                    stream.close()
            temporary.chmod(0o755)  # mkdtemp makes private folders; other users may share the cache
            if entry.exists() and _load(entry, layout) is None:
                shutil.rmtree(entry, ignore_errors=True)  # damaged
            try:
                os.rename(temporary, entry)
            except OSError:
                if not entry.exists():
                    raise  # otherwise another process was faster
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _load(entry: Path, layout: Layout) -> dict[str, np.ndarray] | None:
    """The arrays of an entry, or None if it is not there or not as it should be."""
    arrays = {}
    for name, (shape, dtype) in layout.items():
        try:
            # An empty array cannot be mapped.
            mapped = np.load(entry / f"{name}.npy", mmap_mode="r" if all(shape) else None)
        except (OSError, ValueError, EOFError):
            return None
        if mapped.shape != shape or mapped.dtype != dtype:
            return None
        arrays[name] = np.asarray(mapped)
    return arrays


def _in_memory(layout: Layout, build: Callable[[], Rows]) -> dict[str, np.ndarray]:
    arrays = {name: np.empty(shape, dtype) for name, (shape, dtype) in layout.items()}
    for index, rows in enumerate(build()):
        for array, row in zip(arrays.values(), rows, strict=True):
            array[index] = row
    return arrays
