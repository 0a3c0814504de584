"""Rows as bytes, in plain PyTorch: numbers of at most 8 bits, then one fp32 scale per row.

fp8            e4m3 times a scale per row, |x|_max -> 448; moved as bytes, because gloo knows no fp8
int8           127 steps to each side of zero per row
int4           7 steps to each side of zero per row, two numbers in a byte
"""

from __future__ import annotations

import torch
from torch import Tensor

#: The formats, in the order of ``WireFormat`` in kernels/kernels.h; with the largest number of each.
LARGEST = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}
FORMATS = tuple(LARGEST)
SCALE_BYTES = 4


def encode(rows_CD: Tensor, noise_CD: Tensor | None, format: str) -> Tensor:
    """uint8 [C, bytes]; see ``PlainOps.encode``."""
    largest = LARGEST[format]
    magnitude_C = rows_CD.abs().amax(1).float()
    # By a tensor: on a GPU torch turns the division by a Python number into a product with its reciprocal, and the kernel on
    # the other end of the wire would have another scale.
    scale_C1 = (magnitude_C / magnitude_C.new_full((), largest)).unsqueeze(1)
    # A row of zeros keeps scale 0 and divides by 1. A non-finite row yields a non-finite scale, so it stays visible.
    scaled_CD = rows_CD.float() / torch.where(scale_C1 == 0, 1.0, scale_C1)
    if format == "fp8":
        numbers = scaled_CD.to(torch.float8_e4m3fn).view(torch.uint8)
    elif format == "int8":
        numbers = _round(scaled_CD, noise_CD, largest).to(torch.int8).view(torch.uint8)
    else:
        nibbles = (_round(scaled_CD, noise_CD, largest) + 8).to(torch.uint8)
        if nibbles.shape[1] % 2:
            nibbles = torch.nn.functional.pad(nibbles, (0, 1))
        numbers = nibbles[:, ::2] | (nibbles[:, 1::2] << 4)
    return torch.cat([numbers, scale_C1.view(torch.uint8)], dim=1)


def decode(payload: Tensor, format: str, features: int, dtype: torch.dtype) -> Tensor:
    """[C, features]; see ``PlainOps.decode``."""
    numbers, scale = payload.split([payload.shape[1] - SCALE_BYTES, SCALE_BYTES], dim=1)
    if format == "fp8":
        scaled_CD = numbers.contiguous().view(torch.float8_e4m3fn).float()
    elif format == "int8":
        scaled_CD = numbers.contiguous().view(torch.int8).float()
    else:
        nibbles = torch.stack([numbers & 15, numbers >> 4], dim=2).flatten(1)[:, :features]
        scaled_CD = nibbles.float() - 8
    return (scaled_CD * scale.clone(memory_format=torch.contiguous_format).view(torch.float32)).to(dtype)


def _round(x_CD: Tensor, noise_CD: Tensor | None, largest: float) -> Tensor:
    rounded_CD = (x_CD + (0.5 if noise_CD is None else noise_CD)).floor()
    return rounded_CD.nan_to_num(0.0).clamp(-largest, largest)
