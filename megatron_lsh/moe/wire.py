"""Wire dtypes: the numbers in which rows travel between ranks (``--lsh-wire-dtype``).

A codec turns rows [C, D] into a payload of one row each and back. Quantized rows carry their scale with them, so one
all-to-all moves everything:

    fp32, bf16     a cast
    fp8            e4m3 times a scale per row, |x|_max -> 448
    int8           127 steps to each side of zero per row
    int4           7 steps to each side of zero per row, two numbers in a byte
    int4x32        the same with a scale (bf16) for each 32 numbers: half of int4's error for an eighth more bytes
    mxfp4          fp4 (e2m1) with a scale (e8m0, one byte) for each 32 numbers

Gradients may travel in others (``--lsh-wire-dtype-backward``). Rounding is to nearest for activations. Gradients in integers
and fp4 are rounded stochastically, up with the probability of the
remainder: its error has mean zero, so it averages out over steps instead of adding up (Gupta et al., arXiv 1502.02551).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_lsh.ops import choose


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


class ScaledCodec(WireCodec):
    """Numbers of at most 8 bits and their scales, as bytes: uint8 [C, bytes] (``ops/wire_formats.py``)."""

    def __init__(self, format: str) -> None:
        """``format``: one of ``ops/wire_formats.py``."""
        self._format = format

    def encode(self, rows_CD: Tensor, noise: torch.Generator | None = None) -> Tensor:
        noise_CD = None
        if noise is not None and self._format != "fp8":
            noise_CD = torch.rand(rows_CD.shape, generator=noise, device=rows_CD.device)
        return choose(rows_CD).encode(rows_CD, noise_CD, self._format)

    def decode(self, payload: Tensor, like: Tensor) -> Tensor:
        return choose(like).decode(payload, self._format, like.shape[1], like.dtype)


class Wire(NamedTuple):
    """The numbers in which rows travel, and their gradients; None for those they have."""

    rows: WireCodec | None = None
    gradients: WireCodec | None = None

    @staticmethod
    def of(rows: str | None, gradients: str | None = None) -> Wire:
        """For values of ``--lsh-wire-dtype`` and ``--lsh-wire-dtype-backward`` (None: as the rows)."""
        codecs = [None if name is None else make_codec(name) for name in (rows, gradients or rows)]
        return Wire(*codecs)


def make_codec(name: str | None) -> WireCodec:
    """The codec for a value of ``--lsh-wire-dtype``; None keeps the rows' dtype."""
    if name is None:
        return CastCodec(None)
    casts = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return CastCodec(casts[name]) if name in casts else ScaledCodec(name)


def row_bytes(name: str | None, width: int, dtype: torch.dtype) -> int:
    """Bytes of a row of `width` numbers of `dtype` as it travels under a value of ``--lsh-wire-dtype``."""
    payload = make_codec(name).encode(torch.zeros(1, width, dtype=dtype))
    return payload.shape[1] * payload.element_size()
