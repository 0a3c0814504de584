"""T5: an encoder, and a decoder that reads it and writes the missing spans; dense or with experts in both.

Raffel et al., arXiv:1910.10683. Parameters are named as Megatron-LM's.

Legend: S decoder sequence, T encoder sequence (`s`, `t` the local shares under sequence parallelism), B micro-batch,
D hidden, V padded vocabulary (`v` the share of this tensor-parallel rank).
"""

from __future__ import annotations

from torch import Tensor

from megatron_lsh.config.config import Config
from megatron_lsh.config.t5 import T5Config
from megatron_lsh.models.attention import padding_attention_mask
from megatron_lsh.models.language_model import LanguageModel, by_sample, positions_of
from megatron_lsh.models.relative import RelativePositionBias
from megatron_lsh.models.shape import ModelShape
from megatron_lsh.models.stacks import Stack, with_model
from megatron_lsh.models.transformer import TransformerBlock
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.parameters import Init
from megatron_lsh.parallel.tensor_parallel import gather_vocabulary, vocab_parallel_cross_entropy


def t5_encoder_stacks(cfg: T5Config) -> tuple[Stack, ...]:
    """The stacks that are left of a T5 when the decoder is not needed."""
    return (Stack(_stack_config(cfg, cfg.t5.encoder_num_layers, cfg.t5.encoder_seq_length), "encoder", causal=False),)


def t5_stacks(cfg: T5Config) -> tuple[Stack, ...]:
    """The stacks that a T5 of this configuration is made of, in the order in which a sample passes them."""
    (encoder,) = t5_encoder_stacks(cfg)
    decoder = Stack(
        _stack_config(cfg, cfg.t5.decoder_num_layers, cfg.t5.decoder_seq_length),
        "decoder",
        first_layer=encoder.num_layers,
        memory_length=encoder.seq_length,
    )
    return encoder, decoder


def _stack_config(cfg: T5Config, num_layers: int | None, seq_length: int | None) -> Config:
    """`cfg` as one of the stacks sees it: --num-layers and --seq-length stand for what it does not have of its own."""
    return with_model(cfg, num_layers=num_layers or cfg.model.num_layers, seq_length=seq_length or cfg.model.seq_length)


class T5Encoder(LanguageModel):
    """The half of a T5 that reads: embedding and encoder. Arguments as those of ``LanguageModel``."""

    def __init__(self, cfg: T5Config, vocab_size: int, ctx: ParallelContext, telemetry: MoETelemetry) -> None:
        super().__init__(cfg, vocab_size, ctx, telemetry)
        self.encoder_relative_pos_emb = _relative_positions(cfg, ctx, bidirectional=True)
        self.encoder = TransformerBlock(t5_encoder_stacks(cfg)[0], ctx, telemetry)

    def encode(self, tokens_BT: Tensor, padding_mask_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The encoder's normalized output, for other heads. Arguments as in ``T5Model.forward``.

        Returns:
            hidden [B, T, D], whole and alike on all tensor-parallel ranks (without meaning where there is padding), and
            the sum of the encoder layers' auxiliary losses (fp32 scalar; this rank's share).
        """
        x_tBD, aux_loss = self._encoded(tokens_BT, padding_mask_BT)
        return self._whole_sequence(x_tBD).transpose(0, 1), aux_loss

    def _encoded(self, tokens_BT: Tensor, padding_mask_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        positions = positions_of(tokens_BT)
        side = self._side(positions, padding_mask_BT)._replace(
            position_bias=_bias(self.encoder_relative_pos_emb, tokens_BT)
        )
        encoded: tuple[Tensor, Tensor] = self.encoder(self._embed(tokens_BT, positions), side)
        return encoded


class T5Model(T5Encoder):
    """One embedding for encoder, decoder and (unless untied) output; two stacks; learned, rotary or relative positions.

    Attention is scaled by 1/sqrt(d), and the output is not scaled; in the original it is the other way round. Its weights
    fit with sqrt(d) folded into the query projections of self-attention and cross-attention and, where the output is tied,
    D^-0.5 into the decoder's final norm.
    Arguments as those of ``LanguageModel``.
    """

    def __init__(self, cfg: T5Config, vocab_size: int, ctx: ParallelContext, telemetry: MoETelemetry) -> None:
        super().__init__(cfg, vocab_size, ctx, telemetry)
        self.decoder_relative_pos_emb = _relative_positions(cfg, ctx, bidirectional=False)
        self.decoder = TransformerBlock(t5_stacks(cfg)[1], ctx, telemetry)
        self.output_layer = self._build_output_layer()

    def forward(
        self,
        encoder_tokens_BT: Tensor,
        decoder_tokens_BS: Tensor,
        encoder_padding_mask_BT: Tensor | None = None,
        decoder_padding_mask_BS: Tensor | None = None,
        labels_BS: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """One forward pass.

        Args:
            encoder_tokens_BT, decoder_tokens_BS: int64 token ids, the same on all ranks of a tensor-parallel group.
            encoder_padding_mask_BT, decoder_padding_mask_BS: bool, True for real tokens; by default all are. Padding is
                neither attended to nor routed.
            labels_BS: int64 token to predict at every position of the decoder.

        Returns:
            With labels: the cross-entropy of every position, fp32 [B, S], and the sum of the layers' auxiliary losses
            (fp32 scalar; this rank's share). Without: logits [B, S, V], gathered over the group.
        """
        memory_tBD, encoder_aux_loss = self._encoded(encoder_tokens_BT, encoder_padding_mask_BT)
        positions = positions_of(decoder_tokens_BS)
        side = self._side(positions, decoder_padding_mask_BS)._replace(
            position_bias=_bias(self.decoder_relative_pos_emb, decoder_tokens_BS),
            memory_tBD=memory_tBD,
            memory_mask=padding_attention_mask(encoder_padding_mask_BT),
        )
        x_sBD, aux_loss = self.decoder(self._embed(decoder_tokens_BS, positions), side)
        logits_SBv = self._logits(x_sBD, None if self.output_layer is None else self.output_layer.weight)
        if labels_BS is None:
            return gather_vocabulary(logits_SBv, self.ctx.tp).transpose(0, 1).contiguous()
        self.telemetry.count_micro_batch()
        loss_SB = vocab_parallel_cross_entropy(logits_SBv, labels_BS.t(), self.ctx.tp)
        return by_sample(loss_SB), encoder_aux_loss + aux_loss


def _relative_positions(cfg: T5Config, ctx: ParallelContext, *, bidirectional: bool) -> RelativePositionBias | None:
    if cfg.model.position_embedding_type != "relative":
        return None
    heads = ModelShape.from_config(cfg.model).heads
    init = Init("normal", cfg.model.init_method_std)
    return RelativePositionBias(cfg.t5, heads, ctx, init, bidirectional=bidirectional)


def _bias(table: RelativePositionBias | None, tokens_BS: Tensor) -> Tensor | None:
    bias_1HSS: Tensor | None = None if table is None else table(tokens_BS.shape[1])
    return bias_1HSS
