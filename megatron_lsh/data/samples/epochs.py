"""Orders of samples, one epoch after the other, kept in blocks of whole epochs.

A run may read its corpus once or a million times. The first blocks are made when the run starts, by one rank of each node;
the others when training comes near them, so that a long run over a small corpus needs neither the time nor the space of
all its epochs at once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from threading import Lock

import numpy as np

from megatron_lsh.data.cache import ArrayCache, Entry, Layout, Rows, cache_key

BLOCK_ROWS, BLOCK_EPOCHS = 1 << 16, 1 << 10  # made in a fraction of a second, unless a single epoch is larger
BLOCKS_AT_START = 8
BLOCKS_OPEN = 2  # training reads one, and near its end also the next

Epoch = dict[str, np.ndarray]


class EpochArrays:
    """Arrays that every epoch has one row of.

    Args:
        layout: shape and dtype of each array, of one epoch.
        num_epochs: how many there are.
        make: the rows of an epoch, given its number, in the order of ``layout``. A pure function.
        facts: what the rows depend on besides the epoch (JSON values): the key of the cache.
        cache: keeps the blocks.
    """

    def __init__(
        self,
        layout: Layout,
        num_epochs: int,
        make: Callable[[int], tuple[np.ndarray, ...]],
        facts: Mapping[str, object],
        cache: ArrayCache,
    ) -> None:
        self._layout, self._num_epochs, self._make, self._facts, self._cache = layout, num_epochs, make, facts, cache
        rows = sum(int(np.prod(shape)) for shape, _ in layout.values())
        self._epochs_per_block = min(max(BLOCK_ROWS // max(rows, 1), 1), BLOCK_EPOCHS)
        self._open: OrderedDict[int, Entry] = OrderedDict()
        self._lock = Lock()  # the threads that read ahead share a data set
        blocks = -(-num_epochs // self._epochs_per_block)
        for block in range(min(blocks, BLOCKS_AT_START)):
            if not cache.prepare(*self._entry(block)):
                break

    def __getitem__(self, epoch: int) -> Epoch:
        """The rows of an epoch by name."""
        block, row = divmod(epoch, self._epochs_per_block)
        with self._lock:
            if block not in self._open or not self._open[block].is_whole():
                self._open[block] = self._cache.get(*self._entry(block))
            self._open.move_to_end(block)
            if len(self._open) > BLOCKS_OPEN:
                self._open.popitem(last=False)
            arrays = self._open[block]
        return {name: array[row] for name, array in arrays.items()}

    def _entry(self, block: int) -> tuple[str, Layout, Callable[[], Rows]]:
        """Key, layout and builder of a block."""
        first = block * self._epochs_per_block
        count = min(self._epochs_per_block, self._num_epochs - first)
        key = cache_key(**self._facts, first_epoch=first, epochs=count)
        layout = {name: ((count, *shape), dtype) for name, (shape, dtype) in self._layout.items()}
        return key, layout, lambda: (self._make(epoch) for epoch in range(first, first + count))
