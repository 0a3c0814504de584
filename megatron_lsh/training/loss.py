"""The language-model loss of one micro-batch."""

from __future__ import annotations

from torch import Tensor


def masked_mean(loss_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Mean of ``loss_BS`` (fp32) where ``mask_BS`` (float or bool) is 1; 0 if it is 0 everywhere. Returns a scalar."""
    mask_BS = mask_BS.to(loss_BS.dtype)
    return (loss_BS * mask_BS).sum() / mask_BS.sum().clamp(min=1.0)
