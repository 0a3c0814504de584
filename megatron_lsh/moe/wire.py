"""Wire dtypes: the numbers in which rows travel between ranks (``--lsh-wire-dtype``).

A codec turns rows [C, D] into a payload of one row each and back. Quantized rows carry their scale with them, so one
all-to-all moves everything:

    fp32, bf16     a cast
    fp8            e4m3 times a scale per row, |x|_max -> 448
    int8           127 steps to each side of zero per row
    int4           7 steps to each side of zero per row, two numbers in a byte

Rounding is to nearest for activations. Gradients of int8 and int4 are rounded stochastically, up with the probability of the
remainder: its error has mean zero, so it averages out over steps instead of adding up (Gupta et al., arXiv 1502.02551).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_lsh.lsh import kernels

WIRE_DTYPES = ("fp32", "bf16", "fp8", "int8", "int4")
_SCALE_BYTES = 4


class WireCodec(ABC):
    """Encodes rows for the wire. Payloads are 2-D, contiguous, and of a dtype that gloo and NCCL move."""

    @abstractmethod
    def encode(self, rows_CD: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """[C, D] floating -> payload [C, ...]. With a generator, rounding is stochastic where that helps."""

    @abstractmethod
    def decode(self, payload: Tensor, like: Tensor) -> Tensor:
        """Payload -> [C, D] with the dtype and width D of ``like``."""


class CastCodec(WireCodec):
    """A plain cast; no copy where the rows have the dtype already."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        """None keeps the dtype of the rows."""
        self._dtype = dtype

    def encode(self, rows_CD: Tensor, noise: torch.Generator | None = None) -> Tensor:
        return rows_CD.to(self._dtype or rows_CD.dtype).contiguous()

    def decode(self, payload: Tensor, like: Tensor) -> Tensor:
        return payload.to(like.dtype)


class _ScaledCodec(WireCodec):
    """Numbers of at most 8 bits behind one fp32 scale per row, as bytes: [C, numbers + 4] uint8."""

    name: str
    largest: float

    def encode(self, rows_CD: Tensor, noise: torch.Generator | None = None) -> Tensor:
        if kernels.usable(rows_CD) and rows_CD.dtype != torch.float64:
            up_CD = None if self.name == "fp8" else _draw(rows_CD, noise)
            return torch.ops.megatron_lsh.encode(rows_CD, up_CD, kernels.WIRE_FORMATS.index(self.name))
        scale_C1 = (rows_CD.abs().amax(1).float() / self.largest).unsqueeze(1)
        # A row of zeros keeps scale 0 and divides by 1. A non-finite row yields a non-finite scale, so it stays visible.
        scaled_CD = rows_CD.float() / torch.where(scale_C1 == 0, 1.0, scale_C1)
        return torch.cat([self._pack(scaled_CD, noise), scale_C1.view(torch.uint8)], dim=1)

    def decode(self, payload: Tensor, like: Tensor) -> Tensor:
        if kernels.usable(like) and like.dtype != torch.float64:
            format = kernels.WIRE_FORMATS.index(self.name)
            return torch.ops.megatron_lsh.decode(payload, format, like.shape[1], like.dtype)
        numbers, scale = payload.split([payload.shape[1] - _SCALE_BYTES, _SCALE_BYTES], dim=1)
        scaled_CD = self._unpack(numbers.contiguous(), like.shape[1])
        return (scaled_CD * scale.clone(memory_format=torch.contiguous_format).view(torch.float32)).to(like.dtype)

    @abstractmethod
    def _pack(self, scaled_CD: Tensor, noise: torch.Generator | None) -> Tensor:
        """fp32 in [-largest, largest] -> uint8."""

    @abstractmethod
    def _unpack(self, numbers: Tensor, width: int) -> Tensor:
        """uint8 -> fp32 [C, width]."""


class Fp8Codec(_ScaledCodec):
    """float8 e4m3; moved as bytes, because gloo knows no fp8."""

    name = "fp8"
    largest = 448.0

    def _pack(self, scaled_CD: Tensor, noise: torch.Generator | None) -> Tensor:
        return scaled_CD.to(torch.float8_e4m3fn).view(torch.uint8)

    def _unpack(self, numbers: Tensor, width: int) -> Tensor:
        return numbers.view(torch.float8_e4m3fn).float()


class Int8Codec(_ScaledCodec):
    name = "int8"
    largest = 127.0

    def _pack(self, scaled_CD: Tensor, noise: torch.Generator | None) -> Tensor:
        return _round(scaled_CD, noise, self.largest).to(torch.int8).view(torch.uint8)

    def _unpack(self, numbers: Tensor, width: int) -> Tensor:
        return numbers.view(torch.int8).float()


class Int4Codec(_ScaledCodec):
    name = "int4"
    largest = 7.0

    def _pack(self, scaled_CD: Tensor, noise: torch.Generator | None) -> Tensor:
        nibbles = (_round(scaled_CD, noise, self.largest) + 8).to(torch.uint8)
        if nibbles.shape[1] % 2:
            nibbles = torch.nn.functional.pad(nibbles, (0, 1))
        return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)

    def _unpack(self, numbers: Tensor, width: int) -> Tensor:
        nibbles = torch.stack([numbers & 15, numbers >> 4], dim=2).flatten(1)[:, :width]
        return nibbles.float() - 8


def _draw(x: Tensor, noise: torch.Generator | None) -> Tensor | None:
    return None if noise is None else torch.rand(x.shape, generator=noise, device=x.device)


def _round(x: Tensor, noise: torch.Generator | None, largest: float) -> Tensor:
    up = _draw(x, noise)
    return (x + (0.5 if up is None else up)).floor().nan_to_num(0.0).clamp(-largest, largest)


def make_codec(name: str | None) -> WireCodec:
    """The codec for a value of ``--lsh-wire-dtype``; None keeps the rows' dtype."""
    if name is None:
        return CastCodec(None)
    codecs: dict[str, Callable[[], WireCodec]] = {
        "fp32": lambda: CastCodec(torch.float32),
        "bf16": lambda: CastCodec(torch.bfloat16),
        "fp8": Fp8Codec,
        "int8": Int8Codec,
        "int4": Int4Codec,
    }
    return codecs[name]()
