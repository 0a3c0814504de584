"""The transformer block shared by all models: self- and cross-attention, dense or MoE feed-forward, recomputation.

Legend: S sequence (`s` its local share under sequence parallelism), B micro-batch, D hidden, T sequence of the encoder that
a decoder reads (`t` its local share), H heads of this tensor-parallel rank.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from megatron_lsh.config.config import Config
from megatron_lsh.models.attention import CrossAttention, SelfAttention
from megatron_lsh.models.cache import KVCache, LayerCache
from megatron_lsh.models.feed_forward import DenseFeedForward, MoEFeedForward
from megatron_lsh.models.norms import Normalize, build_norm
from megatron_lsh.models.recompute import RecomputePlan
from megatron_lsh.models.rotary import Rotary
from megatron_lsh.models.shape import ModelShape
from megatron_lsh.models.stacks import Stack
from megatron_lsh.moe.layer import declare_gauges
from megatron_lsh.moe.layer_pass import ReplayMemo
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.parallel.context import ParallelContext


class SideInputs(NamedTuple):
    """What every layer of a stack gets besides its input.

    A tuple, because ``fully_shard`` looks in the arguments of a layer for tensors that need gradients, and finds
    them in tuples.

    Attributes:
        rotary, attention_mask, position_bias: see ``SelfAttention.after``.
        token_mask_sB: bool, False for padding, which no expert sees; like the activation cut over the sequence.
        memory_tBD, memory_mask: what cross-attention reads, see ``CrossAttention.after``.
    """

    rotary: Rotary | None = None
    attention_mask: Tensor | None = None
    position_bias: Tensor | None = None
    token_mask_sB: Tensor | None = None
    memory_tBD: Tensor | None = None
    memory_mask: Tensor | None = None


class TransformerLayer(nn.Module):
    """x + dropout(f(norm(x))) for f the self-attention, the cross-attention of a decoder that reads an encoder, and the
    feed-forward layer; with ``--apply-residual-connection-post-layernorm`` y + dropout(f(y)) with y = norm(x).

    The latter is the original BERT (Devlin et al., arXiv:1810.04805), norm(x + f(x)): the same computation, each norm
    counted with the sub-layer after it, the embedding's with the first layer, and the last one as the final norm.

    One unit of ``fully_shard``. `layer` counts from 0 over all stacks of the model; with `moe` the feed-forward layer is a
    mixture of experts.
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
        causal: bool = True,
        cross_attention: bool = False,
    ) -> None:
        super().__init__()
        hidden = ModelShape.from_config(cfg.model).hidden
        self.input_layernorm = build_norm(cfg.model, hidden, ctx)
        self.self_attention = SelfAttention(cfg.model, ctx, recompute)
        self.cross_attention: CrossAttention | None = None
        if cross_attention:
            self.pre_cross_attn_layernorm = build_norm(cfg.model, hidden, ctx)
            self.cross_attention = CrossAttention(cfg.model, ctx, recompute)
        self.pre_mlp_layernorm = build_norm(cfg.model, hidden, ctx)
        self.mlp: DenseFeedForward | MoEFeedForward = (
            MoEFeedForward(cfg, ctx, layer, telemetry, recompute) if moe else DenseFeedForward(cfg, ctx, recompute)
        )
        self.dropout = nn.Dropout(cfg.model.hidden_dropout)
        self.causal = causal
        self.residual_after_norm = cfg.model.apply_residual_connection_post_layernorm

    def forward(
        self, x_sBD: Tensor, side: SideInputs, memo: ReplayMemo | None = None, cache: LayerCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the new activation [s, B, D] and the auxiliary loss (fp32 scalar; zero in a dense layer).

        Args:
            memo: given when the caller recomputes this layer as a whole.
            cache: see ``SelfAttention.after``.
        """
        x_sBD, norm = self._enter(self.input_layernorm, x_sBD)
        attended_sBD = self.self_attention.after(
            norm,
            x_sBD,
            rotary=side.rotary,
            causal=self.causal,
            attention_mask=side.attention_mask,
            position_bias=side.position_bias,
            cache=cache,
        )
        x_sBD = x_sBD + self.dropout(attended_sBD)
        if self.cross_attention is not None:
            assert side.memory_tBD is not None
            x_sBD, norm = self._enter(self.pre_cross_attn_layernorm, x_sBD)
            attended_sBD = self.cross_attention.after(norm, x_sBD, side.memory_tBD, side.memory_mask)
            x_sBD = x_sBD + self.dropout(attended_sBD)
        x_sBD, norm = self._enter(self.pre_mlp_layernorm, x_sBD)
        y_sBD, aux_loss = self.mlp.after(norm, x_sBD, side.token_mask_sB, memo)
        return x_sBD + self.dropout(y_sBD), aux_loss

    def _enter(self, norm: nn.Module, x_sBD: Tensor) -> tuple[Tensor, Normalize]:
        """What goes past the next sub-layer, and how its input is made of that."""
        return (norm(x_sBD), _unchanged) if self.residual_after_norm else (x_sBD, norm)


def _unchanged(x: Tensor) -> Tensor:
    return x


class TransformerBlock(nn.Module):
    """The layers of a stack that this pipeline stage holds, and the norm after the last one if it is among them.

    Args:
        stack: which stack; everything but the parallel settings of its configuration is read.
        ctx: groups and device.
        telemetry: receives the gauges of the MoE layers.
    """

    def __init__(self, stack: Stack, ctx: ParallelContext, telemetry: MoETelemetry) -> None:
        super().__init__()
        cfg, moe_pattern = stack.cfg, stack.moe_pattern()
        self.chunks = ctx.stages.of_rank(ctx.pp.rank, stack.num_layers)
        # As in Megatron-LM, each chunk recomputes so many of its layers.
        self.plans = [RecomputePlan.from_config(cfg.recompute, cfg.moe, len(chunk.layers)) for chunk in self.chunks]
        # By number, so that a block that holds some of the layers only has the same names for them.
        self.layers = nn.ModuleDict(
            {
                str(layer): TransformerLayer(
                    cfg,
                    ctx,
                    stack.first_layer + layer,
                    moe=moe_pattern[layer],
                    telemetry=telemetry,
                    recompute=RecomputePlan() if place < plan.full_layers else plan,
                    causal=stack.causal,
                    cross_attention=stack.memory_length > 0,
                )
                for chunk, plan in zip(self.chunks, self.plans, strict=True)
                for place, layer in enumerate(chunk.layers)
            }
        )
        if any(moe_pattern) and not any(moe_pattern[int(layer)] for layer in self.layers):
            declare_gauges(cfg.model, cfg.moe, cfg.lsh, ctx, telemetry)
        self.final_layernorm: nn.Module | None = None
        if self.chunks[-1].last:
            self.final_layernorm = build_norm(cfg.model, stack.shape.hidden, ctx)

    def forward(
        self, x_sBD: Tensor, side: SideInputs | None = None, cache: KVCache | None = None, chunk: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Returns the output [s, B, D], normalized after the last layer, and the sum of the layers' auxiliary losses (fp32
        scalar).

        The `cache` is that of all layers; `chunk` says which of this rank's chunks runs.
        """
        side = side or SideInputs()

        def run_layer(layer: int, x: Tensor, memo: ReplayMemo | None) -> tuple[Tensor, Tensor]:
            kept = None if cache is None else cache.layers[layer]
            output: tuple[Tensor, Tensor] = self.layers[str(layer)](x, side, memo=memo, cache=kept)
            return output

        held = self.chunks[chunk]
        x_sBD, total = self.plans[chunk].run(held.layers, run_layer, x_sBD)
        return self.final_layernorm(x_sBD) if held.last and self.final_layernorm is not None else x_sBD, total
