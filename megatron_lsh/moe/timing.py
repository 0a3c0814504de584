"""Time spent in a stretch of a model, in its forward pass and in its backward pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Span:
    """One measured interval: wall time on a CPU, stream time on a GPU (without waiting for it)."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._began: Any = None
        self._ended: Any = None

    def start(self) -> None:
        self._began = self._now()

    def stop(self) -> None:
        self._ended = self._now()

    def milliseconds(self) -> float:
        """The length. On a GPU its end must have been reached: synchronise first."""
        if self._cuda:
            return self._began.elapsed_time(self._ended)
        return (self._ended - self._began) * 1e3

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class _Mark(torch.autograd.Function):
    """The identity; calls back when the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, callback: Callable[[], None]) -> Tensor:
        ctx.callback = callback
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.callback()
        return grads[0], None


class Region:
    """The stretch between tensors that went through :meth:`enter` and :meth:`leave`; see :func:`timed_region`."""

    def __init__(self, device: torch.device, record: Callable[[Span], None]) -> None:
        self._span = Span(device)
        self._record = record
        self._entered = False

    def enter(self, x: Tensor) -> Tensor:
        """``x``; the backward pass leaves the region where its gradient arrives."""
        self._entered = x.requires_grad
        return _Mark.apply(x, self._stop) if self._entered else x

    def leave(self, y: Tensor) -> Tensor:
        """``y``; the backward pass enters the region where its gradient arrives."""
        return _Mark.apply(y, self._span.start) if self._entered else y

    def _stop(self) -> None:
        self._span.stop()
        self._record(self._span)


@contextmanager
def timed_region(device: torch.device, record: Callable[[Span], None]) -> Iterator[Region]:
    """Time a stretch of the forward pass, and what the backward pass spends between its two ends.

        with timed_region(device, record) as region:
            y = region.leave(f(region.enter(x)))

    ``record`` is called with a finished span once per pass. Without a gradient there is no backward pass to time.
    """
    span = Span(device)
    span.start()
    yield Region(device, record)
    span.stop()
    record(span)
