"""Error and size of rows on the wire, by wire dtype.

    python -m benchmarks.wire_dtypes                  # of random rows
    python -m benchmarks.wire_dtypes --iters 300      # and of rows and their gradients in the model of benchmarks/quality.py

Relative squared error, sum (x' - x)^2 / sum x^2, to nearest; of gradients with stochastic rounding, as they travel.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from benchmarks.clustering import trained
from benchmarks.common import table, write_result
from megatron_lsh.config.moe import WIRE_DTYPES
from megatron_lsh.moe.experts import Experts
from megatron_lsh.moe.wire import make_codec


def error(name: str, rows: Tensor, noise: torch.Generator | None = None) -> float:
    codec = make_codec(name)
    decoded = codec.decode(codec.encode(rows, noise), like=rows)
    return float((decoded - rows).square().sum() / rows.square().sum())


def bytes_per_number(name: str, width: int) -> float:
    return make_codec(name).encode(torch.ones(1, width)).view(torch.uint8).shape[1] / width


def random_rows(width: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1000, width, generator=generator)
    return {"normal": rows, "uneven features": rows * torch.randn(width, generator=generator).exp()}


def rows_of_a_model(iters: int) -> list[tuple[Tensor, Tensor]]:
    """Per MoE layer the rows that travel to the experts, and the gradients of what comes back."""
    found: list[list[Tensor]] = []

    def keep(module: Experts, inputs: Any, output: Tensor) -> None:
        found.append([inputs[0].rows.detach()])
        output.register_hook(found[-1].append)

    with trained(iters, "--train-iters", iters + 1, "--eval-iters", 1) as (run, batches):
        hooks = [m.register_forward_hook(keep) for m in run.model.modules() if isinstance(m, Experts)]
        run.step(batches, iters, stop=False)
        for hook in hooks:
            hook.remove()
    return [(rows, gradient) for rows, gradient in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=[128, 1024, 4096])
    parser.add_argument(
        "--iters", type=int, default=0, help="exact training before rows of a model are taken; 0: none are"
    )
    arguments = parser.parse_args()
    results: list[dict[str, Any]] = []
    for width in arguments.widths:
        for kind, rows in random_rows(width).items():
            results += [
                {
                    "rows": kind,
                    "width": width,
                    "wire": name,
                    "error": error(name, rows),
                    "bytes": bytes_per_number(name, width),
                }
                for name in WIRE_DTYPES
            ]
    if arguments.iters:
        layers = rows_of_a_model(arguments.iters)
        width = layers[0][0].shape[1]
        for kind, number in (("a model's", 0), ("a model's gradients", 1)):
            for name in WIRE_DTYPES:
                noise = torch.Generator().manual_seed(0) if number else None
                mean = sum(error(name, layer[number], noise) for layer in layers) / len(layers)
                results.append(
                    {"rows": kind, "width": width, "wire": name, "error": mean, "bytes": bytes_per_number(name, width)}
                )
    columns = list(dict.fromkeys((r["rows"], r["width"]) for r in results))
    lines = [
        [name, *(f"{r['error']:.1e} ({r['bytes']:.3f})" for r in results if r["wire"] == name)] for name in WIRE_DTYPES
    ]
    print(table(["wire dtype", *(f"{rows}, D {width:,}" for rows, width in columns)], lines))
    print(f"wrote {write_result('wire_dtypes', {'iters': arguments.iters, 'results': results})}")


if __name__ == "__main__":
    main()
