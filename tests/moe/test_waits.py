"""The host waits for the device once per layer, for the arrival of the counts, and never in a backward pass or replay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from megatron_lsh.config.moe import LSHConfig
from megatron_lsh.config.parallel import ParallelConfig
from megatron_lsh.moe import transport
from megatron_lsh.moe.layer_pass import ReplayMemo
from megatron_lsh.ops.library import STATUS
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.testing import run_distributed_test
from tests.moe.test_dispatchers import make_layer, single, tokens

pytestmark = pytest.mark.skipif("cpu" not in STATUS.devices, reason="without kernels refinement waits too")
WAITS = {
    "item",
    "tolist",
    "cpu",
    "numpy",
    "nonzero",
    "bincount",
    "unique",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
}


class Waits(TorchFunctionMode):
    """Where a GPU would make the host wait; an arrival of counts is one wait, whatever it reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.found: list[str] = []
        self._inside = False
        wait = transport.Arrival.wait

        def counted(arrival, *arguments):
            self.found.append("arrival")
            self._inside = True
            try:
                return wait(arrival, *arguments)
            finally:
                self._inside = False

        monkeypatch.setattr(transport.Arrival, "wait", counted)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        picks = args[1] if name in ("__getitem__", "__setitem__") else ()
        indices = picks if isinstance(picks, tuple) else (picks,)
        by_mask = any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)
        if (name in WAITS or by_mask) and not self._inside:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def count(ctx, kind: str) -> list[list[str]]:
    """What is found in the forward pass, in the backward pass, and in a replay with its backward pass."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        layer, _ = make_layer(ctx, kind, LSHConfig())
        x = tokens(ctx.rank)
        layer(x)[0].sum().backward()  # what is done once
        found = []
        with Waits(monkeypatch) as waits:
            y, aux = layer(x)
            found.append(list(waits.found))
            waits.found.clear()
            (y.pow(2).mean() + aux).backward()
            found.append(list(waits.found))
            memo = ReplayMemo()
            y, aux = checkpoint(lambda inputs: layer(inputs, None, memo), x, use_reentrant=False)
            waits.found.clear()
            (y.pow(2).mean() + aux).backward()
            found.append(list(waits.found))
    return found


@pytest.mark.parametrize("kind", ["alltoall", "lsh"])
def test_a_rank_alone_waits_once(kind: str) -> None:
    assert count(single(), kind) == [["arrival"], [], []]


def on_two_ranks() -> list[list[list[str]]]:
    ctx = initialize(ParallelConfig(expert_model_parallel_size=2))
    return [count(ctx, kind) for kind in ("alltoall", "lsh")]


def test_two_ranks_wait_once() -> None:
    for found in run_distributed_test(on_two_ranks, 2):
        assert found == [[["arrival"], [], []]] * 2
