"""What a layer launches and where the host waits, counted the same way with a GPU and without."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from megatron_lsh.moe import transport

#: Only a tensor's shape or its memory; no kernel runs.
_NO_KERNEL = {
    "alias", "as_strided", "chunk", "detach", "empty", "empty_like", "empty_strided", "expand", "lift_fresh", "new_empty",
    "new_empty_strided", "permute", "resize_", "select", "slice", "split", "squeeze", "t", "transpose", "unbind",
    "unsqueeze", "view", "_unsafe_view", "_reshape_alias", "result_type", "to", "numpy_T",
}  # fmt: skip
#: Functions for which the host reads what the device computes.
_READS = {
    "item", "tolist", "cpu", "numpy", "nonzero", "bincount", "unique", "__bool__", "__int__", "__float__", "__index__",
}  # fmt: skip


def count_launches(function: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    """What ``function`` returns, and how many kernels it launches: on a CPU, operations that call no other operation."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiled:
        result = function()
    events = profiled.events() or []
    if cuda:
        return result, sum("LaunchKernel" in event.name for event in events)
    return result, sum(_is_leaf(event) for event in events)


def _is_leaf(event: Any) -> bool:
    space, _, name = event.name.partition("::")
    return space in ("aten", "megatron_lsh") and name not in _NO_KERNEL and not event.cpu_children


class Waits(TorchFunctionMode):
    """Within this context: where a GPU makes the host wait, or would. An arrival of counts is one, whatever it reads.

    Attributes:
        found: what was waited for, by name, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._inside = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        picks = args[1] if name in ("__getitem__", "__setitem__") else ()
        indices = picks if isinstance(picks, tuple) else (picks,)
        by_mask = any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)
        if (name in _READS or by_mask) and not self._inside:
            self.found.append(name)
        return function(*args, **(kwargs or {}))

    def __enter__(self) -> Waits:
        self._wait = transport.Arrival.wait
        waits = self

        def counted(arrival: transport.Arrival, *arguments: Any) -> transport.Plan:
            waits.found.append("arrival")
            waits._inside = True
            try:
                return waits._wait(arrival, *arguments)
            finally:
                waits._inside = False

        transport.Arrival.wait = counted  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *reason: Any) -> None:
        super().__exit__(*reason)
        transport.Arrival.wait = self._wait  # type: ignore[method-assign]


@contextmanager
def count_waits(device: torch.device) -> Iterator[list[str]]:
    """The waits within this context, filled in when it ends: on a GPU as CUDA reports them."""
    found: list[str] = []
    if device.type != "cuda":
        with Waits() as waits:
            yield found
        found += waits.found
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found += [f"{w.filename.rsplit('/', 1)[-1]}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
