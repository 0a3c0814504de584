"""How well a language model predicts a text: its loss per token, over windows that overlap."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatron_lsh.models.gpt import GPTModel
from megatron_lsh.moe.schedule import exact_dispatch


@dataclass(frozen=True)
class Prediction:
    """What was found of a text."""

    loss: float
    """nats per predicted token"""
    tokens: int
    """predicted: all but the first"""

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    def bits_per_byte(self, size: int) -> float:
        """`size`: bytes of the text. Comparable between tokenizers, which perplexity is not."""
        return self.loss * self.tokens / math.log(2) / size


@torch.no_grad()
def predict(model: GPTModel, ids: list[int], context: int, stride: int) -> Prediction:
    """Every token from those before it, as an exported model does: every row travels. Collective.

    A window has `context` tokens and begins `stride` after the one before; of it the tokens count that none before had. So
    each token is predicted from at least `context - stride` tokens, where the text has as many before it.

    Raises ValueError: fewer than two tokens, or no 0 < stride <= context.
    """
    if len(ids) < 2 or not 0 < stride <= context:
        raise ValueError(f"{len(ids)} tokens, context {context}, stride {stride}")
    ctx = model.ctx
    multiple = ctx.tp.size if ctx.sequence_parallel else 1  # a sequence is cut over tensor-parallel ranks
    total, counted, begin = 0.0, 0, 0
    with exact_dispatch(model):
        while counted < len(ids) - 1:
            window = ids[begin : begin + context + 1]
            padding = -(len(window) - 1) % multiple  # what follows a token changes nothing
            padded = torch.tensor([window + window[-1:] * padding], device=ctx.device)
            positions = torch.arange(padded.shape[1] - 1, device=ctx.device)[None]
            # Padding may lie beyond the last position that the model knows.
            loss_BS, _ = model(padded[:, :-1], padded[:, 1:], position_ids_BS=positions.clamp(max=context - 1))
            new = begin + len(window) - 1 - counted
            total += float(loss_BS[0, len(window) - 1 - new : len(window) - 1].double().sum())
            counted += new
            begin += stride
    return Prediction(total / counted, counted)
