"""Self- and cross-attention with grouped queries, tensor parallel over the heads, context parallel over the queries.

Legend: S sequence (`s` its local share under sequence parallelism), T sequence of the keys (`t` its local share), B
micro-batch, D hidden, G query groups (key/value heads) and H query heads of this tensor-parallel rank, d channels of a head.
Under context parallelism S are the positions of this rank, and T is the whole sequence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias, causal_lower_right

from megatron_lsh.config.model import ModelConfig
from megatron_lsh.errors import ConfigError
from megatron_lsh.models.cache import LayerCache
from megatron_lsh.models.norms import Normalize, build_head_norm
from megatron_lsh.models.recompute import RecomputePlan, recomputed
from megatron_lsh.models.rotary import Rotary
from megatron_lsh.models.shape import ModelShape
from megatron_lsh.moe.experts import output_init
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.context_parallel import gather_positions, own_chunks
from megatron_lsh.parallel.parameters import Init, Matrices
from megatron_lsh.parallel.random import tensor_parallel_rng
from megatron_lsh.parallel.tensor_parallel import ColumnParallelLinear, RowParallelLinear


class _Attention(nn.Module):
    """What both kinds share: sizes, the attention proper and the projection back."""

    def __init__(self, cfg: ModelConfig, ctx: ParallelContext, recompute: RecomputePlan) -> None:
        super().__init__()
        shape = ModelShape.from_config(cfg)
        if shape.query_groups % ctx.tp.size:
            raise ConfigError(
                f"model.num_query_groups ({shape.query_groups}) must be divisible by parallel.tensor_model_parallel_size "
                f"({ctx.tp.size}): change --num-query-groups or --tensor-model-parallel-size"
            )
        self.ctx = ctx
        self.shape = shape
        self.groups = shape.query_groups // ctx.tp.size
        self.heads_per_group = shape.heads // shape.query_groups
        self.head_dim = shape.head_dim
        self.dropout = cfg.attention_dropout
        self.recompute_core = "core_attn" in recompute.modules
        self.recompute_norm = "layernorm" in recompute.modules
        self.bias = cfg.add_bias_linear or cfg.add_qkv_bias
        self.init = Init("normal", cfg.init_method_std)
        self.linear_proj: RowParallelLinear

    def _build_projection(self, cfg: ModelConfig) -> RowParallelLinear:
        """The projection back, which comes after the others among the parameters."""
        width = self.shape.heads * self.head_dim
        return RowParallelLinear(width, self.shape.hidden, self.ctx, init=output_init(cfg), bias=cfg.add_bias_linear)

    def _project(self, linear: nn.Module, norm: Normalize, x_sBD: Tensor) -> Tensor:
        """linear(norm(x)); norm and projection are recomputed together."""

        def project(x: Tensor) -> Tensor:
            return linear(norm(x))  # type: ignore[no-any-return]

        return recomputed(project, x_sBD) if self.recompute_norm else project(x_sBD)

    def _attend(
        self, q_SBHd: Tensor, k_TBGd: Tensor, v_TBGd: Tensor, *, causal: bool, mask: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """Attention and the projection back: [s, B, D]."""
        attention = core_attention if self.ctx.cp.size == 1 else context_parallel_attention

        def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            dropout = self.dropout if self.training else 0.0
            return attention(q, k, v, self.ctx, causal=causal, mask=mask, bias=bias, dropout=dropout)

        heads_SBP = recomputed(core, q_SBHd, k_TBGd, v_TBGd) if self.recompute_core else core(q_SBHd, k_TBGd, v_TBGd)
        return self.linear_proj(heads_SBP)


class SelfAttention(_Attention):
    """softmax(q k^T / sqrt(d)) v over the heads of this rank, with Megatron's packed QKV projection.

    ``linear_qkv.weight`` is [groups * (heads per group + 2) * d, D]: for each group its query heads, then its key head,
    then its value head. Cutting it over tensor-parallel ranks along dim 0 keeps groups whole.
    """

    def __init__(self, cfg: ModelConfig, ctx: ParallelContext, recompute: RecomputePlan) -> None:
        super().__init__(cfg, ctx, recompute)
        shape = self.shape
        packed = shape.query_groups * (self.heads_per_group + 2) * shape.head_dim
        widths = (self.heads_per_group * shape.head_dim, shape.head_dim, shape.head_dim)
        qkv = Matrices(widths, shape.query_groups)
        self.linear_qkv = ColumnParallelLinear(shape.hidden, packed, ctx, init=self.init, bias=self.bias, matrices=qkv)
        self.linear_proj = self._build_projection(cfg)
        if cfg.qk_layernorm:
            self.q_layernorm = build_head_norm(cfg, shape.heads, shape.head_dim, ctx)
            self.k_layernorm = build_head_norm(cfg, shape.query_groups, shape.head_dim, ctx)
        self.qk_layernorm = cfg.qk_layernorm

    def after(
        self,
        norm: Normalize,
        x_sBD: Tensor,
        *,
        rotary: Rotary | None = None,
        causal: bool = True,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Of norm(x): attend and project back, [s, B, D] -> [s, B, D].

        Args:
            rotary: rotation of queries and keys, if positions are rotary.
            causal: a position sees itself and earlier ones only.
            attention_mask: bool, broadcastable to [B, 1, S, T], True = may attend; applied on top of `causal`.
            position_bias: [1, H, S, S], added to the scaled scores (T5's relative positions).
            cache: keys and values of earlier positions, to which those of these tokens are added; it then says which
                position may attend to which, in place of `causal` and `attention_mask`.
        """
        q_SBHd, k_SBGd, v_SBGd = self._unpack(self._project(self.linear_qkv, norm, x_sBD))
        if self.qk_layernorm:
            q_SBHd, k_SBGd = self.q_layernorm(q_SBHd), self.k_layernorm(k_SBGd)
        if rotary is not None:
            q_SBHd, k_SBGd = rotary(q_SBHd), rotary(k_SBGd)
        if cache is not None:
            k_SBGd, v_SBGd, attention_mask = cache.extend(k_SBGd, v_SBGd)
            causal = False
        return self._attend(q_SBHd, k_SBGd, v_SBGd, causal=causal, mask=attention_mask, bias=position_bias)

    def _unpack(self, qkv_SBP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[S, B, G * (H/G + 2) * d] -> queries [S, B, H, d], keys and values [S, B, G, d]."""
        S, B, _ = qkv_SBP.shape
        qkv = qkv_SBP.view(S, B, self.groups, self.heads_per_group + 2, self.head_dim)
        q, k, v = qkv.split((self.heads_per_group, 1, 1), dim=3)
        return q.reshape(S, B, self.groups * self.heads_per_group, self.head_dim), k.squeeze(3), v.squeeze(3)


class CrossAttention(_Attention):
    """Attention of a decoder's positions to an encoder's output. ``--qk-layernorm`` does not apply, as in Megatron-LM.

    ``linear_q.weight`` is [heads * d, D]; ``linear_kv.weight`` [groups * 2 * d, D], for each group its key head, then its
    value head.
    """

    def __init__(self, cfg: ModelConfig, ctx: ParallelContext, recompute: RecomputePlan) -> None:
        super().__init__(cfg, ctx, recompute)
        shape = self.shape
        self.linear_q = ColumnParallelLinear(
            shape.hidden, shape.heads * shape.head_dim, ctx, init=self.init, bias=self.bias
        )
        self.linear_kv = ColumnParallelLinear(
            shape.hidden,
            shape.query_groups * 2 * shape.head_dim,
            ctx,
            init=self.init,
            bias=self.bias,
            matrices=Matrices((shape.head_dim, shape.head_dim), shape.query_groups),
        )
        self.linear_proj = self._build_projection(cfg)

    def after(self, norm: Normalize, x_sBD: Tensor, memory_tBD: Tensor, memory_mask: Tensor | None) -> Tensor:
        """Of norm(x): attend to the memory and project back, [s, B, D] -> [s, B, D].

        Args:
            memory_tBD: the encoder's output; under sequence parallelism, this rank's share.
            memory_mask: bool, broadcastable to [B, 1, S, T], False for padding of the encoder.
        """
        q_SBHd = self._project(self.linear_q, norm, x_sBD).unflatten(-1, (-1, self.head_dim))
        k_TBGd, v_TBGd = self.linear_kv(memory_tBD).unflatten(-1, (self.groups, 2, self.head_dim)).unbind(-2)
        return self._attend(q_SBHd, k_TBGd, v_TBGd, causal=False, mask=memory_mask, bias=None)


def core_attention(
    q_SBHd: Tensor,
    k_TBGd: Tensor,
    v_TBGd: Tensor,
    ctx: ParallelContext,
    *,
    causal: bool,
    mask: Tensor | None,
    dropout: float,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention of H query heads over G key/value heads (G divides H), scaled by 1/sqrt(d); returns [S, B, H * d].

    Args:
        causal: the queries are the last S of the T positions, and each sees the keys up to its own.
        mask: bool, broadcastable to [B, 1, S, T], True = may attend. A query that may attend to nothing yields zeros.
        dropout: share of the attention probabilities to drop.
        bias: broadcastable to [B, H, S, T], added to the scaled scores.
    """
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBHd, k_TBGd, v_TBGd))  # [B, heads, S, d]
    S, T = q.shape[2], k.shape[2]
    if causal and (mask is not None or bias is not None):
        below_ST = torch.ones(S, T, dtype=torch.bool, device=q.device).tril(T - S)
        mask = below_ST if mask is None else mask & below_ST
    nothing: Tensor | None = None
    if mask is not None:  # a row without any key has no softmax: it may see everything here, and is zeroed below
        nothing = ~mask.any(-1, keepdim=True)
        mask = mask | nothing
    scores_mask = mask
    if bias is not None:
        bias = bias.to(q.dtype)
        scores_mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
    elif causal and S < T and mask is None:
        scores_mask = causal_lower_right(S, T)  # which the kernels of a GPU know; is_causal would be upper left
    grouped = q.shape[1] != k.shape[1]
    masked = scores_mask is not None and not isinstance(scores_mask, CausalBias)
    if grouped and q.is_cuda and (masked or q.dtype == torch.float32):
        # Flash attention takes neither, the next best kernel takes no groups, and the one after it stores all scores.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = False

    def attend() -> Tensor:
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=scores_mask,
            dropout_p=dropout,
            is_causal=causal and scores_mask is None,
            enable_gqa=grouped,
        )

    if dropout > 0.0:
        with tensor_parallel_rng(ctx):  # each rank has other heads
            out_BHSd = attend()
    else:
        out_BHSd = attend()
    if nothing is not None:
        out_BHSd = out_BHSd.masked_fill(nothing, 0.0)
    return out_BHSd.permute(2, 0, 1, 3).flatten(2)


