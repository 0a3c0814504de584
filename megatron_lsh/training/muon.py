"""Muon: the momentum of a matrix, made orthogonal, is its update (Jordan et al., kellerjordan.github.io/posts/muon).

Matrices are those that a layer declares as such (``Matrices`` in parallel/parameters.py): the experts' of a layer as one
stack, gate and up, and queries, keys and values, each for itself. All other parameters (embeddings, output layer, router,
norms, biases) are AdamW's. Names and formulas are Megatron-LM's, where NVIDIA's Emerging-Optimizers compute them.

Legend: M matrices of a stack, R rows (out), D columns (in).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from megatron_lsh.parallel.parameters import Matrices, local

QUINTIC = (3.4445, -4.7750, 2.0315)
"""coefficients of x, x³ and x⁵: the steepest at 0 that keep singular values near 1 (Jordan et al.)"""
SCALES: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda rows, columns: max(rows, columns) ** 0.5,
    "unit_rms_norm": lambda rows, columns: (rows / columns) ** 0.5,
    "shape_scaling": lambda rows, columns: max(1.0, rows / columns) ** 0.5,
}


@dataclass(frozen=True)
class MuonRule:
    """What is done to a matrix, apart from learning rate and weight decay."""

    momentum: float = 0.95
    nesterov: bool = False
    scale_mode: str = "spectral"
    extra_scale_factor: float = 1.0
    steps: int = 5
    dtype: torch.dtype = torch.float32
    """that matrices are multiplied in"""

    def update(self, momentum_MRD: Tensor, matrices: Matrices) -> Tensor:
        """The orthogonal update for whole matrices, [..., R, D] -> fp32 of the same shape."""
        columns = momentum_MRD.shape[-1]
        blocks = momentum_MRD.unflatten(-2, (matrices.groups, -1)).split(matrices.rows(momentum_MRD.shape[-2]), dim=-2)
        done = []
        for block in blocks:  # of each, the rows of all groups are one matrix
            rows = block.flatten(-3, -2)
            scale = SCALES[self.scale_mode](rows.shape[-2], columns) * self.extra_scale_factor
            done.append((orthogonalize(rows, self.steps, self.dtype) * scale).view(block.shape))
        return torch.cat(done, dim=-2).flatten(-3, -2)


def orthogonalize(x_MRD: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """About U V^T of each matrix U S V^T of a stack [..., R, D], by Newton-Schulz iteration; fp32.

    Singular values end near 1 (0.7 to 1.2 in five steps), unless they were below a thousandth of the matrix's norm.
    """
    a, b, c = QUINTIC
    x = x_MRD.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.float().norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if tall else x).float()


class Muon(torch.optim.AdamW):
    """Muon on the groups with ``"muon": True``, torch's fused AdamW on the others.

    The momentum is sharded as the parameter is. A matrix that is cut over ranks is gathered, made orthogonal by each of
    these ranks alike, and each keeps its part: the update is that of one rank. Experts stay where they are, a batch per
    layer.
    """

    def __init__(self, groups: list[dict[str, Any]], rule: MuonRule, **adam: Any) -> None:
        super().__init__(groups, fused=True, **adam)
        self.rule = rule

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update. Collective; a closure is not supported."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["muon"]]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(parameter, local(parameter.grad), group["lr"], group["weight_decay"])

    def _update(self, parameter: Tensor, gradient: Tensor, lr: float, weight_decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)  # AdamW asks for it when a checkpoint is loaded
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["step"] += 1
        momentum = local(state["momentum_buffer"])
        momentum.lerp_(gradient, 1.0 - self.rule.momentum)
        smooth = gradient.lerp(momentum, self.rule.momentum) if self.rule.nesterov else momentum
        update = self._of_whole_matrices(parameter, smooth)
        local(parameter).mul_(1.0 - lr * weight_decay).add_(update, alpha=-lr)

    def _of_whole_matrices(self, parameter: Tensor, mine: Tensor) -> Tensor:
        """This rank's part of the update, from its part of the momentum."""
        matrices: Matrices = parameter.matrices  # type: ignore[attr-defined]
        if not isinstance(parameter, DTensor):
            return self.rule.update(mine, matrices)
        mesh, cut = parameter.device_mesh, parameter.placements
        # What is cut between matrices stays so; what is cut through them is gathered.
        whole = [p if isinstance(p, Shard) and p.dim < parameter.ndim - 2 else Replicate() for p in cut]

        def spread(tensor: Tensor, placements: Sequence[Placement]) -> DTensor:
            return DTensor.from_local(
                tensor, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
            )

        update = self.rule.update(spread(mine, cut).redistribute(placements=whole).to_local(), matrices)
        return spread(update, whole).redistribute(placements=cut).to_local()
