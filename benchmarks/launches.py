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
from torch.utils._pytree import tree_leaves

from megatron_lsh.moe.exchange_plan import Arrival

#: Only a tensor's shape or its memory; no kernel runs.
_NO_KERNEL = {
    "alias", "as_strided", "chunk", "detach", "empty", "empty_like", "empty_strided", "expand", "lift_fresh", "new_empty",
    "new_empty_strided", "permute", "resize_", "select", "slice", "split", "squeeze", "t", "transpose", "unbind",
    "unsqueeze", "view", "_unsafe_view", "_reshape_alias", "result_type", "to", "numpy_T",
}  # fmt: skip
#: Functions for which the host reads what the device computes.
_READS = {
    "item", "tolist", "cpu", "numpy", "nonzero", "argwhere", "bincount", "unique", "unique_consecutive", "masked_select",
    "equal", "allclose", "is_nonzero", "__bool__", "__int__", "__float__", "__index__",
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
    """Within this context: where a GPU makes the host wait, or would. The arrival of counts is one, in whatever it ends.

    On a CPU every tensor could be read at once. What a GPU's program would have on the host is what was made without a
    ``device``, counts that have arrived, and what is computed of these alone, until ``to`` sends it away.

    Attributes:
        found: what was waited for, by name, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = all(map(_is_on_host, tensors)) if tensors else kwargs.get("device") is None
        if not here and self._waits(name, args, kwargs):
            self.found.append(name)
        result = function(*args, **kwargs)
        if here and name == "to" and any(isinstance(a, (torch.device, str)) for a in (*args, *kwargs.values())):
            return result.view_as(result)
        if here:
            _put_on_host(result)
        return result

    @staticmethod
    def _waits(name: str, args: Any, kwargs: Any) -> bool:
        if name == "copy_":
            return _is_on_host(args[0])
        if name == "repeat_interleave":  # how long the result is, only the device knows
            return kwargs.get("output_size") is None
        picks = args[1] if name in ("__getitem__", "__setitem__") else ()
        indices = picks if isinstance(picks, tuple) else (picks,)
        return name in _READS or any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)

    def __enter__(self) -> Waits:
        self._wait = Arrival.wait
        waits = self

        def counted(arrival: Arrival) -> Tensor:
            waits.found.append("arrival")
            _put_on_host(arrival._counts)
            return waits._wait(arrival)

        Arrival.wait = counted  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *reason: Any) -> None:
        super().__exit__(*reason)
        Arrival.wait = self._wait  # type: ignore[method-assign]


def _put_on_host(result: Any) -> None:
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor):
            leaf._waits_on_host = True  # type: ignore[attr-defined]


def _is_on_host(tensor: Tensor) -> bool:
    return getattr(tensor, "_waits_on_host", False)


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
