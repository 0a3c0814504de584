"""What one forward pass of a layer decided, kept for the replay under activation recomputation."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")


class ReplayMemo:
    """Remember discrete decisions so that a recomputed forward repeats them instead of taking them again.

    The transformer layer makes one memo per call and passes it down through ``torch.utils.checkpoint``. The first
    forward records; when the backward pass runs the same code again, the recorded objects are returned. So nothing is
    hashed or clustered twice, the replay cannot diverge from the original, and counters can tell a replay from a new pass.
    """

    def __init__(self) -> None:
        self._values: dict[Hashable, Any] = {}
        self._passes: dict[Hashable, int] = {}

    def recall(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Return the value recorded under ``key``; the first time, compute and record it."""
        if key not in self._values:
            self._values[key] = compute()
        return self._values[key]

    def replaying(self, key: Hashable) -> bool:
        """True from the second time this is asked for ``key``, i.e. when the layer runs again."""
        self._passes[key] = self._passes.get(key, 0) + 1
        return self._passes[key] > 1
