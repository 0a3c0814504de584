"""Keys and values of the tokens seen so far, so that generation computes each token once.

Legend: S new tokens, B rows, T slots in use, G key/value heads of this tensor-parallel rank, d channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """The caches of all layers. A token at position p of its row lies in slot p, and a query at p attends to slots 0 to p.

    So rows of different lengths need no mask for padding: what padding behind a row's end wrote is overwritten by the row's
    own tokens before any of its queries reaches it.

    Args:
        capacity: positions a row can have, padding included.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.capacity = capacity
        self.layers = [LayerCache(self) for _ in range(num_layers)]
        self.used = 0
        self.positions_SB: Tensor | None = None
        self.mask_B1ST: Tensor | None = None

    def place(self, positions_BS: Tensor, device: torch.device) -> None:
        """Say where the tokens of the next forward pass belong: int64 [B, S] on the CPU, below ``capacity``."""
        self.used = max(self.used, int(positions_BS.max()) + 1)
        if self.used > self.capacity:
            raise ValueError(f"position {self.used - 1} is beyond the cache's capacity of {self.capacity}")
        positions_BS = positions_BS.to(device)
        self.positions_SB = positions_BS.t()
        self.mask_B1ST = (torch.arange(self.used, device=device) <= positions_BS[..., None]).unsqueeze(1)


class LayerCache:
    """Keys and values [capacity, B, G, d] of one layer, allocated like the first ones it is given."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def extend(self, k_SBGd: Tensor, v_SBGd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store the keys and values of the tokens that ``place`` announced.

        Returns:
            All keys and values [T, B, G, d], and who may attend to whom: bool [B, 1, S, T].
        """
        cache = self._cache
        if cache.positions_SB is None or cache.mask_B1ST is None:
            raise ValueError("call KVCache.place before the forward pass")
        if self._keys is None or self._values is None:
            self._keys = k_SBGd.new_zeros(cache.capacity, *k_SBGd.shape[1:])
            self._values = v_SBGd.new_zeros(cache.capacity, *v_SBGd.shape[1:])
        rows_B = torch.arange(k_SBGd.shape[1], device=k_SBGd.device)
        self._keys[cache.positions_SB, rows_B] = k_SBGd
        self._values[cache.positions_SB, rows_B] = v_SBGd
        return self._keys[: cache.used], self._values[: cache.used], cache.mask_B1ST
