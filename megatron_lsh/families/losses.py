"""What a micro-batch is trained on and judged by: means that know how many values they are means of.

A mean of means depends on how samples were cut into micro-batches and over ranks. Whoever joins several means therefore adds
up their sums and counts, and divides once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

MAIN = "lm loss"
"""what the main loss is called in the log"""


@dataclass(frozen=True)
class Mean:
    """A mean and what it is taken over: a micro-batch, of which the ranks of a context-parallel group hold parts."""

    value: Tensor
    """fp32 scalar, differentiable; 0 if there was nothing to take it over. Of a part its share: shares add up to the mean"""
    count: Tensor | int
    """of the whole micro-batch"""
    parts: int = 1

    @classmethod
    def of(cls, values: Tensor, mask: Tensor | None = None) -> Mean:
        """The mean of fp32 `values`, of those where `mask` (float or bool, of the same shape) is 1 if it is given."""
        if mask is None:
            return cls(values.mean(), values.numel())
        mask = mask.to(values.dtype)
        return cls.share(values, mask, mask.sum(), parts=1)

    @classmethod
    def share(cls, values: Tensor, mask: Tensor, count: Tensor, parts: int) -> Mean:
        """Of ``Mean.of(all values, whole mask)`` what one of `parts` ranks adds; `count` is the sum of the whole mask."""
        return cls((values * mask.to(values.dtype)).sum() / count.to(values.dtype).clamp(min=1.0), count, parts)

    def sum_and_count(self) -> Tensor:
        """fp64 [2], without gradient: what can be added up over micro-batches and ranks."""
        count = torch.as_tensor(self.count).to(self.value).double()
        return torch.stack([self.value.detach().double() * self.count, count / self.parts])


def mean_of(sum_and_count: list[float]) -> float:
    """The mean again, of what `Mean.sum_and_count` gave, added up; 0 of nothing."""
    total, count = sum_and_count
    return total / count if count else total  # not finite stays not finite


@dataclass(frozen=True)
class Losses:
    """The losses of one micro-batch. All of them are minimized."""

    main: Mean
    """over the tokens (a classifier: texts) that have one"""
    auxiliary: Mean
    """of the routers, already weighted: this rank's share, see ``MoELayer``; counted for --calculate-per-token-loss alone"""
    further: Mapping[str, Mean] = field(default_factory=dict)
    """by their name in the log, such as BERT's "sop loss" """

    def objective(self, micro_batches: int, token_weight: float | None = None) -> Tensor:
        """What to differentiate: gradients add up over micro-batches, and data parallelism takes their mean over ranks.

        Args:
            micro_batches: of this rank in one iteration.
            token_weight: data-parallel ranks per loss token of the global batch, for --calculate-per-token-loss; None gives
                every micro-batch the same weight. With it the main loss is a mean over those tokens. The auxiliary loss is
                multiplied by the tokens that it counts and divided like the main one, as in Megatron-LM
                (``attach_and_log_load_balancing_loss``): where every token has a loss, the mean over micro-batches. Further
                losses, which are not over tokens, stay means over micro-batches.
        """
        further = [mean.value for mean in self.further.values()]
        if token_weight is None:
            return sum(further, self.main.value + self.auxiliary.value) / micro_batches
        over_tokens = self.main.value * self.main.count + self.auxiliary.value * self.auxiliary.count
        return sum((value / micro_batches for value in further), over_tokens * token_weight)

    def sums_and_counts(self) -> dict[str, Tensor]:
        """`Mean.sum_and_count` of the main and the further losses, by their name in the log."""
        return {MAIN: self.main.sum_and_count()} | {name: mean.sum_and_count() for name, mean in self.further.items()}
