"""How one native tensor is put together from tensors of the Hugging Face layout, and taken apart again.

Legend: D hidden, F feed-forward width, G key/value heads, H query heads, d channels of a head, V vocabulary.
A layout acts on one native tensor, or on one expert's slice of a stacked one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_lsh.models.shape import ModelShape

Shape = tuple[int, ...]


class Layout(Protocol):
    """`shapes`: of the parts, from the native shape; `join` and `split` are inverses and copy bits, never compute."""

    def shapes(self, native: Shape, model: ModelShape) -> list[Shape]: ...

    def join(self, parts: list[Tensor], model: ModelShape) -> Tensor: ...

    def split(self, native: Tensor, model: ModelShape) -> list[Tensor]: ...


class Same:
    """The tensor as it is."""

    def shapes(self, native: Shape, model: ModelShape) -> list[Shape]:
        return [native]

    def join(self, parts: list[Tensor], model: ModelShape) -> Tensor:
        return parts[0]

    def split(self, native: Tensor, model: ModelShape) -> list[Tensor]:
        return [native]


class Qkv:
    """Queries [H d, D], keys and values [G d, D] <-> [G (H/G + 2) d, D]: per group its queries, its key, its value.

    Biases alike, without D.
    """

    def shapes(self, native: Shape, model: ModelShape) -> list[Shape]:
        rest = native[1:]
        queries, keys = model.heads * model.head_dim, model.query_groups * model.head_dim
        return [(queries, *rest), (keys, *rest), (keys, *rest)]

    def join(self, parts: list[Tensor], model: ModelShape) -> Tensor:
        groups = model.query_groups
        return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)

    def split(self, native: Tensor, model: ModelShape) -> list[Tensor]:
        per_group = native.unflatten(0, (model.query_groups, -1))
        heads = model.heads // model.query_groups
        sizes = [heads * model.head_dim, model.head_dim, model.head_dim]
        return [part.flatten(0, 1) for part in per_group.split(sizes, dim=1)]


@dataclass(frozen=True)
class GateUp:
    """gate [F, D], up [F, D] <-> [2, F, D] if `stacked`, else [2F, D]."""

    stacked: bool

    def shapes(self, native: Shape, model: ModelShape) -> list[Shape]:
        part = native[1:] if self.stacked else (native[0] // 2, *native[1:])
        return [part, part]

    def join(self, parts: list[Tensor], model: ModelShape) -> Tensor:
        return torch.stack(parts) if self.stacked else torch.cat(parts)

    def split(self, native: Tensor, model: ModelShape) -> list[Tensor]:
        return list(native.unbind(0) if self.stacked else native.chunk(2))


SAME: Layout = Same()
QKV: Layout = Qkv()
GATE_UP: Layout = GateUp(stacked=True)
GATE_UP_ROWS: Layout = GateUp(stacked=False)
