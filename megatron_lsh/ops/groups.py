"""Products of rows in groups, each group with a matrix of its own, where only the device knows how long the groups are.

Batched in plain PyTorch: rows are cut into tiles of one group each. How many tiles that makes has a bound that the host
knows, so nothing waits, and one batched product does all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 128


class Groups(NamedTuple):
    """Places [start, start + count) belong to group g, and the first ``width`` of the B rows of its matrix are there.

    Attributes:
        starts, counts, widths: int64 [G]. Groups are in order and do not overlap.
        order: int64 [N], the row at each place; None where row n is at place n.
    """

    starts: Tensor
    counts: Tensor
    widths: Tensor
    order: Tensor | None = None


class Tiles(NamedTuple):
    """Attributes:
    group_S: int64, the group of each tile.
    place_SR: int64, the places of each tile; the number of rows where there is none.
    offsets_G, sizes_G: int64, which tiles a group has.
    """

    group_S: Tensor
    place_SR: Tensor
    offsets_G: Tensor
    sizes_G: Tensor

    @staticmethod
    def of(groups: Groups, num_rows: int) -> Tiles:
        device, num_groups = groups.starts.device, groups.starts.shape[0]
        sizes_G = torch.div(groups.counts + TILE - 1, TILE, rounding_mode="floor")
        ends_G = sizes_G.cumsum(0)
        tile_S = torch.arange(num_rows // TILE + num_groups, device=device)
        group_S = torch.searchsorted(ends_G, tile_S, right=True).clamp_(max=num_groups - 1)
        first_S = (tile_S - (ends_G - sizes_G)[group_S]) * TILE
        place_SR = first_S.unsqueeze(1) + torch.arange(TILE, device=device)
        # Surplus tiles count on from the last group's, beyond its rows.
        place_SR = torch.where(
            place_SR < groups.counts[group_S].unsqueeze(1), place_SR + groups.starts[group_S].unsqueeze(1), num_rows
        )
        return Tiles(group_S, place_SR, ends_G - sizes_G, sizes_G)


def pick(rows_NX: Tensor, tiles: Tiles, order: Tensor | None) -> Tensor:
    """[S, R, X]: the rows of each tile, zero where there is none. ``order``: the row at each place, if not the same."""
    place_R = tiles.place_SR.flatten()
    row_R = place_R.clamp(max=rows_NX.shape[0] - 1)
    picked = rows_NX.index_select(0, row_R if order is None else order[row_R])
    return picked.masked_fill_((place_R == rows_NX.shape[0]).unsqueeze(1), 0).view(*tiles.place_SR.shape, -1)


def put(tiled_SRX: Tensor, tiles: Tiles, num_rows: int, order: Tensor | None) -> Tensor:
    """[N, X]: the inverse of :func:`pick`; zero where a row is in no tile."""
    width = tiled_SRX.shape[2]
    # The last row takes what has no place.
    row_R = tiles.place_SR.flatten()
    row_R = row_R if order is None else F.pad(order, (0, 1), value=num_rows)[row_R]
    out = tiled_SRX.new_zeros(num_rows + 1, width)
    return out.index_copy_(0, row_R, tiled_SRX.reshape(-1, width))[:num_rows]
