"""Products of rows in groups, each group with a matrix of its own, where only the device knows how long the groups are.

Batched in plain PyTorch: rows are cut into tiles of one group each. How many tiles that makes has a bound that the host
knows, so nothing waits, and one batched product does all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def grouped_mm(left: Tensor, right: Tensor, ends_G: Tensor) -> Tensor:
    """``torch.nn.functional.grouped_mm``, and for dtypes that it has no kernel for a loop that waits for the device.

    Args:
        left: [N, X], the rows of group g from ends[g - 1] to ends[g]; or [X, N].
        right: [G, X, Y], or [N, Y].
        ends_G: int32.

    Returns:
        [N, Y], or with left [X, N] the product of each group's rows [G, X, Y]; in the dtype of both.
    """
    if left.dtype == torch.bfloat16:
        return F.grouped_mm(left, right, offs=ends_G)
    ends = ends_G.tolist()
    slices = [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
    if right.ndim == 2:
        return torch.stack([left[:, rows] @ right[rows] for rows in slices])
    return torch.cat([left[rows] @ matrix for rows, matrix in zip(slices, right, strict=True)])


def why_not_grouped(dtype: torch.dtype, device: torch.device, widths: Sequence[int]) -> str | None:
    """Why a loop over experts is the better choice for rows and weights of these widths; None if grouped_mm is.

    ``torch.nn.functional.grouped_mm`` has a kernel for bf16 on compute capability 9.0 and up. Everywhere else it is a loop
    itself, on GPUs one that waits for the device. Forward and backward on one CPU core, 8 experts, SwiGLU, in ms
    (loop / grouped_mm; torch 2.13, AMD EPYC with AVX512-BF16; outputs bit-equal):

        R 1024, D 128, F 256     fp32   9.3 / 8.8      bf16   4.1 / 3.7
        R 4096, D 256, F 512     fp32   116 / 116      bf16    38 / 39      with biases: fp32 120 / 127, bf16 34 / 44
        R 8192, D 512, F 1024    fp32   898 / 1041     bf16   222 / 233
    """
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm"
    if device.type != "cuda":
        return f"grouped_mm has no kernel for {device.type}"
    if dtype != torch.bfloat16:
        return f"grouped_mm has no kernel for {dtype}"
    if torch.cuda.get_device_capability(device) < (9, 0):
        return f"grouped_mm has no kernel for {torch.cuda.get_device_name(device)} (compute capability under 9.0)"
    if any(width % 8 for width in widths):
        return f"grouped_mm needs widths that are multiples of 8 in bf16; these are {list(widths)}"
    return None
