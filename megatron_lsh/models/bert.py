"""BERT and RoBERTa: an encoder that predicts masked tokens, and which of two segments comes first; dense or with experts.

Devlin et al., arXiv:1810.04805; Liu et al., arXiv:1907.11692 (without second segment). Parameters have
Megatron-LM's names.

Legend: S sequence (`s` its local share under sequence parallelism), B micro-batch, D hidden, V padded vocabulary
(`v` the share of this tensor-parallel rank).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lsh.config.bert import BertConfig
from megatron_lsh.config.model import ModelConfig
from megatron_lsh.models.language_model import LanguageModel, by_sample, positions_of
from megatron_lsh.models.model import WHOLE, StagePass
from megatron_lsh.models.norms import build_norm
from megatron_lsh.models.shape import ModelShape
from megatron_lsh.models.stacks import Stack
from megatron_lsh.models.transformer import TransformerBlock
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.parameters import Init, local, parameter
from megatron_lsh.parallel.tensor_parallel import gather_vocabulary, vocab_parallel_cross_entropy

SEGMENTS = 2


def bert_stacks(cfg: BertConfig) -> tuple[Stack, ...]:
    """The stacks that a BERT of this configuration is made of."""
    return (Stack(cfg, "encoder", causal=False),)


class Dense(nn.Module):
    """A linear layer that every tensor-parallel rank holds in full: ``weight`` [out, in], ``bias`` [out].

    Args:
        sharded_input: the ranks apply it to different parts of the sequence.
    """

    def __init__(
        self, in_features: int, out_features: int, ctx: ParallelContext, init: Init, *, sharded_input: bool = False
    ) -> None:
        super().__init__()
        self.sharded_input = sharded_input
        self.weight = parameter((out_features, in_features), ctx, init=init)
        self.bias = parameter((out_features,), ctx, init=Init("zeros"))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        return F.linear(x, *(local(p, partial_grad=self.sharded_input) for p in (self.weight, self.bias)))


class BertLMHead(nn.Module):
    """norm(gelu(W x + b)), what is projected onto the vocabulary: [s, B, D] -> [s, B, D]."""

    def __init__(self, cfg: ModelConfig, ctx: ParallelContext) -> None:
        super().__init__()
        hidden = ModelShape.from_config(cfg).hidden
        init = Init("normal", cfg.init_method_std)
        self.approximate = "tanh" if cfg.openai_gelu else "none"
        self.dense = Dense(hidden, hidden, ctx, init, sharded_input=ctx.sequence_parallel)
        self.layer_norm = build_norm(cfg, hidden, ctx)

    def forward(self, x_sBD: Tensor) -> Tensor:
        x: Tensor = self.layer_norm(F.gelu(self.dense(x_sBD), approximate=self.approximate))
        return x


class Pooler(nn.Module):
    """tanh(W x + b) of the first token: [S, B, D], the whole sequence on every rank -> [B, D]."""

    def __init__(self, cfg: ModelConfig, ctx: ParallelContext) -> None:
        super().__init__()
        hidden = ModelShape.from_config(cfg).hidden
        self.dense = Dense(hidden, hidden, ctx, Init("normal", cfg.init_method_std))

    def forward(self, x_SBD: Tensor) -> Tensor:
        return torch.tanh(self.dense(x_SBD[0]))


class BertOutputLayer(nn.Module):
    """Projection onto the vocabulary: ``bias`` [V], and ``weight`` [V, D] unless it is the embedding's (tied)."""

    def __init__(self, cfg: ModelConfig, vocab_size: int, ctx: ParallelContext) -> None:
        super().__init__()
        hidden = ModelShape.from_config(cfg).hidden
        self.weight: nn.Parameter | None = None
        if cfg.untie_embeddings_and_output_weights:
            self.weight = parameter((vocab_size, hidden), ctx, init=Init("normal", cfg.init_method_std), cut={"tp": 0})
        self.bias = parameter((vocab_size,), ctx, init=Init("zeros"), cut={"tp": 0})


