"""The dense feed-forward layer, tensor parallel over its width.

Legend: S sequence (`s` its local share under sequence parallelism), B micro-batch, D hidden, F width on this rank.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lsh.config.model import ModelConfig
from megatron_lsh.models.shape import ModelShape
from megatron_lsh.moe.experts import output_init
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.parameters import Init
from megatron_lsh.parallel.tensor_parallel import ColumnParallelLinear, RowParallelLinear


class MLP(nn.Module):
    """GELU: W2 gelu(W1 x). SwiGLU: W2 (silu(W_gate x) * W_up x) (Shazeer, arXiv:2002.05202).

    ``linear_fc1.weight`` is [F, D], or [2, F, D] with gate and up stacked for SwiGLU, so that a tensor-parallel cut
    along F gives each rank matching parts of both.
    """

    def __init__(self, cfg: ModelConfig, ctx: ParallelContext) -> None:
        super().__init__()
        shape = ModelShape.from_config(cfg)
        self.swiglu = cfg.swiglu
        self.approximate = "tanh" if cfg.openai_gelu else "none"
        self.linear_fc1 = ColumnParallelLinear(
            shape.hidden,
            shape.ffn,
            ctx,
            init=Init("normal", cfg.init_method_std),
            bias=cfg.add_bias_linear,
            gated=cfg.swiglu,
        )
        self.linear_fc2 = RowParallelLinear(
            shape.ffn, shape.hidden, ctx, init=output_init(cfg), bias=cfg.add_bias_linear and cfg.add_bias_fc2
        )

    def forward(self, x_sBD: Tensor) -> Tensor:
        """[s, B, D] -> [s, B, D]"""
        return self.contract(self.linear_fc1(x_sBD))

    def contract(self, h: Tensor) -> Tensor:
        """Everything after the first projection, whose output `h` is [S, B, F] or, for SwiGLU, [S, B, 2, F]."""
        if self.swiglu:
            gate_SBF, up_SBF = h.unbind(dim=-2)
            return self.linear_fc2(F.silu(gate_SBF) * up_SBF)
        return self.linear_fc2(F.gelu(h, approximate=self.approximate))
