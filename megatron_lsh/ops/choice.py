"""Kernels or plain PyTorch: decided here, and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from megatron_lsh.ops.kernels import KernelOps
from megatron_lsh.ops.library import STATUS
from megatron_lsh.ops.plain import PlainOps

PLAIN = PlainOps()
KERNELS = KernelOps(torch.ops.megatron_lsh)

_SWITCH = "MEGATRON_LSH_KERNELS"
_switched_on: ContextVar[bool] = ContextVar("megatron_lsh_kernels", default=os.environ.get(_SWITCH) != "0")


@contextmanager
def reference_only() -> Iterator[None]:
    """Within this context plain PyTorch is chosen even where kernels are built (tests, benchmarks).

    Backward passes follow the forward that made them. ``MEGATRON_LSH_KERNELS=0`` in the environment does it for a whole run.
    """
    token = _switched_on.set(False)
    try:
        yield
    finally:
        _switched_on.reset(token)


@torch.compiler.assume_constant_result  # torch.compile cannot look into a context variable
def _on() -> bool:
    return _switched_on.get()


def choose(rows: Tensor) -> PlainOps:
    """The operations for rows like these: by kernels where they are built, know the dtype and are not switched off."""
    device = rows.device.type
    known = rows.dtype in (torch.float32, torch.bfloat16, torch.float16) or (
        rows.dtype == torch.float64 and device == "cpu"
    )
    return KERNELS if known and device in STATUS.devices and _on() else PLAIN


def describe(device_type: str) -> str:
    """One line for the log: what runs the operations on this kind of device."""
    if _on():
        return STATUS.describe(device_type)
    return f"LSH kernels: switched off ({_SWITCH}=0); plain PyTorch instead"
