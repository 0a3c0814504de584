"""Square windows of a grid of positions, in which the attention of Swin looks; shifted in every other block.

Liu et al., arXiv:2103.14030, section 3.2. Where the side of a window does not divide the grid, the grid is filled up with
zeros behind the norm, as in Hugging Face's Swin: real positions see them as they see each other.

Legend: S positions of the grid, in rows (height * width); B pictures; D features; w side of a window, W = w * w; N windows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Windows:
    """A grid of `height` x `width` positions, cut into windows of `side` x `side` that begin `shift` up and left."""

    height: int
    width: int
    side: int
    shift: int

    @classmethod
    def of(cls, height: int, width: int, side: int, *, shifted: bool) -> Windows:
        """A window as large as the grid is not shifted, and one that is larger becomes as small."""
        least = min(height, width)
        return cls(height, width, least, 0) if least <= side else cls(height, width, side, side // 2 if shifted else 0)

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width, filled up to whole windows."""
        return -(-self.height // self.side) * self.side, -(-self.width // self.side) * self.side

    @property
    def number(self) -> int:
        """N"""
        height, width = self.padded
        return height * width // self.side**2

    def cut(self, x_SBD: Tensor) -> Tensor:
        """[S, B, D] -> [W, N * B, D]: every window a sequence, those of one picture B apart."""
        (height, width), w = self.padded, self.side
        x = x_SBD.unflatten(0, (self.height, self.width))
        if (height, width) != (self.height, self.width):
            x = F.pad(x, (0, 0, 0, 0, 0, width - self.width, 0, height - self.height))
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (0, 1))
        x = x.unflatten(1, (width // w, w)).unflatten(0, (height // w, w))  # rows, w, columns, w, B, D
        return x.permute(1, 3, 0, 2, 4, 5).flatten(2, 4).flatten(0, 1)

    def join(self, x_WND: Tensor) -> Tensor:
        """The inverse of `cut`."""
        (height, width), w = self.padded, self.side
        x = x_WND.unflatten(1, (height // w, width // w, -1)).unflatten(0, (w, w))
        x = x.permute(2, 0, 3, 1, 4, 5).flatten(2, 3).flatten(0, 1)
        if self.shift:
            x = x.roll((self.shift, self.shift), (0, 1))
        return x[: self.height, : self.width].flatten(0, 1)

    def mask(self, device: torch.device) -> Tensor | None:
        """bool [N, 1, W, W], True where two positions may attend to each other; None where all may.

        A shifted window at the border holds positions from opposite sides of the picture, which do not see each other.
        """
        if not self.shift:
            return None
        (height, width), w = self.padded, self.side
        rows, columns = (self._parts(size, device) for size in (height, width))
        part = rows[:, None] * 3 + columns
        part_NW = part.unflatten(1, (width // w, w)).unflatten(0, (height // w, w)).transpose(1, 2).reshape(-1, w * w)
        return (part_NW[:, None, :] == part_NW[:, :, None]).unsqueeze(1)

    def _parts(self, size: int, device: torch.device) -> Tensor:
        """Of the shifted positions 0 .. size - 1: which belong together, int64."""
        place = torch.arange(size, device=device)
        return (place >= size - self.side).long() + (place >= size - self.shift).long()

    def index(self, device: torch.device) -> Tensor:
        """int64 [W, W]: number of the distance from each position to each other one, in a table of (2 w - 1)^2."""
        place = torch.arange(self.side, device=device)
        away = place[:, None] - place + self.side - 1  # from, to
        wide = 2 * self.side - 1
        return (away[:, None, :, None] * wide + away[None, :, None, :]).reshape(self.side**2, self.side**2)

    def distances(self, device: torch.device, trained_side: int | None = None) -> Tensor:
        """fp32 [(2 w - 1)^2, 2]: distances in the order of `index`, on a logarithmic scale (arXiv:2111.09883, section 3.3).

        Args:
            trained_side: of the window whose largest distance is 1 on that scale; by default `side`.
        """
        away = torch.arange(1 - self.side, self.side, dtype=torch.float32, device=device)
        away = away / max((trained_side or self.side) - 1, 1) * 8.0
        away = torch.sign(away) * torch.log2(away.abs() + 1.0) / math.log2(8.0)
        return torch.stack(torch.meshgrid(away, away, indexing="ij"), dim=-1).flatten(0, 1)