class BertModel(LanguageModel):
    """Embedding, bidirectional transformer block, masked-token head, sentence-order head (``--bert-no-binary-head``: none).

    Pre-norm as in Megatron-LM; with ``--apply-residual-connection-post-layernorm`` the original's order of norms.
    Arguments as those of ``LanguageModel``.
    """

    def __init__(self, cfg: BertConfig, vocab_size: int, ctx: ParallelContext, telemetry: MoETelemetry) -> None:
        binary_head = cfg.bert.bert_binary_head
        super().__init__(cfg, vocab_size, ctx, telemetry, num_token_types=SEGMENTS if binary_head else 0)
        (stack,) = bert_stacks(cfg)
        self.encoder = TransformerBlock(stack, ctx, telemetry)
        self.chunks = self.encoder.chunks
        self.has_binary_head = binary_head
        self.pooler: Pooler | None = None
        if not self.is_last_stage:
            return
        self.lm_head = BertLMHead(cfg.model, ctx)
        self.output_layer: BertOutputLayer = BertOutputLayer(cfg.model, vocab_size, ctx)
        if binary_head:
            self.pooler = Pooler(cfg.model, ctx)
            self.binary_head = Dense(self.shape.hidden, 2, ctx, Init("normal", cfg.model.init_method_std))

    def forward(
        self,
        tokens_BS: Tensor,
        token_types_BS: Tensor | None = None,
        padding_mask_BS: Tensor | None = None,
        labels_BS: Tensor | None = None,
        stage: StagePass = WHOLE,
    ) -> tuple[Tensor | None, ...]:
        """One forward pass.

        Args:
            tokens_BS: int64 token ids, the same on all ranks of a tensor-parallel group.
            token_types_BS: int64 number of each token's segment, by default 0; not read without sentence-order head.
            padding_mask_BS: bool, True for real tokens; by default all are. Padding is neither attended to nor routed.
            labels_BS: int64, the token to predict at every position (the caller masks the others' losses).
            stage: what a pipeline stage runs, see ``Model``; then there must be labels.

        Returns:
            With labels: the cross-entropy of every position, fp32 [B, S]; the logits of the sentence-order head [B, 2],
            or None without one; and the sum of the layers' auxiliary losses (fp32 scalar; this rank's share).
            Without labels: logits [B, S, V], gathered over the group, and the sentence-order logits.
        """
        x_sBD, aux_loss = self._encoded(tokens_BS, token_types_BS, padding_mask_BS, stage)
        if labels_BS is not None:
            self.telemetry.count_micro_batch(self.chunks[stage.chunk].layers)
            if not self.chunks[stage.chunk].last:
                loss_BS = torch.zeros_like(labels_BS, dtype=torch.float32)
                return loss_BS, loss_BS.new_zeros(len(loss_BS), 2) if self.has_binary_head else None, aux_loss, x_sBD
        head = self.output_layer
        logits_SBv = self._logits(self.lm_head(x_sBD), head.weight, local(head.bias))
        order_B2 = None if self.pooler is None else self.binary_head(self.pooler(self._whole_sequence(x_sBD)))
        if labels_BS is None:
            return gather_vocabulary(logits_SBv, self.ctx.tp).transpose(0, 1).contiguous(), order_B2
        loss_SB = vocab_parallel_cross_entropy(logits_SBv, labels_BS.t(), self.ctx.tp)
        return by_sample(loss_SB), order_B2, aux_loss

    def encode(
        self, tokens_BS: Tensor, token_types_BS: Tensor | None = None, padding_mask_BS: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The encoder's normalized output, for other heads. Arguments as in ``forward``.

        Returns:
            hidden [B, S, D], whole and alike on all tensor-parallel ranks (without meaning where there is padding), and
            the sum of the layers' auxiliary losses (fp32 scalar; this rank's share).
        """
        x_sBD, aux_loss = self._encoded(tokens_BS, token_types_BS, padding_mask_BS)
        return self._whole_sequence(x_sBD).transpose(0, 1), aux_loss

    def _encoded(
        self,
        tokens_BS: Tensor,
        token_types_BS: Tensor | None,
        padding_mask_BS: Tensor | None,
        stage: StagePass = WHOLE,
    ) -> tuple[Tensor, Tensor]:
        positions = positions_of(tokens_BS)
        x_sBD = self._enter(stage, tokens_BS, positions, token_types_BS)
        encoded: tuple[Tensor, Tensor] = self.encoder(x_sBD, self._side(positions, padding_mask_BS), chunk=stage.chunk)
        return encoded
