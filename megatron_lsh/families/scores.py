"""What models are judged by: numbers that add up over micro-batches and ranks, and what follows from their sums.

For classes everything is a function of the confusion matrix: n[t, p] is the number of examples of class t that were taken
for class p, N their sum, t_k and p_k the sums of row and column k, c the trace.

    accuracy   c / N
    F1_k       2 n_kk / (t_k + p_k), the harmonic mean of precision and recall of class k
    macro F1   mean of F1_k over the classes that occur or are predicted (Opitz and Burst, arXiv:1911.03347, "averaged F1")
    Matthews   (c N - sum_k t_k p_k) / sqrt((N^2 - sum_k p_k^2) (N^2 - sum_k t_k^2)), and 0 where that is 0 / 0
               (Gorodkin, Computational Biology and Chemistry 28, 2004, R_K; for two classes that of Matthews, 1975)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron_lsh.data.samples.classification import BLANK
from megatron_lsh.families.losses import Losses, mean_of


class Judge(Protocol):
    """What an evaluation finds out."""

    def count(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        """What a micro-batch on the model's device adds: fp64, one-dimensional and always equally long."""
        ...

    def figures(self, sums: Tensor) -> dict[str, float]:
        """Name -> value, "loss" first, of what was added up over micro-batches and ranks."""
        ...


@dataclass(frozen=True)
class LossJudge:
    """The mean of the main loss over all tokens that have one."""

    losses: Callable[[Any, Mapping[str, Any]], Losses]

    def count(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        return self.losses(model, batch).main.sum_and_count()

    def figures(self, sums: Tensor) -> dict[str, float]:
        return {"loss": mean_of(sums.tolist())}


@dataclass(frozen=True)
class ClassJudge:
    """How good a classifier is; each example counts once, and blank ones, which fill the last micro-batch, do not."""

    classes: int
    scores: Callable[[Any, Mapping[str, Any]], Tensor]
    """(model, micro-batch) -> [B, C], larger for likelier classes: logits or log-likelihoods"""

    def count(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The confusion matrix, row by row, and the sum of the cross-entropies."""
        scores_BC = self.scores(model, batch).float()
        labels_B = batch["label"]
        counted = labels_B != BLANK
        labels_B, scores_BC = labels_B[counted], scores_BC[counted]
        cells = labels_B * self.classes + scores_BC.argmax(-1)
        loss = nn.functional.cross_entropy(scores_BC, labels_B, reduction="sum").double()
        return torch.cat([torch.bincount(cells, minlength=self.classes**2).double(), loss[None]])

    def figures(self, sums: Tensor) -> dict[str, float]:
        return class_figures(sums[:-1].view(self.classes, self.classes), float(sums[-1]))


@dataclass(frozen=True)
class TopJudge:
    """How often the true class has the largest logit, or one of the five largest; for any number of classes.

    Each example counts once; blank ones, which fill the last micro-batch, do not.
    """

    scores: Callable[[Any, Mapping[str, Any]], Tensor]
    """(model, micro-batch) -> logits [B, K]"""

    def count(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        """Examples, those that are right, those among the best five, sum of the cross-entropies."""
        scores_BK = self.scores(model, batch).float()
        labels_B = batch["label"]
        counted = labels_B != BLANK
        labels_B, scores_BK = labels_B[counted], scores_BK[counted]
        own_B1 = scores_BK.gather(1, labels_B[:, None])
        classes = torch.arange(scores_BK.shape[1], device=labels_B.device)
        # Of equal logits the class with the smaller number comes first, whatever the device.
        ahead_BK = (scores_BK > own_B1) | ((scores_BK == own_B1) & (classes < labels_B[:, None]))
        place_B = ahead_BK.sum(1)
        place_B = place_B.masked_fill(~own_B1.squeeze(1).isfinite(), len(classes))
        loss = nn.functional.cross_entropy(scores_BK, labels_B, reduction="sum").double()
        hits = [torch.ones_like(place_B), place_B < 1, place_B < 5]
        return torch.stack([*(hit.sum().double() for hit in hits), loss])

    def figures(self, sums: Tensor) -> dict[str, float]:
        """ "loss", "top1" and "top5", the latter two as shares of 1."""
        examples, first, among_five, loss = sums.tolist()
        total = max(examples, 1.0)
        return {"loss": loss / total, "top1": first / total, "top5": among_five / total}


def class_figures(confusion_CC: Tensor, loss_sum: float) -> dict[str, float]:
    """ "loss", the mean cross-entropy, and the figures above; "f1" is that of the second class, for two classes only.

    The names are those of --classification-metric with underscores.

    Args:
        confusion_CC: [true class, predicted class], not empty.
        loss_sum: of the cross-entropies of the true classes under the softmax of the scores.
    """
    n = confusion_CC.double()
    total, right = float(n.sum()), float(n.trace())
    true_C, predicted_C, hits_C = n.sum(1), n.sum(0), n.diagonal()
    occur_C = (true_C + predicted_C) > 0
    f1_C = 2.0 * hits_C / (true_C + predicted_C).clamp(min=1.0)
    spread = (total**2 - float(predicted_C.square().sum())) * (total**2 - float(true_C.square().sum()))
    agreement = right * total - float((true_C * predicted_C).sum())
    figures = {
        "loss": loss_sum / total,
        "accuracy": right / total,
        "macro_f1": float(f1_C[occur_C].mean()),
        "matthews": agreement / math.sqrt(spread) if spread > 0 else 0.0,
    }
    return figures | ({"f1": float(f1_C[1])} if len(n) == 2 else {})
