"""From the host to where the operations run."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy there. Out of pinned memory, or a GPU's driver would wait."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
