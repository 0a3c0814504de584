"""Interpolated restoration alone: its forms, several blocks, solvers; time, launches, and errors against fp64.

    python -m benchmarks.restoration --shape mixtral fine          on a GPU
    python -m benchmarks.restoration --device cpu --repeats 1      a small shape
    python -m benchmarks.restoration --device cpu --loop --repeats 31      against the loop over blocks, D 128 to 1,024

The error is that of the rows' change against the same arithmetic in fp64, from the same rows and outputs.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import ROOT, table, write_result
from benchmarks.gpu_layer import SHAPES, Shape
from benchmarks.launches import count_launches
from megatron_lsh import lsh
from megatron_lsh.lsh.cost import choose_restoration
from megatron_lsh.lsh.interpolate import FORMS
from megatron_lsh.lsh.solve import inverse
from megatron_lsh.ops import choose

RATE, RIDGE = 0.2, 0.01


class Rows:
    """Rows of one shape, an equal number for each expert, clustered; and outputs of a smooth expert."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        each, hidden = shape.tokens * shape.topk // shape.experts, shape.hidden
        kinds, noise = (torch.randn(n, hidden, generator=generator) for n in (1000, each * shape.experts))
        rows_ND = kinds[torch.randint(1000, (len(noise),), generator=generator)] + 0.5 * noise
        self.rows_ND = rows_ND.to(device, dtype)
        counts_E = torch.full((shape.experts,), each, device=device)
        budgets_E = lsh.row_budgets(counts_E, RATE)
        projection_NP = lsh.project(self.rows_ND, lsh.make_rotation(hidden, 6, 16, seed=1, device=device))
        start = lsh.cluster_projection(projection_NP, counts_E, budgets_E, int(budgets_E.sum()), 6)
        self.clusters = lsh.refine(self.rows_ND, start, counts_E).known(budgets_E.tolist())
        self.member_C = lsh.nearest_members(self.rows_ND, self.clusters)
        weight_DD = torch.randn(hidden, hidden, generator=generator).to(device) / hidden**0.5
        self.out_CD = torch.tanh(self.rows_ND[self.member_C].float() @ weight_DD).to(dtype)
        self.grad_ND = torch.randn(rows_ND.shape, generator=generator).to(device, dtype)

    def restore(self, form: str, block: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Callable[[], None]]:
        """The restored rows, and their backward pass."""
        rows_ND, out_CD = (t.to(dtype or t.dtype).requires_grad_() for t in (self.rows_ND.clone(), self.out_CD.clone()))
        sent_CD = rows_ND.detach()[self.member_C].requires_grad_()
        y_ND = lsh.interpolate(out_CD, rows_ND, sent_CD, self.clusters, self.member_C, block=block, form=form)
        return y_ND, lambda: y_ND.backward(self.grad_ND.to(y_ND.dtype))


