"""Files that are mapped into memory, and whether they still are what was mapped.

A process that touches a mapped page behind the end of its file is killed by a signal (SIGBUS), on every rank, and nothing
says which file it was. A file gets shorter where somebody copies another one over it while it is in use. So whoever reads a
mapped file looks at its size first: a call of the operating system, of a microsecond, for each sample.
"""

from __future__ import annotations

import os
from pathlib import Path

from megatron_lsh.errors import DataError


class MappedFile:
    """The state of a file when it was mapped."""

    def __init__(self, path: Path) -> None:
        self.path = os.fspath(path)  # a text is looked up faster
        found = os.stat(self.path)
        self._identity, self.size = (found.st_dev, found.st_ino), found.st_size

    def size_now(self) -> int:
        """In bytes. A file that was deleted or replaced under its name keeps its pages: it is as long as it was."""
        try:
            found = os.stat(self.path)
        except OSError:
            return self.size
        return found.st_size if (found.st_dev, found.st_ino) == self._identity else self.size

    def is_whole(self) -> bool:
        return self.size_now() >= self.size

    def check(self) -> None:
        """Raises DataError if the file has become shorter than it was."""
        size = self.size_now()
        if size < self.size:
            raise DataError(
                f"{self.path} has {size} bytes, and had {self.size} when it was opened: it was cut off or written anew "
                "while it was in use; write files under another name and rename them, which a run does not notice"
            )
