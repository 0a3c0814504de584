"""Classification of whole texts: a pretrained GPT, BERT or T5 encoder, pooling, dropout, one linear layer.

The backbone's parameters keep their names, so that a pretraining checkpoint fits. Those of the heads are new, and those of
the pretraining's heads are left behind in the checkpoint.

Legend: S sequence, B micro-batch, D hidden, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_lsh.config.classification import BertClassificationConfig, ClassificationConfig, T5ClassificationConfig
from megatron_lsh.models.bert import BertModel, Dense, Pooler
from megatron_lsh.models.gpt import GPTModel
from megatron_lsh.models.language_model import LanguageModel, positions_of
from megatron_lsh.models.t5 import T5Encoder
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.parameters import Init
from megatron_lsh.parallel.tensor_parallel import vocab_parallel_cross_entropy

HEAD = "classification_head."
"""beginning of the names of the head's parameters"""


class GPTClassifier(GPTModel):
    """A GPT that classifies: by the last token, which has seen all others."""

    def __init__(
        self, cfg: ClassificationConfig, vocab_size: int, ctx: ParallelContext, telemetry: MoETelemetry
    ) -> None:
        super().__init__(cfg, vocab_size, ctx, telemetry)
        self.output_layer = None
        self.classification_head = _head(self, cfg)
        self.classify = Classify(cfg)

    def forward(  # type: ignore[override]
        self, tokens_BS: Tensor, token_types_BS: Tensor, padding_mask_BS: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, C] and auxiliary loss, see ``Classify``."""
        hidden_BSD, aux_loss = self.encode(tokens_BS, padding_mask_BS)
        self.telemetry.count_micro_batch()
        return self.classify(hidden_BSD, padding_mask_BS, self.classification_head), aux_loss


class BertClassifier(BertModel):
    """A BERT that classifies: by its pooled first token. For a RoBERTa, which has no pooler, a fresh one is added."""

    def __init__(
        self, cfg: BertClassificationConfig, vocab_size: int, ctx: ParallelContext, telemetry: MoETelemetry
    ) -> None:
        super().__init__(cfg, vocab_size, ctx, telemetry)
        del self.lm_head, self.output_layer
        if cfg.bert.bert_binary_head:
            del self.binary_head
        pools = cfg.finetune.pooling == "first"
        self.pooler = (self.pooler or Pooler(cfg.model, ctx)) if pools else None
        self.classification_head = _head(self, cfg)
        self.classify = Classify(cfg)

    def forward(  # type: ignore[override]
        self, tokens_BS: Tensor, token_types_BS: Tensor, padding_mask_BS: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, C] and auxiliary loss, see ``Classify``."""
        hidden_BSD, aux_loss = self.encode(tokens_BS, token_types_BS, padding_mask_BS)
        self.telemetry.count_micro_batch()
        return self.classify(hidden_BSD, padding_mask_BS, self.classification_head, self.pooler), aux_loss


class T5Classifier(T5Encoder):
    """The encoder of a T5 that classifies: by the mean over its tokens."""

    def __init__(
        self, cfg: T5ClassificationConfig, vocab_size: int, ctx: ParallelContext, telemetry: MoETelemetry
    ) -> None:
        super().__init__(cfg, vocab_size, ctx, telemetry)
        self.classification_head = _head(self, cfg)
        self.classify = Classify(cfg)

    def forward(self, tokens_BS: Tensor, token_types_BS: Tensor, padding_mask_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, C] and auxiliary loss, see ``Classify``."""
        hidden_BSD, aux_loss = self.encode(tokens_BS, padding_mask_BS)
        self.telemetry.count_micro_batch()
        return self.classify(hidden_BSD, padding_mask_BS, self.classification_head), aux_loss


class GPTScorer(GPTModel):
    """A GPT that says how likely it finds given tokens, in rows of different lengths."""

    def forward(  # type: ignore[override]
        self, tokens_BS: Tensor, labels_BS: Tensor, padding_mask_BS: Tensor
    ) -> Tensor:
        """-log p(label | tokens up to its position), fp32 [B, S]; without meaning where there is padding.

        Unlike in training, padding is not routed to experts: it would share their clusters with real tokens.
        """
        positions = positions_of(tokens_BS)
        x_sBD, _ = self.decoder(self._embed(tokens_BS, positions), self._side(positions, padding_mask_BS))
        logits_SBv = self._logits(x_sBD, None if self.output_layer is None else self.output_layer.weight)
        return vocab_parallel_cross_entropy(logits_SBv, labels_BS.t(), self.ctx.tp).t()


class Classify(nn.Module):
    """Pooling, dropout and the linear layer, alike on all tensor-parallel ranks."""

    def __init__(self, cfg: ClassificationConfig) -> None:
        super().__init__()
        self.pooling = cfg.finetune.pooling
        self.dropout = nn.Dropout(cfg.finetune.classifier_dropout or 0.0)

    def forward(self, hidden_BSD: Tensor, mask_BS: Tensor, head: Dense, pooler: Pooler | None = None) -> Tensor:
        """Logits [B, C].

        Args:
            hidden_BSD: output of the last layer.
            mask_BS: bool, True for real tokens, which come first in each row. A row may have none; its logits mean nothing,
                but are finite.
            head: the linear layer.
            pooler: applied to the first token.
        """
        if pooler is not None:
            pooled_BD = pooler(hidden_BSD.transpose(0, 1))
        else:
            pooled_BD = pool(hidden_BSD, mask_BS, self.pooling or "last")
        logits_BC: Tensor = head(self.dropout(pooled_BD))
        return logits_BC


def pool(hidden_BSD: Tensor, mask_BS: Tensor, pooling: str) -> Tensor:
    """One vector [B, D] per text: that of its "first" or "last" token, or their "mean". The mean is taken in fp32."""
    if pooling == "first":
        return hidden_BSD[:, 0]
    lengths_B = mask_BS.sum(1)
    if pooling == "last":
        last_B = (lengths_B - 1).clamp(min=0)
        return hidden_BSD[torch.arange(len(last_B), device=last_B.device), last_B]
    sums_BD = hidden_BSD.float().masked_fill(~mask_BS.unsqueeze(-1), 0.0).sum(1)
    return (sums_BD / lengths_B.clamp(min=1).unsqueeze(-1)).to(hidden_BSD.dtype)


def _head(model: LanguageModel, cfg: ClassificationConfig) -> Dense:
    classes = len(cfg.finetune.classes or ()) or 2  # without the data two, the least there can be
    return Dense(model.shape.hidden, classes, model.ctx, Init("normal", cfg.model.init_method_std))