def timed(function: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """ms, median."""
    samples = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        samples.append(1e3 * (time.perf_counter() - started))
    return statistics.median(samples[1:] or samples)


def measure(rows: Rows, form: str, block: int, device: torch.device, repeats: int) -> dict[str, Any]:
    def both() -> None:
        rows.restore(form, block)[1]()

    (y_ND, backward), forward_launches = count_launches(lambda: rows.restore(form, block), device)
    _, backward_launches = count_launches(backward, device)
    exact_ND = rows.restore("outputs", block, torch.float64)[0].detach()
    own_ND = rows.out_CD.double()[rows.clusters.cluster_N]
    error = (y_ND.detach().double() - exact_ND).norm() / (exact_ND - own_ND).norm()
    return {
        "form": form, "block": block, "ms": timed(both, device, repeats), "error": error.item(),
        "launches_forward": forward_launches, "launches_backward": backward_launches,
    }  # fmt: skip


def against_the_loop(device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Time over that of the loop over blocks (the reference of the tests), run in turn, at block 128: median (quartiles).

    On a CPU it is the time of this process, which other processes disturb least.
    """
    from tests.lsh import looped_interpolation  # only a checkout has it

    clock = time.perf_counter if device.type == "cuda" else time.process_time
    ways: dict[str, Callable[..., Tensor]] = {"loop": looped_interpolation.interpolate}
    ways |= {form: functools.partial(lsh.interpolate, form=form) for form in FORMS}
    found = []
    for experts, hidden in ((8, 128), (8, 256), (8, 512), (8, 1024), (64, 256)):
        rows = Rows(Shape(2048, 2, hidden, 4 * hidden, experts), device, torch.float32)
        samples: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats + 2):
            for name, way in ways.items():
                inputs = [t.clone().requires_grad_() for t in (rows.out_CD, rows.rows_ND, rows.rows_ND[rows.member_C])]
                started = clock()
                way(*inputs, rows.clusters, rows.member_C, block=128).backward(rows.grad_ND)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                samples[name].append(clock() - started)
        ratios = {}
        for form in FORMS:
            pairs = zip(samples[form][2:], samples["loop"][2:], strict=True)
            low, median, high = statistics.quantiles([ours / loop for ours, loop in pairs], n=4)
            ratios[form] = f"{median:.2f} ({low:.2f}-{high:.2f})"
        default = choose_restoration(hidden, None, True, RATE, 128).form
        found.append({"experts": experts, "D": hidden, **ratios, "default": default})
    return found


def solvers(block: int, groups: int, device: torch.device, repeats: int) -> dict[str, float]:
    """ms of the ways to invert a batch of kernel matrices."""
    points = torch.randn(groups, block, 32, device=device)
    distances = torch.cdist(points, points).square()
    system = torch.exp(-distances / distances.mean((1, 2), keepdim=True)) + RIDGE * torch.eye(block, device=device)
    identity = torch.eye(block, device=device).expand_as(system)

    def triangular() -> Tensor:
        half = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(system)[0], identity, upper=False)
        return half.transpose(1, 2) @ half

    def newton_schulz() -> Tensor:
        inverse = 2 / (RIDGE + system.abs().sum(2).amax(1))[:, None, None] * identity
        for _ in range(16):
            inverse = inverse @ (2 * identity - system @ inverse)
        return inverse

    ways = {
        "as used": lambda: inverse(system, choose(system)),
        "Cholesky and its inverse": lambda: torch.cholesky_inverse(torch.linalg.cholesky_ex(system)[0]),
        "Cholesky and triangles": triangular,
        "Newton-Schulz": newton_schulz,
    }
    return {name: timed(way, device, repeats) for name, way in ways.items()}


def report(results: list[dict[str, Any]]) -> str:
    return table(list(results[0]), [[f"{v:.3g}" if isinstance(v, float) else v for v in r.values()] for r in results])


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", nargs="*", choices=list(SHAPES), default=["small"])
    parser.add_argument("--blocks", nargs="*", type=int, default=[128, 256, 512, 1024])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--loop", action="store_true", help="compare with the loop over blocks, and nothing else")
    parser.add_argument("--name", default="restoration", help="of the result file")
    arguments = parser.parse_args(words)
    device = torch.device(arguments.device)
    if arguments.loop:
        compared = against_the_loop(device, max(2, arguments.repeats))
        print(report(compared))
        write_result(f"{arguments.name}_loop", {"settings": vars(arguments), "time over the loop's": compared})
        return
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found: dict[str, Any] = {}
    for name in arguments.shape:
        rows = Rows(SHAPES[name], device, dtype)
        each = [measure(rows, form, b, device, arguments.repeats) for b in arguments.blocks for form in FORMS]
        print(f"{name}, {dtype}")
        print(report(each))
        found[name] = each
    inverses = [{"block": b} | solvers(b, 8, device, arguments.repeats) for b in arguments.blocks]
    print(report(inverses))
    path = write_result(arguments.name, {"settings": vars(arguments), "shapes": found, "solvers_ms": inverses})
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
