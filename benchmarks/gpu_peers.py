"""The exact MoE layer beside transformers' Mixtral block, grouped and eager, forward and backward on one GPU.

    python -m benchmarks.gpu_peers

Same shape (8,192 tokens, top-2 of 8 experts, D 4096, F 14336), bf16, random weights; three passes in a row, in turn.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.common import ROOT, table, write_result
from benchmarks.gpu_layer import SHAPES, Bench, Shape, initialize_on_device

PASSES = 3


def transformers_block(shape: Shape, kind: str, device: torch.device) -> nn.Module:
    """``kind``: "grouped_mm" or "eager", a loop."""
    module = importlib.import_module("transformers.models.mixtral.modeling_mixtral")
    config = importlib.import_module("transformers").MixtralConfig(
        hidden_size=shape.hidden, intermediate_size=shape.ffn, num_local_experts=shape.experts,
        num_experts_per_tok=shape.topk,
    )  # fmt: skip
    config._experts_implementation = kind
    with torch.device(device):
        block = module.MixtralSparseMoeBlock(config).to(torch.bfloat16)
    initialize_on_device(block)
    return block


def pass_through(block: nn.Module, bench: Bench) -> None:
    block.zero_grad(set_to_none=True)
    y = block(bench.x_SBD.transpose(0, 1).clone().requires_grad_())
    (y[0] if isinstance(y, tuple) else y).backward(bench.grad_SBD.transpose(0, 1))


def measure(shape: Shape, device: torch.device, repeats: int) -> dict[str, Any]:
    """ms of a pass: median, least and most."""
    bench = Bench(shape, "alltoall", device)
    ways: dict[str, Callable[[], None]] = {"megatron_lsh, exact": lambda: bench.forward().backward(bench.grad_SBD)}
    for kind in ("grouped_mm", "eager"):
        ways[f"transformers, {kind}"] = partial(pass_through, transformers_block(shape, kind, device), bench)
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 2):
        for name, way in ways.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(PASSES):
                way()
            end.record()
            end.synchronize()
            if repeat >= 2:  # first calls
                samples[name].append(begin.elapsed_time(end) / PASSES)
    return {name: [statistics.median(each), min(each), max(each)] for name, each in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=6)
    arguments = parser.parse_args()
    found = measure(SHAPES["mixtral"], torch.device("cuda"), arguments.repeats)
    print(table(["", "ms", "least", "most"], [[name, *(f"{v:.2f}" for v in values)] for name, values in found.items()]))
    version = importlib.import_module("transformers").__version__
    path = write_result("gpu_peers", {"transformers": version, "ms": found})
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
