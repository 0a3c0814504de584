"""GPT: a decoder that predicts the next token, dense or with experts.

Legend: S sequence, B micro-batch, D hidden, V padded vocabulary (`v` the share of this tensor-parallel rank).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lsh.config.config import Config
from megatron_lsh.models.cache import KVCache
from megatron_lsh.models.language_model import LanguageModel, by_sample, positions_of
from megatron_lsh.models.model import WHOLE, StagePass
from megatron_lsh.models.stacks import Stack
from megatron_lsh.models.transformer import SideInputs, TransformerBlock
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.context_parallel import own_positions
from megatron_lsh.parallel.tensor_parallel import gather_vocabulary, vocab_parallel_cross_entropy


def gpt_stacks(cfg: Config) -> tuple[Stack, ...]:
    """The stacks that a GPT of this configuration is made of."""
    return (Stack(cfg, "decoder"),)


class GPTModel(LanguageModel):
    """Embedding, causal transformer block, projection onto the vocabulary. Arguments as those of ``LanguageModel``."""

    def __init__(self, cfg: Config, vocab_size: int, ctx: ParallelContext, telemetry: MoETelemetry) -> None:
        super().__init__(cfg, vocab_size, ctx, telemetry)
        (stack,) = gpt_stacks(cfg)
        self.decoder = TransformerBlock(stack, ctx, telemetry)
        self.chunks = self.decoder.chunks
        self.output_layer = self._build_output_layer()

    def forward(
        self,
        tokens_BS: Tensor,
        labels_BS: Tensor | None = None,
        position_ids_BS: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        stage: StagePass = WHOLE,
    ) -> Tensor | tuple[Tensor, ...]:
        """One forward pass. Under context parallelism tokens, labels and positions are those of the whole sequence, of
        which the model takes this rank's part.

        Args:
            tokens_BS: int64 token ids, the same on all ranks of a tensor-parallel group.
            labels_BS: int64 next tokens.
            position_ids_BS: int64 positions, by default 0..S-1 (``--reset-position-ids`` needs others).
            attention_mask: bool, broadcastable to [B, 1, S, S], True = may attend; on top of causality
                (``document_attention_mask`` for ``--reset-attention-mask``). Under context parallelism with the rows of
                this rank's positions only.
            cache: keys and values of earlier tokens, for generation; told by ``KVCache.place`` where these ones belong. The
                logits are those of a forward pass over all tokens of each row.
            stage: what a pipeline stage runs, see ``Model``; then there must be labels.

        Returns:
            With labels: the cross-entropy of every token of this rank, fp32 [B, S], and the sum of the layers' auxiliary
            losses (fp32 scalar; this rank's share, see ``MoELayer``). Without: logits [B, S, V] in the dtype of the
            computation, gathered over the group.
        """
        positions = positions_of(tokens_BS) if position_ids_BS is None else position_ids_BS
        tokens_BS, positions = own_positions(tokens_BS, self.ctx.cp), own_positions(positions, self.ctx.cp, dim=-1)
        labels_BS = None if labels_BS is None else own_positions(labels_BS, self.ctx.cp)
        side = SideInputs(rotary=self._rotary(positions), attention_mask=attention_mask)
        x_sBD = self._enter(stage, tokens_BS, positions)
        x_sBD, aux_loss = self.decoder(x_sBD, side, cache=cache, chunk=stage.chunk)
        if labels_BS is not None:
            self.telemetry.count_micro_batch(self.chunks[stage.chunk].layers)
            if not self.chunks[stage.chunk].last:
                return torch.zeros_like(labels_BS, dtype=torch.float32), aux_loss, x_sBD
        logits_SBv = self._logits(x_sBD, None if self.output_layer is None else self.output_layer.weight)
        if labels_BS is None:
            return gather_vocabulary(logits_SBv, self.ctx.tp).transpose(0, 1).contiguous()
        loss_SB = vocab_parallel_cross_entropy(logits_SBv, labels_BS.t(), self.ctx.tp)
        return by_sample(loss_SB), aux_loss

    def encode(self, tokens_BS: Tensor, padding_mask_BS: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The decoder's normalized output, for heads other than the projection onto the vocabulary.

        Args:
            tokens_BS: int64 token ids.
            padding_mask_BS: bool, True for real tokens. Padding is neither attended to nor routed.

        Returns:
            hidden [B, S, D], whole and alike on all tensor-parallel ranks (without meaning where there is padding), and
            the sum of the layers' auxiliary losses (fp32 scalar; this rank's share).
        """
        positions = positions_of(tokens_BS)
        x_sBD, aux_loss = self.decoder(self._embed(tokens_BS, positions), self._side(positions, padding_mask_BS))
        return self._whole_sequence(x_sBD).transpose(0, 1), aux_loss

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache for rows of up to `capacity` positions, see ``forward``."""
        return KVCache(self.shape.num_layers, capacity)
