"""One line with percent, bytes, speed and time left."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from megatron_lsh.data.preparation.progress import clock


class ByteProgress:
    """Progress over a known number of bytes: a line that is rewritten on a terminal, a new line every 10 s elsewhere.

    Args:
        label: what is going on, such as "converting".
        total: bytes of the whole work.
        stream: where to (default: stderr).
    """

    def __init__(self, label: str, total: int, stream: TextIO | None = None) -> None:
        self._label, self._total = label, max(total, 1)
        self._stream = stream if stream is not None else sys.stderr
        self._terminal = self._stream.isatty()
        self._begin = self._printed = time.monotonic()
        self._done = 0

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        now = time.monotonic()
        if now - self._printed >= (0.2 if self._terminal else 10.0):
            self._printed = now
            self._print(now, end="" if self._terminal else "\n")

    def finish(self) -> None:
        """Say how long it took."""
        self._print(time.monotonic(), end="\n")

    def _print(self, now: float, end: str) -> None:
        seconds = max(now - self._begin, 1e-6)
        share = min(self._done / self._total, 1.0)
        left = clock(seconds / share - seconds) if share else "?"
        text = (
            f"{self._label} {share:6.1%} | {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB | "
            f"{self._done / 1e6 / seconds:.0f} MB/s | "
        ) + (f"took {clock(seconds)}" if share >= 1.0 else f"ETA {left}")
        print("\r\033[K" + text if self._terminal else text, end=end, file=self._stream, flush=True)
