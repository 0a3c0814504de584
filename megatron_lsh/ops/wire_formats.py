"""Rows as bytes, in plain PyTorch: numbers of at most 8 bits, then their scales.

With one fp32 scale per row, as kernels do it, too:

fp8            e4m3 times a scale per row, |x|_max -> 448; moved as bytes, because gloo knows no fp8
int8           127 steps to each side of zero per row
int4           7 steps to each side of zero per row, two numbers in a byte

With a scale for each 32 neighbours, so that one large number coarsens only those beside it:

mxfp4          e2m1 times a power of two, one byte (e8m0), the MXFP4 of the OCP Microscaling formats (MX v1.0); the power is
               rounded up, so that no number is cut off
int4x32        7 steps to each side of zero, times a bf16 number
"""

from __future__ import annotations

import torch
from torch import Tensor

#: The formats with a scale per row, in the order of ``WireFormat`` in kernels/kernels.h.
FORMATS = ("fp8", "int8", "int4")
SCALE_BYTES = 4

#: Neighbours that share a scale in the formats of blocks, and of each the numbers and the bytes of a scale.
BLOCK = 32
BLOCK_FORMATS = {"mxfp4": ("fp4", 1), "int4x32": ("int4", 2)}
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
#: The largest number of each kind, before it is scaled.
_LARGEST = {"fp8": 448.0, "int8": 127.0, "int4": 7.0, "fp4": _FP4[-1]}


def encode(rows_CD: Tensor, noise_CD: Tensor | None, format: str) -> Tensor:
    """uint8 [C, bytes]; see ``PlainOps.encode``."""
    if format in BLOCK_FORMATS:
        return _encode_blocks(rows_CD, noise_CD, *BLOCK_FORMATS[format])
    magnitude_C = rows_CD.abs().amax(1).float()
    # By a tensor: on a GPU torch turns the division by a Python number into a product with its reciprocal, and the kernel on
    # the other end of the wire would have another scale.
    scale_C1 = (magnitude_C / magnitude_C.new_full((), _LARGEST[format])).unsqueeze(1)
    # A row of zeros keeps scale 0 and divides by 1. A non-finite row yields a non-finite scale, so it stays visible.
    scaled_CD = rows_CD.float() / torch.where(scale_C1 == 0, 1.0, scale_C1)
    return torch.cat([_numbers(scaled_CD, noise_CD, format), scale_C1.view(torch.uint8)], dim=1)


def _numbers(scaled_CD: Tensor, noise_CD: Tensor | None, format: str) -> Tensor:
    """uint8 [C, bytes] of numbers whose magnitude is at most the format's largest."""
    largest = _LARGEST[format]
    if format == "fp8":
        return scaled_CD.to(torch.float8_e4m3fn).view(torch.uint8)
    if format == "int8":
        return _round(scaled_CD, noise_CD, largest).to(torch.int8).view(torch.uint8)
    if format == "int4":
        nibbles = (_round(scaled_CD, noise_CD, largest) + 8).to(torch.uint8)
    else:
        nibbles = _to_fp4(scaled_CD, noise_CD)
    if nibbles.shape[1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)


def decode(payload: Tensor, format: str, features: int, dtype: torch.dtype) -> Tensor:
    """[C, features]; see ``PlainOps.decode``."""
    if format in BLOCK_FORMATS:
        return _decode_blocks(payload, *BLOCK_FORMATS[format], features, dtype)
    numbers, scale = payload.split([payload.shape[1] - SCALE_BYTES, SCALE_BYTES], dim=1)
    scaled_CD = _values(numbers, format)[:, :features]
    return (scaled_CD * scale.clone(memory_format=torch.contiguous_format).view(torch.float32)).to(dtype)


def _values(numbers: Tensor, format: str) -> Tensor:
    """fp32: the inverse of :func:`_numbers`, with what was padded."""
    if format == "fp8":
        return numbers.contiguous().view(torch.float8_e4m3fn).float()
    if format == "int8":
        return numbers.contiguous().view(torch.int8).float()
    nibbles = torch.stack([numbers & 15, numbers >> 4], dim=2).flatten(1)
    if format == "int4":
        return nibbles.float() - 8
    values = torch.tensor([*_FP4, *(-value for value in _FP4)], device=numbers.device)
    return values[nibbles.long()]


