"""The same operations by the kernels of ``kernels/``; what a kernel does not take is left to plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_lsh.ops.groups import Groups
from megatron_lsh.ops.library import ON_GPUS
from megatron_lsh.ops.plain import PlainOps
from megatron_lsh.ops.wire_formats import FORMATS

_KEY_BITS = 63
#: kMostHalf of kernels.h.
_MOST_HALF = 128


def _on_gpu(x: Tensor) -> bool:
    """Whether the kernels that only GPUs have take it: not in fp64, in which a run is checked and not trained."""
    return x.is_cuda and x.dtype != torch.float64


class KernelOps(PlainOps):
    """For the dtypes and devices that ``choose`` lets through. Nothing here waits for the device."""

    def __init__(self, kernels: Any) -> None:
        """``kernels``: ``torch.ops.megatron_lsh``, or another namespace with the same schemas (the tests' emulator)."""
        self._kernels = kernels
        # What needs no decision is the kernel itself.
        self.segment_residual = kernels.segment_residual  # type: ignore[method-assign]
        self.members = kernels.members  # type: ignore[method-assign]
        self.dots = kernels.dots  # type: ignore[method-assign]
        for name in ON_GPUS:
            setattr(self, name, self._by_device(name))

    def project(self, rows: Tensor, rotation: Tensor) -> Tensor:
        # On a GPU the library's product is as good.
        if rows.device.type != "cpu" or torch.float64 in (rows.dtype, rotation.dtype):
            return super().project(rows, rotation)
        return self._kernels.project(rows, rotation)

    def grouped(self, rows: Tensor, matrices: Tensor, groups: Groups, transposed: bool = False) -> Tensor:
        if rows.device.type != "cpu":
            return super().grouped(rows, matrices, groups, transposed)
        return self._kernels.grouped(rows, matrices, *groups, transposed)

    def grouped_outer(self, left: Tensor, right: Tensor, groups: Groups) -> Tensor:
        if left.device.type != "cpu":
            return super().grouped_outer(left, right, groups)
        return self._kernels.grouped_outer(left, right, *groups)

    def most_half(self, matrices: Tensor) -> int:
        return _MOST_HALF if _on_gpu(matrices) else super().most_half(matrices)

    def _by_device(self, name: str) -> Callable[..., Any]:
        """For an operation that has a kernel on GPUs alone: its first argument decides."""
        kernel, plain = getattr(self._kernels, name), getattr(super(), name)

        def run(first: Tensor, *rest: Any) -> Any:
            return (kernel if _on_gpu(first) else plain)(first, *rest)

        return run

    def nearest(
        self,
        rows: Tensor,
        index: Tensor | None,
        centroids: Tensor,
        row_ends: Tensor,
        cluster_ends: Tensor,
        on_host: tuple[Sequence[int], Sequence[int]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        return self._kernels.nearest(rows, index, centroids, row_ends, cluster_ends)

    def plan(
        self,
        projection: Tensor,
        index: Tensor | None,
        row_ends: Tensor,
        cluster_ends: Tensor,
        num_clusters: int,
        num_hashes: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # The key of a row holds its expert and Q codes.
        code_bits = (2 * (projection.shape[1] // num_hashes) - 1).bit_length()
        key_fits = row_ends.shape[0].bit_length() + num_hashes * code_bits <= _KEY_BITS
        if projection.dtype != torch.float32 or not key_fits:
            return super().plan(projection, index, row_ends, cluster_ends, num_clusters, num_hashes)
        key = self._kernels.hash(projection, index, row_ends, num_hashes, code_bits)
        return self._kernels.plan(
            key, projection, index, row_ends, cluster_ends, num_clusters, num_hashes, code_bits
        )  # fmt: skip

    def regroup(
        self, nearest: Tensor, distance: Tensor, row_ends: Tensor, cluster_ends: Tensor, num_clusters: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self._kernels.regroup(nearest, distance.float(), row_ends, cluster_ends, num_clusters)

    def segment(
        self,
        source: Tensor,
        index: Tensor | None,
        weight: Tensor | None,
        order: Tensor,
        offsets: Tensor,
        sizes: Tensor,
        mean: bool,
    ) -> Tensor:
        if not _weighs(weight, source):
            return super().segment(source, index, weight, order, offsets, sizes, mean)
        return self._kernels.segment(source, index, weight, order, offsets, sizes, mean)

    def combine(
        self, source: Tensor, index: Tensor, weight: Tensor | None, row: Tensor | None, centroid: Tensor | None
    ) -> Tensor:
        if not _weighs(weight, source):
            return super().combine(source, index, weight, row, centroid)
        return self._kernels.combine(source, index, weight, row, centroid)

    def spread(
        self,
        grad: Tensor | None,
        weight: Tensor | None,
        sum: Tensor | None,
        grad_centroid: Tensor | None,
        index: Tensor,
        sizes: Tensor,
    ) -> Tensor:
        if grad is not None and not _weighs(weight, grad):
            return super().spread(grad, weight, sum, grad_centroid, index, sizes)
        return self._kernels.spread(grad, weight, sum, grad_centroid, index, sizes)

    def encode(self, rows: Tensor, noise: Tensor | None, format: str) -> Tensor:
        if rows.dtype == torch.float64 or format not in FORMATS:
            return super().encode(rows, noise, format)
        return self._kernels.encode(rows, noise, FORMATS.index(format))

    def decode(self, payload: Tensor, format: str, features: int, dtype: torch.dtype) -> Tensor:
        if dtype == torch.float64 or format not in FORMATS:
            return super().decode(payload, format, features, dtype)
        return self._kernels.decode(payload, FORMATS.index(format), features, dtype)


def _weighs(weight: Tensor | None, rows: Tensor) -> bool:
    """Whether kernels take these weights: they are in the dtype of the sums."""
    return weight is None or weight.dtype == (torch.float64 if rows.dtype == torch.float64 else torch.float32)
