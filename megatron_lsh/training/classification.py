"""How good a classifier is: everything is a function of the confusion matrix, which adds up over batches and ranks.

n[t, p] is the number of examples of class t that were taken for class p, N their sum, t_k and p_k the sums of row and
column k, c the trace.

    accuracy   c / N
    F1_k       2 n_kk / (t_k + p_k), the harmonic mean of precision and recall of class k
    macro F1   mean of F1_k over the classes that occur or are predicted (Opitz and Burst, arXiv:1911.03347, "averaged F1")
    Matthews   (c N - sum_k t_k p_k) / sqrt((N^2 - sum_k p_k^2) (N^2 - sum_k t_k^2)), and 0 where that is 0 / 0
               (Gorodkin, Computational Biology and Chemistry 28, 2004, R_K; for two classes that of Matthews, 1975)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_lsh.data.classification import BLANK
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.data_parallel import reshard
from megatron_lsh.training.run import Run
from megatron_lsh.training.step import Batch, to_device

#: (model, batch on this rank's device) -> scores [B, C], larger for likelier classes: logits or log-likelihoods.
Scorer = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class ClassificationMetrics:
    """The figures of one evaluation; `f1`, that of the second class, exists for two classes only."""

    examples: int
    loss: float
    """mean cross-entropy of the true classes under the softmax of the scores"""
    accuracy: float
    macro_f1: float
    matthews: float
    f1: float | None = None

    @classmethod
    def of(cls, confusion_CC: Tensor, loss_sum: float) -> ClassificationMetrics:
        """`confusion_CC`: int64 [true class, predicted class], not empty."""
        n = confusion_CC.double()
        total, right = float(n.sum()), float(n.trace())
        true_C, predicted_C, hits_C = n.sum(1), n.sum(0), n.diagonal()
        occur_C = (true_C + predicted_C) > 0
        f1_C = 2.0 * hits_C / (true_C + predicted_C).clamp(min=1.0)
        spread = (total**2 - float(predicted_C.square().sum())) * (total**2 - float(true_C.square().sum()))
        agreement = right * total - float((true_C * predicted_C).sum())
        return cls(
            examples=int(total),
            loss=loss_sum / total,
            accuracy=right / total,
            macro_f1=float(f1_C[occur_C].mean()),
            matthews=agreement / math.sqrt(spread) if spread > 0 else 0.0,
            f1=float(f1_C[1]) if len(n) == 2 else None,
        )

    def figures(self) -> dict[str, float]:
        """Name -> value, "loss" first; the names are those of --classification-metric with underscores."""
        figures = {
            "loss": self.loss,
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "matthews": self.matthews,
        }
        return figures | ({} if self.f1 is None else {"f1": self.f1})


@dataclass(frozen=True)
class ClassificationEvaluator:
    """Evaluates a whole set, each example exactly once, whatever the number of ranks and the length of the last batch."""

    classes: int
    scorer: Scorer

    @torch.no_grad()
    def __call__(self, run: Run, split: str, stop_requested: Callable[[], bool]) -> dict[str, float] | None:
        """`ClassificationMetrics.figures`, the same on every rank; None if some rank asked to stop. Collective."""
        ctx, model = run.ctx, run.model
        confusion_CC = torch.zeros(self.classes, self.classes, dtype=torch.int64, device=ctx.device)
        loss = torch.zeros((), dtype=torch.float64, device=ctx.device)
        was_training = model.training
        model.eval()
        try:
            with run.batches(split) as batches:
                for batch in batches:
                    if _anyone(stop_requested(), ctx):
                        return None
                    loss += self._count(confusion_CC, model, to_device(batch, ctx.device))
        finally:
            model.train(was_training)
            reshard(model)
        if ctx.dp.size > 1:  # the ranks of a tensor-parallel group saw the same examples
            dist.all_reduce(confusion_CC, group=ctx.dp.process_group)
            dist.all_reduce(loss, group=ctx.dp.process_group)
        return ClassificationMetrics.of(confusion_CC.cpu(), float(loss)).figures()

    def _count(self, confusion_CC: Tensor, model: nn.Module, batch: Batch) -> Tensor:
        """Add the examples of a micro-batch; returns the sum of their cross-entropies."""
        scores_BC = self.scorer(model, batch).float()
        labels_B = batch["label"]
        counted = labels_B != BLANK
        labels_B, scores_BC = labels_B[counted], scores_BC[counted]
        cells = labels_B * self.classes + scores_BC.argmax(-1)
        confusion_CC += torch.bincount(cells, minlength=self.classes**2).view_as(confusion_CC)
        return nn.functional.cross_entropy(scores_BC, labels_B, reduction="sum").double()


def _anyone(wish: bool, ctx: ParallelContext) -> bool:
    """Whether any rank has this wish; the same answer on all of them."""
    if ctx.world.size == 1:
        return wish
    wishes = torch.tensor(float(wish), device=ctx.device)
    dist.all_reduce(wishes, group=ctx.world.process_group)
    return bool(wishes > 0)