def _encode_blocks(rows_CD: Tensor, noise_CD: Tensor | None, format: str, scale_bytes: int) -> Tensor:
    features = rows_CD.shape[1]
    blocks_CGB = _in_blocks(rows_CD.float())
    least_CG1 = blocks_CGB.abs().amax(2, keepdim=True) / _LARGEST[format]
    if scale_bytes == 1:
        mantissa, exponent = torch.frexp(least_CG1)
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-127, 127)  # rounded up
        bytes_CG = (exponent + 127).masked_fill(~least_CG1.isfinite(), 255).to(torch.uint8).flatten(1)
    else:
        # The bits of fp32 rounded up to those of bf16; what is infinite or no number stays that.
        bits = least_CG1.view(torch.int32)
        bits = torch.where(least_CG1.isfinite(), (bits + 0xFFFF) & ~0xFFFF, bits)
        scale_CG1 = bits.view(torch.float32).to(torch.bfloat16)
        bytes_CG = scale_CG1.squeeze(2).contiguous().view(torch.uint8)
    scale_CG1 = _scales(bytes_CG, scale_bytes).unsqueeze(2)
    scaled_CGB = blocks_CGB / torch.where(scale_CG1 == 0, 1.0, scale_CG1)
    noise_CGB = None if noise_CD is None else _in_blocks(noise_CD).flatten(1)
    numbers = _numbers(scaled_CGB.flatten(1), noise_CGB, format)
    # What was added to fill the last block does not travel.
    return torch.cat([numbers[:, : (features + 1) // 2], bytes_CG], dim=1)


def _decode_blocks(payload: Tensor, format: str, scale_bytes: int, features: int, dtype: torch.dtype) -> Tensor:
    scales = -(-features // BLOCK) * scale_bytes
    numbers, bytes_CG = payload.split([payload.shape[1] - scales, scales], dim=1)
    scale_CG = _scales(bytes_CG, scale_bytes)
    return (_values(numbers, format)[:, :features] * scale_CG.repeat_interleave(BLOCK, 1)[:, :features]).to(dtype)


def _in_blocks(x_CD: Tensor) -> Tensor:
    """[C, G, BLOCK], filled up with zeros."""
    filled = torch.nn.functional.pad(x_CD, (0, -x_CD.shape[1] % BLOCK))
    return filled.view(x_CD.shape[0], filled.shape[1] // BLOCK, BLOCK)


def _scales(bytes_CG: Tensor, scale_bytes: int) -> Tensor:
    """fp32 [C, G]. Of e8m0, 255 is no number."""
    if scale_bytes == 2:
        return bytes_CG.clone(memory_format=torch.contiguous_format).view(torch.bfloat16).float()
    exponent = bytes_CG.int() - 127
    return torch.ldexp(torch.ones(exponent.shape, device=exponent.device), exponent).masked_fill_(
        bytes_CG == 255, torch.nan
    )


def _to_fp4(x_CD: Tensor, noise_CD: Tensor | None) -> Tensor:
    """uint8: sign and place among the magnitudes of e2m1; to the nearest (of two equally near the smaller), or by chance."""
    magnitudes = torch.tensor(_FP4, device=x_CD.device)
    size_CD = x_CD.abs().nan_to_num(0.0).clamp(max=_FP4[-1])
    below_CD = (torch.bucketize(size_CD, magnitudes, right=True) - 1).clamp(0, len(_FP4) - 2)
    share_CD = (size_CD - magnitudes[below_CD]) / (magnitudes[below_CD + 1] - magnitudes[below_CD])
    up_CD = share_CD > (0.5 if noise_CD is None else noise_CD)
    return (below_CD + up_CD + 8 * (x_CD < 0)).to(torch.uint8)


def _round(x_CD: Tensor, noise_CD: Tensor | None, largest: float) -> Tensor:
    rounded_CD = (x_CD + (0.5 if noise_CD is None else noise_CD)).floor()
    return rounded_CD.nan_to_num(0.0).clamp(-largest, largest)
