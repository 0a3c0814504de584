"""In which numbers sums over rows are taken."""

from __future__ import annotations

import torch


def accumulator(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype of sums, weights and distances over numbers of these dtypes: fp32, or fp64 where one of them is fp64."""
    widest = torch.float32
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest
