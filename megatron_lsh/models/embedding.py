"""Token, position and segment embedding in front of the transformer block.

Legend: S sequence (`s` its local share under sequence parallelism), B micro-batch, D hidden, V padded vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lsh.config.model import ModelConfig
from megatron_lsh.errors import ConfigError
from megatron_lsh.models.shape import ModelShape
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.parameters import Init, local, mark_copy, parameter
from megatron_lsh.parallel.tensor_parallel import VocabParallelEmbedding


class PositionEmbedding(nn.Module):
    """One learned vector per position, held in full by every tensor-parallel rank: ``weight`` [positions, D]."""

    def __init__(self, positions: int, hidden: int, ctx: ParallelContext, init: Init) -> None:
        super().__init__()
        self.positions = positions
        self.ctx = ctx
        self.weight = parameter((positions, hidden), ctx, init=init)

    def forward(self, positions_S_or_BS: Tensor) -> Tensor:
        """int64 [S], 0 to S-1, or any [B, S] -> [s, 1 or B, D]: the vectors of this rank's share of the sequence."""
        positions = positions_S_or_BS if positions_S_or_BS.dim() == 2 else positions_S_or_BS.unsqueeze(0)
        if positions_S_or_BS.dim() == 1 and positions.shape[1] > self.positions:
            raise ValueError(
                f"a sequence of {positions.shape[1]} tokens is longer than --max-position-embeddings ({self.positions})"
            )
        sharded = self.ctx.sequence_parallel
        if sharded:
            positions = positions.chunk(self.ctx.tp.size, dim=1)[self.ctx.tp.rank]
        return F.embedding(positions.t(), local(self.weight, partial_grad=sharded))


class TokenTypeEmbedding(nn.Module):
    """One learned vector per kind of segment, held in full by every tensor-parallel rank: ``weight`` [types, D]."""

    def __init__(self, types: int, hidden: int, ctx: ParallelContext, init: Init) -> None:
        super().__init__()
        self.ctx = ctx
        self.weight = parameter((types, hidden), ctx, init=init)

    def forward(self, token_types_BS: Tensor) -> Tensor:
        """int64 [B, S] -> [s, B, D]: the vectors of this rank's share of the sequence."""
        sharded = self.ctx.sequence_parallel
        if sharded:
            token_types_BS = token_types_BS.chunk(self.ctx.tp.size, dim=1)[self.ctx.tp.rank]
        return F.embedding(token_types_BS.t(), local(self.weight, partial_grad=sharded))


class TiedWordEmbedding(nn.Module):
    """The word embeddings that a pipeline's last stage projects onto the vocabulary with: a copy of the first stage's."""

    def __init__(self, cfg: ModelConfig, vocab_size: int, ctx: ParallelContext) -> None:
        super().__init__()
        hidden, init = ModelShape.from_config(cfg).hidden, Init("normal", cfg.init_method_std)
        self.word_embeddings = VocabParallelEmbedding(vocab_size, hidden, ctx, init=init)
        mark_copy(self.word_embeddings.weight)


class LanguageModelEmbedding(nn.Module):
    """dropout(word + position + token-type embedding); the latter two where positions are learned and types exist."""

    def __init__(self, cfg: ModelConfig, vocab_size: int, ctx: ParallelContext, num_token_types: int = 0) -> None:
        super().__init__()
        shape = ModelShape.from_config(cfg)
        init = Init("normal", cfg.init_method_std)
        self.word_embeddings = VocabParallelEmbedding(vocab_size, shape.hidden, ctx, init=init)
        self.position_embeddings: PositionEmbedding | None = None
        if cfg.position_embedding_type == "learned_absolute" and cfg.add_position_embedding:
            if cfg.max_position_embeddings is None:
                raise ConfigError("model.max_position_embeddings (absent) must be given: set --max-position-embeddings")
            self.position_embeddings = PositionEmbedding(cfg.max_position_embeddings, shape.hidden, ctx, init)
        self.tokentype_embeddings: TokenTypeEmbedding | None = None
        if num_token_types:
            self.tokentype_embeddings = TokenTypeEmbedding(num_token_types, shape.hidden, ctx, init)
        self.dropout = nn.Dropout(cfg.hidden_dropout)

    def forward(self, tokens_BS: Tensor, positions: Tensor, token_types_BS: Tensor | None = None) -> Tensor:
        """int64 tokens, their positions ([S] or [B, S]) and, if the model has them, their types -> [s, B, D]."""
        x_sBD = self.word_embeddings(tokens_BS)
        if self.position_embeddings is not None:
            x_sBD = x_sBD + self.position_embeddings(positions)
        if self.tokentype_embeddings is not None:
            types_BS = torch.zeros_like(tokens_BS) if token_types_BS is None else token_types_BS
            x_sBD = x_sBD + self.tokentype_embeddings(types_BS)
        return self.dropout(x_sBD)