def context_parallel_attention(
    q_SBHd: Tensor,
    k_SBGd: Tensor,
    v_SBGd: Tensor,
    ctx: ParallelContext,
    *,
    causal: bool,
    mask: Tensor | None,
    dropout: float,
    bias: Tensor | None = None,
) -> Tensor:
    """``core_attention`` from this rank's positions to those of all ranks of ``ctx.cp``: [S, B, H * d].

    Keys and values travel together; each of the two chunks of queries attends to the keys before its end, and no others.
    Collective.

    Args:
        mask: bool, broadcastable to [B, 1, S, T], with T the whole sequence.
    """
    if bias is not None or not causal:
        raise ValueError("context parallelism is of causal attention without a bias of positions")
    keys_and_values = gather_positions(torch.cat((k_SBGd, v_SBGd), dim=-1), ctx.cp)
    k_TBGd, v_TBGd = keys_and_values.split((k_SBGd.shape[-1], v_SBGd.shape[-1]), dim=-1)
    length = q_SBHd.shape[0] // 2
    outputs = []
    for place, chunk in enumerate(own_chunks(ctx.cp)):
        rows, end = slice(place * length, (place + 1) * length), (chunk + 1) * length
        of_chunk = None if mask is None else mask[..., rows, :end]
        outputs.append(
            core_attention(q_SBHd[rows], k_TBGd[:end], v_TBGd[:end], ctx, causal=True, mask=of_chunk, dropout=dropout)
        )
    return torch.cat(outputs)


def padding_attention_mask(padding_mask_BS: Tensor | None) -> Tensor | None:
    """bool [B, S], True = a real token -> the attention mask [B, 1, 1, S] that hides padding from every query."""
    return None if padding_mask_BS is None else padding_mask_BS[:, None, None, :]


def document_attention_mask(document_ids_BS: Tensor, document_ids_BT: Tensor) -> Tensor:
    """The mask of ``--reset-attention-mask``: bool [B, 1, S, T], True where both positions lie in the same document.

    Causality is left to the attention.

    Args:
        document_ids_BS: of the queries.
        document_ids_BT: of the keys.
    """
    return (document_ids_BS[:, :, None] == document_ids_BT[:, None, :]).unsqueeze(1)
