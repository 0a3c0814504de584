"""GPT: a decoder that predicts the next token, dense or with experts.

Legend: S sequence (`s` its local share under sequence parallelism), B micro-batch, D hidden, V padded vocabulary
(`v` the share of this tensor-parallel rank).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_lsh.config.config import Config
from megatron_lsh.models.cache import KVCache
from megatron_lsh.models.embedding import LanguageModelEmbedding
from megatron_lsh.models.rotary import Rotary, rotary_embedding
from megatron_lsh.models.shape import ModelShape
from megatron_lsh.models.transformer import TransformerBlock
from megatron_lsh.moe.layer import MoELayer
from megatron_lsh.moe.router import update_expert_biases
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.parameters import Init, initialize_parameters
from megatron_lsh.parallel.tensor_parallel import (
    ColumnParallelLinear,
    gather_vocabulary,
    vocab_parallel_cross_entropy,
    vocab_parallel_logits,
)


class GPTModel(nn.Module):
    """Embedding, causal transformer block, projection onto the vocabulary.

    Args:
        cfg: the parts model, moe, lsh and recompute are read.
        vocab_size: V, padded (a multiple of the tensor-parallel size); ids from ``cfg.model.vocab_size`` on are padding.
        ctx: groups and device; parameters are this rank's shards.
        telemetry: receives the gauges of the MoE layers.
    """

    def __init__(self, cfg: Config, vocab_size: int, ctx: ParallelContext, telemetry: MoETelemetry) -> None:
        super().__init__()
        self.cfg = cfg.model
        self.ctx = ctx
        self.telemetry = telemetry
        self.vocab_size = vocab_size
        self.shape = ModelShape.from_config(cfg.model)
        self.embedding = LanguageModelEmbedding(cfg.model, vocab_size, ctx)
        self.decoder = TransformerBlock(cfg, ctx, telemetry)
        self.output_layer: ColumnParallelLinear | None = None
        if cfg.model.untie_embeddings_and_output_weights:
            self.output_layer = ColumnParallelLinear(
                self.shape.hidden, vocab_size, ctx, bias=False, init=Init("normal", cfg.model.init_method_std)
            )

    def forward(
        self,
        tokens_BS: Tensor,
        labels_BS: Tensor | None = None,
        position_ids_BS: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """One forward pass.

        Args:
            tokens_BS: int64 token ids, the same on all ranks of a tensor-parallel group.
            labels_BS: int64 next tokens.
            position_ids_BS: int64 positions, by default 0..S-1 (``--reset-position-ids`` needs others).
            attention_mask: bool, broadcastable to [B, 1, S, S], True = may attend; on top of causality
                (``document_attention_mask`` for ``--reset-attention-mask``).
            cache: keys and values of earlier tokens, for generation; told by ``KVCache.place`` where these ones belong. The
                logits are those of a forward pass over all tokens of each row.

        Returns:
            With labels: the cross-entropy of every token, fp32 [B, S], and the sum of the layers' auxiliary losses (fp32
            scalar; this rank's share, see ``MoELayer``). Without: logits [B, S, V] in the dtype of the
            computation, gathered over the group.
        """
        positions = position_ids_BS
        if positions is None:
            positions = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
        x_sBD, aux_loss = self.decoder(
            self.embedding(tokens_BS, positions),
            rotary=self._rotary(positions),
            attention_mask=attention_mask,
            cache=cache,
        )
        logits_SBv = self._logits(x_sBD)
        if labels_BS is None:
            return gather_vocabulary(logits_SBv, self.ctx.tp).transpose(0, 1).contiguous()
        self.telemetry.count_micro_batch()
        loss_SB = vocab_parallel_cross_entropy(logits_SBv, labels_BS.t(), self.ctx.tp)
        return loss_SB.t().contiguous(), aux_loss

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache for rows of up to `capacity` positions, see ``forward``."""
        return KVCache(self.shape.num_layers, capacity)

    def moe_layers(self) -> list[MoELayer]:
        """The mixture-of-experts layers, in order."""
        return [module for module in self.modules() if isinstance(module, MoELayer)]

    def set_iteration(self, iteration: int, total: int | None = None) -> None:
        """Tell the MoE layers which iteration begins (0-based), and of how many; the LSH schedules count them."""
        for layer in self.moe_layers():
            layer.set_iteration(iteration, total)

    def update_expert_bias(self) -> None:
        """After an optimizer step: move the balancing biases of the routers by the load since the last call."""
        update_expert_biases([layer.router for layer in self.moe_layers()], self.ctx)

    def discard_expert_load(self) -> None:
        """After a skipped optimizer step: forget the load of its micro-batches."""
        for layer in self.moe_layers():
            layer.router.discard_counts()

    def _rotary(self, positions: Tensor) -> Rotary | None:
        if self.cfg.position_embedding_type != "rope":
            return None
        return rotary_embedding(
            positions, self.shape.head_dim, percent=self.cfg.rotary_percent, base=self.cfg.rotary_base
        )

    def _logits(self, x_sBD: Tensor) -> Tensor:
        """[s, B, D] -> this rank's logits [S, B, v]."""
        source = self.embedding.word_embeddings if self.output_layer is None else self.output_layer
        return self._without_padding(vocab_parallel_logits(x_sBD, source.weight, self.ctx))

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


def build_gpt(cfg: Config, vocab_size: int, ctx: ParallelContext, telemetry: MoETelemetry) -> GPTModel:
    """A GPT with fresh weights on ``ctx.device``: a pure function of ``cfg`` and its seed, whatever the layout.

    Args:
        vocab_size: padded vocabulary V.

    Raises:
        ConfigError: for sizes that are missing or do not fit together.
    """
    model = GPTModel(cfg, vocab_size, ctx, telemetry)
    initialize_parameters(model, cfg.training.seed)
    return model
