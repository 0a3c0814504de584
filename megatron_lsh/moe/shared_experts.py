"""The shared expert: a feed-forward network that every token visits besides its routed experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lsh.config.model import ModelConfig
from megatron_lsh.config.moe import MoEConfig
from megatron_lsh.errors import ConfigError
from megatron_lsh.moe.experts import activate, output_init
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.parameters import Init, local, parameter
from megatron_lsh.parallel.tensor_parallel import ColumnParallelLinear, RowParallelLinear


class SharedExperts(nn.Module):
    """``fc2(activation(fc1(x)))``, times ``sigmoid(gate_weight . x)`` with ``moe_shared_expert_gate``.

    Split over the tensor-parallel group like any dense feed-forward network. DeepSeekMoE (arXiv 2401.06066, section 3.2);
    the gate is Qwen2-MoE's (arXiv 2407.10671).

    Parameters: ``linear_fc1``, ``linear_fc2`` (see tensor_parallel.py), ``gate_weight`` [1, D].
    """

    def __init__(self, model_cfg: ModelConfig, moe_cfg: MoEConfig, ctx: ParallelContext) -> None:
        super().__init__()
        hidden, width = model_cfg.hidden_size, moe_cfg.moe_shared_expert_intermediate_size
        if hidden is None or width is None:
            raise ConfigError("a shared expert needs --hidden-size and --moe-shared-expert-intermediate-size")
        init, bias = Init("normal", model_cfg.init_method_std), model_cfg.add_bias_linear
        self._model_cfg = model_cfg
        self._split_tokens = ctx.sequence_parallel
        self.linear_fc1 = ColumnParallelLinear(hidden, width, ctx, init=init, bias=bias, gated=model_cfg.swiglu)
        self.linear_fc2 = RowParallelLinear(width, hidden, ctx, init=output_init(model_cfg), bias=bias)
        self.gate_weight = parameter((1, hidden), ctx, init=init) if moe_cfg.moe_shared_expert_gate else None

    def forward(self, x_SBD: Tensor) -> Tensor:
        """x_SBD -> y_SBD, both in this rank's share of the sequence under sequence parallelism."""
        hidden = self.linear_fc1(x_SBD).flatten(2)  # SwiGLU: [S, B, 2, F] -> [gate; up]
        y_SBD = self.linear_fc2(activate(hidden, self._model_cfg))
        if self.gate_weight is not None:
            gate_weight = local(self.gate_weight, partial_grad=self._split_tokens)
            y_SBD = y_SBD * torch.sigmoid(F.linear(x_SBD, gate_weight))
        return y_SBD
