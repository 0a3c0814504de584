"""What GPT, BERT and T5 share: embedding, positions, masks, the projection onto the vocabulary.

Legend: S sequence (`s` its local share under sequence parallelism), B micro-batch, D hidden, V padded vocabulary
(`v` the share of this tensor-parallel rank).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron_lsh.config.config import Config
from megatron_lsh.models.attention import padding_attention_mask
from megatron_lsh.models.embedding import LanguageModelEmbedding, TiedWordEmbedding
from megatron_lsh.models.model import Model, StagePass
from megatron_lsh.models.rotary import Rotary, rotary_embedding
from megatron_lsh.models.shape import ModelShape
from megatron_lsh.models.transformer import SideInputs
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.parallel.collectives import gather_sequence
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.parameters import Init
from megatron_lsh.parallel.tensor_parallel import ColumnParallelLinear, vocab_parallel_logits


class LanguageModel(Model):
    """The base of all models of language. A subclass adds its stacks of layers and its heads.

    The first pipeline stage has the embedding, the last one the heads, and the word embeddings if they are tied.

    Args:
        cfg: the configuration; parallel settings are not read.
        vocab_size: V, padded (a multiple of the tensor-parallel size); ids from ``cfg.model.vocab_size`` on are padding.
        ctx: groups and device; parameters are this rank's shards.
        telemetry: receives the gauges of the MoE layers.
        num_token_types: kinds of segments that have an embedding of their own.
    """

    def __init__(
        self, cfg: Config, vocab_size: int, ctx: ParallelContext, telemetry: MoETelemetry, num_token_types: int = 0
    ) -> None:
        super().__init__(ctx, telemetry)
        self.cfg = cfg.model
        self.vocab_size = vocab_size
        self.shape = ModelShape.from_config(cfg.model)
        self.is_last_stage = ctx.pp.rank == ctx.pp.size - 1
        self.embedding: nn.Module | None = None
        if ctx.pp.rank == 0:
            self.embedding = LanguageModelEmbedding(cfg.model, vocab_size, ctx, num_token_types)
        elif self.is_last_stage and not cfg.model.untie_embeddings_and_output_weights:
            self.embedding = TiedWordEmbedding(cfg.model, vocab_size, ctx)

    def tied_parameters(self) -> list[Tensor]:
        """The word embeddings, where another stage needs them too."""
        if self.cfg.untie_embeddings_and_output_weights or self.embedding is None or self.ctx.pp.size == 1:
            return []
        return [self._word_embeddings()]

    def _word_embeddings(self) -> Tensor:
        assert isinstance(self.embedding, LanguageModelEmbedding | TiedWordEmbedding)
        return self.embedding.word_embeddings.weight

    def _embed(self, tokens_BS: Tensor, positions: Tensor, token_types_BS: Tensor | None = None) -> Tensor:
        """[s, B, D], see ``LanguageModelEmbedding``."""
        assert self.embedding is not None, "only the first pipeline stage embeds tokens"
        x_sBD: Tensor = self.embedding(tokens_BS, positions, token_types_BS)
        return x_sBD

    def _enter(self, stage: StagePass, *inputs: Any) -> Tensor:
        """What the chunk begins with: the embedding of the tokens, or what arrived."""
        if self.chunks[stage.chunk].first:
            return self._embed(*inputs)
        assert stage.arrived_sBD is not None, "a chunk that is not the first one continues another one's output"
        return stage.arrived_sBD

    def _build_output_layer(self) -> ColumnParallelLinear | None:
        """The projection onto the vocabulary, on the last stage and unless the embedding serves (tied)."""
        if not self.is_last_stage or not self.cfg.untie_embeddings_and_output_weights:
            return None
        init = Init("normal", self.cfg.init_method_std)
        return ColumnParallelLinear(self.shape.hidden, self.vocab_size, self.ctx, bias=False, init=init, matrices=None)

    def _side(self, positions: Tensor, padding_mask_BS: Tensor | None) -> SideInputs:
        """What the layers of a stack get: rotation by position, and masks that hide padding from queries and experts."""
        return SideInputs(
            rotary=self._rotary(positions),
            attention_mask=padding_attention_mask(padding_mask_BS),
            token_mask_sB=self._token_mask(padding_mask_BS),
        )

    def _rotary(self, positions: Tensor) -> Rotary | None:
        if self.cfg.position_embedding_type != "rope":
            return None
        return rotary_embedding(
            positions,
            self.shape.head_dim,
            percent=self.cfg.rotary_percent,
            base=self.cfg.rotary_base,
            interleaved=self.cfg.rotary_interleaved,
        )

    def _token_mask(self, padding_mask_BS: Tensor | None) -> Tensor | None:
        """bool [B, S] -> [s, B]: this rank's share of the sequence."""
        if padding_mask_BS is None:
            return None
        mask_SB = padding_mask_BS.t()
        if self.ctx.sequence_parallel:
            mask_SB = mask_SB.chunk(self.ctx.tp.size)[self.ctx.tp.rank]
        return mask_SB.contiguous()

    def _whole_sequence(self, x_sBD: Tensor) -> Tensor:
        """[s, B, D] -> [S, B, D], for what every tensor-parallel rank then computes alike."""
        return gather_sequence(x_sBD, self.ctx.tp) if self.ctx.sequence_parallel else x_sBD

    def _logits(self, x_sBD: Tensor, weight: Tensor | None = None, bias_v: Tensor | None = None) -> Tensor:
        """[s, B, D] -> this rank's logits [S, B, v], by the output layer's `weight`, or else the embedding's."""
        weight = self._word_embeddings() if weight is None else weight
        logits_SBv = vocab_parallel_logits(x_sBD, weight, self.ctx)
        return self._without_padding(logits_SBv if bias_v is None else logits_SBv + bias_v)

    def _without_padding(self, logits_SBv: Tensor) -> Tensor:
        """Give the ids that only pad the vocabulary no probability.

        How many there are depends on the tensor-parallel size, and with them in the softmax the loss would too. (Megatron
        leaves them in.) In place: the projection's backward does not read its output.
        """
        width = logits_SBv.shape[-1]
        first = (self.cfg.vocab_size or self.vocab_size) - self.ctx.tp.rank * width
        if first < width:
            logits_SBv[..., max(first, 0) :] = float("-inf")
        return logits_SBv


def by_sample(x_SB: Tensor) -> Tensor:
    """[S, B] -> [B, S] in memory of its own. (``contiguous`` leaves a view if B is 1, of which ``fully_shard`` warns.)"""
    return x_SB.t().clone(memory_format=torch.contiguous_format)


def positions_of(tokens_BS: Tensor) -> Tensor:
    """0..S-1, int64, where the tokens are."""
    return torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
