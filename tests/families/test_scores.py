"""Figures of classifiers, from the confusion matrix."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_lsh.data.samples.classification import BLANK
from megatron_lsh.families.scores import ClassJudge, class_figures


def test_figures_by_hand() -> None:
    # Rows are true classes: 5 of class 0, 3 of class 1, 2 of class 2.
    three = class_figures(torch.tensor([[4, 1, 0], [1, 2, 0], [0, 1, 1]]), 5.0)
    assert list(three) == ["loss", "accuracy", "macro_f1", "matthews"]
    assert (three["loss"], three["accuracy"]) == (0.5, 0.7)
    assert three["macro_f1"] == pytest.approx((8 / 10 + 4 / 7 + 2 / 3) / 3)
    # sum t p = 25 + 12 + 2 = 39; sum p^2 = 25 + 16 + 1; sum t^2 = 25 + 9 + 4
    assert three["matthews"] == pytest.approx((7 * 10 - 39) / math.sqrt((100 - 42) * (100 - 38)))
    two = class_figures(torch.tensor([[50, 10], [5, 35]]), 1.0)
    assert two["f1"] == pytest.approx(70 / 85) and two["accuracy"] == 0.85
    assert two["matthews"] == pytest.approx((35 * 50 - 10 * 5) / math.sqrt(45 * 40 * 60 * 55))  # Matthews' own formula
    assert two.keys() == {"loss", "accuracy", "macro_f1", "matthews", "f1"}


def test_what_never_occurs_does_not_count_and_one_sided_answers_have_no_correlation() -> None:
    absent = class_figures(torch.tensor([[3, 0, 0], [0, 0, 0], [1, 0, 2]]), 1.0)
    assert absent["macro_f1"] == (6 / 7 + 4 / 5) / 2
    assert class_figures(torch.tensor([[3, 0], [2, 0]]), 1.0)["matthews"] == 0.0
    assert class_figures(torch.tensor([[0, 3], [2, 0]]), 1.0)["matthews"] == -1.0


def test_counts_add_up_over_micro_batches_and_leave_blank_samples_out() -> None:
    scores = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 3.0, 0.0], [0.0, 0.0, 9.0]])
    labels = torch.tensor([0, 1, 1, BLANK])
    judge = ClassJudge(3, lambda model, batch: batch["scores"])
    parts = [judge.count(None, {"scores": scores[rows], "label": labels[rows]}) for rows in (slice(0, 2), slice(2, 4))]  # type: ignore[arg-type]
    found = judge.figures(parts[0] + parts[1])
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(scores[:3], labels[:3])))
