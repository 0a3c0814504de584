"""Inputs for the kernel tests, and the definitions they are compared with: plain loops in fp64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megatron_lsh.lsh import Clusters

# Rows per expert: nothing, one row, sizes around a warp, around a tile and around the planning blocks of the emulator.
COUNTS = [[0], [1], [5, 0, 1], [31, 32, 33], [63, 64, 65, 0], [130, 7]]


@dataclass(frozen=True)
class Case:
    """Random rows sorted by expert, and a random clustering of them.

    With ``exact``, rows hold small whole numbers, so that every sum and product below is exact and ties are real.
    """

    counts: list[int]
    features: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    rate: float = 0.3
    seed: int = 0
    exact: bool = False

    @cached_property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    @property
    def num_rows(self) -> int:
        return sum(self.counts)

    def floats(self, *shape: int) -> Tensor:
        if self.exact:
            values = torch.randint(-3, 4, shape, generator=self.generator)
        else:
            values = torch.randn(shape, generator=self.generator)
        return values.to(self.device, self.dtype)

    @cached_property
    def rows(self) -> Tensor:
        return self.floats(self.num_rows, self.features)

    @cached_property
    def row_ends(self) -> Tensor:
        return torch.tensor(self.counts, device=self.device).cumsum(0)

    @cached_property
    def budgets(self) -> list[int]:
        return [-int(-n * self.rate // 1) for n in self.counts]

    @cached_property
    def cluster_ends(self) -> Tensor:
        return torch.tensor(self.budgets, device=self.device).cumsum(0)

    @property
    def num_clusters(self) -> int:
        return sum(self.budgets)

    @cached_property
    def clusters(self) -> Clusters:
        """Any clustering within experts; some clusters may be empty and some large."""
        parts = [torch.zeros(0, dtype=torch.int64)]
        first = 0
        for n, budget in zip(self.counts, self.budgets, strict=True):
            skewed = torch.rand(n, generator=self.generator).square() * budget
            parts.append(skewed.long() + first)
            first += budget
        cluster_N = torch.cat(parts)
        sizes_C = torch.bincount(cluster_N, minlength=self.num_clusters)
        budgets = torch.tensor(self.budgets)
        made = Clusters.from_assignment(cluster_N, sizes_C, budgets)
        return Clusters(*(getattr(made, name).to(self.device) for name in Clusters.__dataclass_fields__))

    @property
    def order(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.clusters.order_N, self.clusters.offsets_C, self.clusters.sizes_C


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """Rounding of the result, and of fp32 sums of numbers near 1."""
    relative = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    return {"rtol": relative, "atol": 10 * relative if dtype in (torch.float64, torch.float32) else 4 * relative}


def assert_close(got: Tensor, expected: Tensor) -> None:
    """Compare with an fp64 result, as exactly as the dtype of ``got`` allows."""
    assert got.shape == expected.shape
    torch.testing.assert_close(got.double(), expected.double(), **tolerance(got.dtype))


def packed_keys(codes_NQ: Tensor, counts: list[int], bits: int) -> Tensor:
    expert_N = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    keys = [int(e) for e in expert_N]
    for codes_N in codes_NQ.unbind(1):
        keys = [(key << bits) | int(code) for key, code in zip(keys, codes_N, strict=True)]
    return torch.tensor(keys, dtype=torch.int64)


def plain_segments(rows: Tensor, weight: Tensor | None, cluster_N: Tensor, num_clusters: int, mean: bool) -> Tensor:
    out = torch.zeros(num_clusters, rows.shape[1], dtype=torch.float64, device=rows.device)
    weighted = rows.double() if weight is None else rows.double() * weight.double()[:, None]
    out.index_add_(0, cluster_N, weighted)
    if mean:
        out /= torch.bincount(cluster_N, minlength=num_clusters).clamp(min=1)[:, None]
    return out


def plain_restored(source: Tensor, index: Tensor, row: Tensor | None, centroid: Tensor | None) -> Tensor:
    """[T, K, D]: what each slot holds; zeros where there is nothing."""
    picked = source.double()[index.clamp(min=0)]
    if row is not None:
        picked = picked + row.double()[:, None]
    if centroid is not None:
        picked = picked - centroid.double()[index.clamp(min=0)]
    return picked.masked_fill((index < 0)[..., None], 0)
