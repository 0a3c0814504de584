"""Which pictures stand on the sheet of predictions."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_lsh.data.images.sheet import COLUMNS, ROWS, Judged, chosen


def judged(label: int, predicted: int) -> Judged:
    return Judged(np.zeros((1, 2, 2), np.uint8), str(label), str(predicted))


def test_every_class_of_a_sorted_set_is_seen() -> None:
    everything = [judged(label, label if index % 2 else 9 - label) for label in range(10) for index in range(40)]
    shown = chosen(everything)
    assert len(shown) == COLUMNS * ROWS
    for right in (False, True):
        part = [one.label for one in shown if (one.label == one.predicted) is right]
        assert len(part) == COLUMNS * ROWS // 2 and set(part) == set("0123456789")
        assert part == sorted(part)


@pytest.mark.parametrize(("wrong", "right"), [(0, 0), (3, 0), (0, 3), (100, 3), (3, 100)])
def test_what_there_is_is_shown_once(wrong: int, right: int) -> None:
    shown = chosen([judged(0, 1) for _ in range(wrong)] + [judged(1, 1) for _ in range(right)])
    assert len({id(one) for one in shown}) == len(shown)
    of_wrong = min(wrong, COLUMNS * ROWS // 2)
    assert len(shown) == of_wrong + min(right, COLUMNS * ROWS - of_wrong)
