"""Which documents belong to train, valid and test."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise


def split_documents(num_documents: int, shares: tuple[Fraction, Fraction, Fraction]) -> list[tuple[int, int]]:
    """Consecutive (start, stop) ranges of documents, one per split; bounds are rounded half up."""
    bounds, total = [0], Fraction(0)
    for share in shares:
        total += share
        bounds.append(math.floor(total * num_documents + Fraction(1, 2)))
    return list(pairwise(bounds))
