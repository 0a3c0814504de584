"""How far a reader follows a token: files of the package, and changes of file, in one MoE layer, forward and backward.

    python -m benchmarks.token_path                  for each built-in dispatcher, two ranks

Counted while the code runs (``sys.setprofile``): each call of a function of the package, and each return to one, is a change
of file where the file is another than before. docs/architecture.md names the files in reading order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import megatron_lsh
from megatron_lsh.config.model import ModelConfig
from megatron_lsh.config.moe import LSHConfig, MoEConfig
from megatron_lsh.config.parallel import ParallelConfig
from megatron_lsh.moe.layer import MoELayer
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.parameters import initialize_parameters
from megatron_lsh.parallel.testing import run_distributed_test

PACKAGE = str(Path(megatron_lsh.__file__).parent) + "/"
HARNESS = f"{PACKAGE}parallel/testing.py"


class Trail:
    """The files that were executed, one after the other."""

    def __init__(self) -> None:
        self.visited: list[str] = []

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        where: FrameType | None = frame
        if event == "return":
            if not self._ours(frame):
                return
            where = frame.f_back
            while where is not None and not self._ours(where):
                where = where.f_back
        elif event != "call" or not self._ours(frame):
            return
        if where is not None:
            file = where.f_code.co_filename
            if not self.visited or self.visited[-1] != file:
                self.visited.append(file)

    def _ours(self, frame: FrameType) -> bool:
        file = frame.f_code.co_filename
        return file.startswith(PACKAGE) and file != HARNESS


def follow(function: Callable[[], Any]) -> tuple[list[str], Any]:
    """The files that ``function()`` runs through, and its result."""
    path = Trail()
    sys.setprofile(path)
    try:
        result = function()
    finally:
        sys.setprofile(None)
    return path.visited, result


def one_layer(dispatcher: str) -> dict[str, list[str]]:
    """Forward and backward of a layer that has run before, on two ranks."""
    ctx = initialize(ParallelConfig(expert_model_parallel_size=2))
    model = ModelConfig(hidden_size=32, num_layers=1, ffn_hidden_size=64, swiglu=True, add_bias_linear=False)
    moe = MoEConfig(num_experts=4, moe_token_dispatcher_type=dispatcher, moe_aux_loss_coeff=0.01)
    layer = MoELayer(model, moe, LSHConfig(), ctx, 0, MoETelemetry(ctx.device))
    initialize_parameters(layer, 1)
    layer.set_iteration(3, 10)
    x_SBD = torch.randn(64, 2, 32, requires_grad=True)
    for _ in range(2):
        y, aux = layer(x_SBD)
        (y.square().mean() + aux).backward()
    forward, (y, aux) = follow(lambda: layer(x_SBD))
    backward, _ = follow((y.square().mean() + aux).backward)
    return {"forward": forward, "backward": backward}


def main() -> None:
    for dispatcher in ("alltoall", "lsh"):
        found = run_distributed_test(one_layer, 2, dispatcher)[0]
        changes = {name: max(len(visited) - 1, 0) for name, visited in found.items()}
        files = {file for visited in found.values() for file in visited}
        parts = ", ".join(f"{count} {name}" for name, count in changes.items())
        print(f"{dispatcher}: {len(files)} files, {sum(changes.values())} changes of file ({parts})")


if __name__ == "__main__":
    main()
