"""One line of progress at a time, for the tools that run alone."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """Prints percent, documents, MB/s, documents/s and the time left, at most once a second.

    Args:
        total: units of the whole work, see `update`.
        interval: print when this many more documents are done.
        stream: where to (default: stderr).
    """

    def __init__(self, total: float, interval: int, stream: TextIO | None = None) -> None:
        self._total, self._interval = max(total, 1), max(interval, 1)
        self._stream = stream if stream is not None else sys.stderr
        self._begin = self._printed = time.monotonic()
        self._next = self._interval
        self.documents, self.size = 0, 0

    def update(self, done: float, documents: int, size: int) -> None:
        """Report ``documents`` more documents of ``size`` bytes; ``done`` of the total units are behind us."""
        self.documents += documents
        self.size += size
        now = time.monotonic()
        if self.documents < self._next or now - self._printed < 1.0:
            return
        self._printed, self._next = now, self.documents + self._interval
        share, elapsed = min(done / self._total, 1.0), now - self._begin
        left = clock(elapsed / share - elapsed) if share > 0 else "?"
        print(
            f"{share:6.1%} | {self.documents:,} documents | {self.size / 1e6 / elapsed:.2f} MB/s | "
            f"{self.documents / elapsed:,.0f} docs/s | ETA {left}",
            file=self._stream,
            flush=True,
        )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begin


def clock(seconds: float) -> str:
    """h:mm:ss"""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
