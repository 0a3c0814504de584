"""The cosine router of Tutel (``cosine_top``, arXiv:2206.03382), after Chi et al., arXiv:2204.09179.

Shapes: T tokens, D features, P width of the projection, E experts.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.parameters import Init, local, parameter

WIDTH = 256
"""P"""
SHARPEST = math.log(100.0)
"""largest log of the inverse temperature"""


class CosineGate(nn.Module):
    """exp(min(t, ln 100)) cos(W x + b, v_e): the logit of expert e for the token x. None of its parameters decays.

    Parameters: ``projector_weight`` [P, D], ``projector_bias`` [P], ``vectors`` [P, E], ``temperature`` [1], which is t and
    starts at ln 2.
    """

    def __init__(self, hidden: int, num_experts: int, ctx: ParallelContext, init: Init) -> None:
        super().__init__()
        self.projector_weight = parameter((WIDTH, hidden), ctx, init=init, decays=False)
        self.projector_bias = parameter((WIDTH,), ctx, init=Init("zeros"))
        self.vectors = parameter((WIDTH, num_experts), ctx, init=Init("normal", 0.01), decays=False)
        self.temperature = parameter((1,), ctx, init=Init("constant", value=math.log(2.0)))

    def forward(self, x_TD: Tensor, dtype: torch.dtype, partial_grad: bool) -> Tensor:
        """[T, D] -> [T, E] in `dtype`. `partial_grad`: the ranks of a tensor-parallel group hold different tokens."""
        weight, bias, vectors, temperature = (
            local(p, partial_grad=partial_grad).to(dtype)
            for p in (self.projector_weight, self.projector_bias, self.vectors, self.temperature)
        )
        projected_TP = F.normalize(F.linear(x_TD.to(dtype), weight, bias), dim=1)
        cosines_TE: Tensor = projected_TP @ F.normalize(vectors, dim=0)
        return cosines_TE * temperature.clamp(max=SHARPEST).exp()
