"""Rows in a slowly moving subspace, a rival of LSH: `--moe-token-dispatcher-type benchmarks.subspace:dims_R`.

Every row travels, as its R coordinates in a basis of each layer; so do outputs and both gradients, each in a basis of its
own, because their directions have little in common. A basis spans the leading eigenvectors of the second moments of what
travelled (a moving average over micro-batches), and is replaced every `EVERY` iterations; until the first time rows travel
whole. That low-rank bases of activations or gradients may lag behind by hundreds of steps is known from PowerSGD (Vogels et
al. 2019, arXiv:1905.13727) and GaLore (Zhao et al. 2024, arXiv:2403.03507); rows between pipeline stages that are kept in a
subspace are Ramasinghe et al.'s (2025, arXiv:2506.01260), who constrain the weights for it, which is not done here.

On one rank: rows are rounded to the subspace as if they had travelled. Evaluations use the bases and do not move them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lsh.moe.dispatcher import Dispatcher, Restore
from megatron_lsh.moe.layer_pass import LayerPass
from megatron_lsh.moe.permute import Rows
from megatron_lsh.moe.registry import DispatcherSpec, row_dispatcher

EVERY = 20
DECAY = 0.95
"""of the moving averages, per micro-batch"""


def __getattr__(name: str) -> Callable[[DispatcherSpec], Dispatcher]:
    """The factory for R coordinates per row."""
    found = re.fullmatch(r"dims_(\d{1,6})", name)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    dims = int(found[1])
    return lambda spec: row_dispatcher(spec, InSubspace(spec.hidden, dims))


class Basis:
    """R directions in which vectors of D numbers are kept; None of them before the first :meth:`move`."""

    def __init__(self, width: int, dims: int) -> None:
        self._moments_DD: Tensor | None = None
        self._dims = min(dims, width)
        self._basis_DR: Tensor | None = None

    def see(self, rows_ND: Tensor) -> None:
        """Take part in the moving average."""
        moments_DD = rows_ND.float().t() @ rows_ND.float()
        before = moments_DD if self._moments_DD is None else self._moments_DD
        self._moments_DD = DECAY * before + (1 - DECAY) * moments_DD

    def move(self) -> None:
        """To the leading directions of what was seen."""
        if self._moments_DD is not None and torch.isfinite(self._moments_DD).all():
            self._basis_DR = torch.linalg.eigh(self._moments_DD).eigenvectors[:, -self._dims :]

    def project(self, rows_ND: Tensor) -> Tensor:
        """What arrives of these rows."""
        if self._basis_DR is None:
            return rows_ND
        basis_DR = self._basis_DR.to(rows_ND.dtype)
        return rows_ND @ basis_DR @ basis_DR.t()


class _Travel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, there: Basis, back: Basis, training: bool, replay: bool) -> Tensor:
        ctx.back, ctx.training = back, training
        if training and not replay:
            there.see(rows_ND)
        return there.project(rows_ND)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        if ctx.training:
            ctx.back.see(grads[0])
        return ctx.back.project(grads[0]), None, None, None, None


class InSubspace(nn.Module):
    """A compressor: as many rows, of fewer numbers."""

    def __init__(self, width: int, dims: int) -> None:
        super().__init__()
        self._rows, self._outputs, self._of_rows, self._of_outputs = (Basis(width, dims) for _ in range(4))

    def set_iteration(self, iteration: int, total: int | None = None) -> None:
        if self.training and iteration % EVERY == 0:
            for basis in (self._rows, self._outputs, self._of_rows, self._of_outputs):
                basis.move()

    def sent_rows(self, counts: Tensor) -> Tensor | None:
        return counts

    def compress(self, rows: Rows, p: LayerPass) -> tuple[Tensor, Tensor, Callable[[], Restore]]:
        how = self.training, p.replay
        sent_ND = _Travel.apply(rows.materialise(), self._rows, self._of_rows, *how)

        def restore(out_ND: Tensor) -> Rows:
            return rows.outputs(_Travel.apply(out_ND, self._outputs, self._of_outputs, *how))

        return sent_ND, rows.counts_E, lambda: restore


def basis_bytes(width: int, dims: int) -> float:
    """Per layer and step in bf16: the four bases, which one rank tells the others."""
    return 4 * width * dims * 2 / EVERY
