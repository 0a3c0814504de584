"""The pre-norm transformer block shared by all models: attention, dense or MoE feed-forward, recomputation.

Legend: S sequence (`s` its local share under sequence parallelism), B micro-batch, D hidden.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from megatron_lsh.config.config import Config
from megatron_lsh.config.layer_pattern import moe_layer_pattern
from megatron_lsh.models.attention import SelfAttention
from megatron_lsh.models.cache import KVCache, LayerCache
from megatron_lsh.models.mlp import MLP
from megatron_lsh.models.norms import build_norm
from megatron_lsh.models.recompute import RecomputePlan, recomputed
from megatron_lsh.models.rotary import Rotary
from megatron_lsh.models.shape import ModelShape
from megatron_lsh.moe.layer import MoELayer
from megatron_lsh.moe.memo import ReplayMemo
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.parallel.context import ParallelContext


def moe_layers(cfg: Config) -> list[int]:
    """Numbers, from 0, of the layers that are mixtures of experts. Raises ConfigError for an impossible pattern."""
    if cfg.moe.num_experts is None:
        return []
    pattern = moe_layer_pattern(cfg.moe.moe_layer_freq, ModelShape.from_config(cfg.model).num_layers)
    return [layer for layer, moe in enumerate(pattern) if moe]


class TransformerLayer(nn.Module):
    """x + dropout(attention(norm(x))), then x + dropout(feed-forward(norm(x))).

    One unit of ``fully_shard``. `layer` counts from 0; with `moe` the feed-forward layer is a mixture of experts.
    """

    fsdp_unit = True

    def __init__(
        self,
        cfg: Config,
        ctx: ParallelContext,
        layer: int,
        *,
        moe: bool,
        telemetry: MoETelemetry,
        recompute: RecomputePlan,
    ) -> None:
        super().__init__()
        hidden = ModelShape.from_config(cfg.model).hidden
        self.input_layernorm = build_norm(cfg.model, hidden, ctx)
        self.self_attention = SelfAttention(cfg.model, ctx, recompute)
        self.pre_mlp_layernorm = build_norm(cfg.model, hidden, ctx)
        self.mlp: MLP | MoELayer = (
            MoELayer(cfg.model, cfg.moe, cfg.lsh, ctx, layer, telemetry) if moe else MLP(cfg.model, ctx)
        )
        self.dropout = nn.Dropout(cfg.model.hidden_dropout)
        self.recompute_norms = "layernorm" in recompute.modules
        self.recompute_mlp = ("moe" if moe else "mlp") in recompute.modules

    def forward(
        self,
        x_sBD: Tensor,
        *,
        rotary: Rotary | None = None,
        causal: bool = True,
        attention_mask: Tensor | None = None,
        token_mask_sB: Tensor | None = None,
        memo: ReplayMemo | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the new activation [s, B, D] and the auxiliary loss (fp32 scalar; zero in a dense layer).

        Args:
            rotary, causal, attention_mask, cache: see ``SelfAttention.attend``.
            token_mask_sB: bool, False for padding that experts need not see.
            memo: given when the caller recomputes this layer as a whole.
        """
        qkv_SBP = self._project_qkv(x_sBD)
        attended_sBD = self.self_attention.attend(
            qkv_SBP, rotary=rotary, causal=causal, attention_mask=attention_mask, cache=cache
        )
        x_sBD = x_sBD + self.dropout(attended_sBD)
        y_sBD, aux_loss = self._feed_forward(x_sBD, token_mask_sB, memo)
        return x_sBD + self.dropout(y_sBD), aux_loss

    def _project_qkv(self, x_sBD: Tensor) -> Tensor:
        def project(x: Tensor) -> Tensor:
            return self.self_attention.linear_qkv(self.input_layernorm(x))

        return recomputed(project, x_sBD) if self.recompute_norms else project(x_sBD)

    def _feed_forward(
        self, x_sBD: Tensor, token_mask_sB: Tensor | None, memo: ReplayMemo | None
    ) -> tuple[Tensor, Tensor]:
        mlp = self.mlp
        if isinstance(mlp, MoELayer):
            if self.recompute_mlp and memo is None:
                memo = ReplayMemo()

            def experts(x: Tensor) -> tuple[Tensor, Tensor]:
                return mlp(self.pre_mlp_layernorm(x), token_mask_sB, memo)

            return recomputed(experts, x_sBD) if self.recompute_mlp else experts(x_sBD)

        def expand(x: Tensor) -> Tensor:
            return mlp.linear_fc1(self.pre_mlp_layernorm(x))

        def dense(x: Tensor) -> Tensor:
            return mlp.contract(expand(x))

        if self.recompute_mlp:
            y_sBD = recomputed(dense, x_sBD)
        elif self.recompute_norms:
            y_sBD = mlp.contract(recomputed(expand, x_sBD))
        else:
            y_sBD = dense(x_sBD)
        return y_sBD, x_sBD.new_zeros((), dtype=torch.float32)


class TransformerBlock(nn.Module):
    """All layers and the norm after the last one.

    Args:
        cfg: everything but the parallel settings is read from here.
        ctx: groups and device.
        telemetry: receives the gauges of the MoE layers.
    """

    def __init__(self, cfg: Config, ctx: ParallelContext, telemetry: MoETelemetry) -> None:
        super().__init__()
        shape = ModelShape.from_config(cfg.model)
        self.plan = RecomputePlan.from_config(cfg.recompute, cfg.moe, shape.num_layers)
        moe_L = moe_layers(cfg)
        self.layers = nn.ModuleList(
            TransformerLayer(
                cfg,
                ctx,
                layer,
                moe=layer in moe_L,
                telemetry=telemetry,
                recompute=RecomputePlan() if layer < self.plan.full_layers else self.plan,
            )
            for layer in range(shape.num_layers)
        )
        self.final_layernorm = build_norm(cfg.model, shape.hidden, ctx)

    def forward(
        self,
        x_sBD: Tensor,
        *,
        rotary: Rotary | None = None,
        causal: bool = True,
        attention_mask: Tensor | None = None,
        token_mask_sB: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the normalized output [s, B, D] and the sum of the layers' auxiliary losses (fp32 scalar).

        Arguments as in ``TransformerLayer.forward``; the `cache` is that of all layers.
        """

        def run(x: Tensor, layers: range, memos: dict[int, ReplayMemo]) -> tuple[Tensor, Tensor]:
            total = x.new_zeros((), dtype=torch.float32)
            for layer in layers:
                x, aux_loss = self.layers[layer](
                    x,
                    rotary=rotary,
                    causal=causal,
                    attention_mask=attention_mask,
                    token_mask_sB=token_mask_sB,
                    memo=memos.get(layer),
                    cache=None if cache is None else cache.layers[layer],
                )
                total = total + aux_loss
            return x, total

        total = x_sBD.new_zeros((), dtype=torch.float32)
        for layers, full in self.plan.chunks(len(self.layers)):
            if full:
                memos = {layer: ReplayMemo() for layer in layers}
                x_sBD, aux_loss = recomputed(partial(run, layers=layers, memos=memos), x_sBD)
            else:
                x_sBD, aux_loss = run(x_sBD, layers, {})
            total = total + aux_loss
        return self.final_layernorm(x_sBD), total
