"""One MoE layer on one rank, exact and LSH: time, launches, waits and peak memory, forward and backward.

    python -m benchmarks.gpu_layer --shape mixtral fine            on a GPU
    python -m benchmarks.gpu_layer --device cpu --tokens 1024 --hidden 64 --ffn 128 --experts 8 --topk 2 --repeats 1 --json

Launches and waits are those of the layer with the default LSH flags, its experts replaced by one multiplication: a loop over
experts would be counted with it. With ``--json`` the last line is a JSON object: one shape's figures, or a list of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import ROOT, table, write_result
from benchmarks.launches import count_launches, count_waits
from megatron_lsh.config import LSHConfig, ModelConfig, MoEConfig
from megatron_lsh.moe.experts import Feed
from megatron_lsh.moe.layer import MoELayer
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.parallel.context import offline_context


@dataclass(frozen=True)
class Shape:
    """Experts are SwiGLU."""

    tokens: int
    topk: int
    hidden: int
    ffn: int
    experts: int


SHAPES = {
    "mixtral": Shape(8192, 2, 4096, 14336, 8),
    "fine": Shape(8192, 8, 2048, 768, 128),
    "small": Shape(256, 2, 64, 128, 4),
}


class _Double(nn.Module):
    """In the place of experts, where they are not what is counted."""

    def forward(self, feed: Feed) -> Tensor:
        return feed.then(feed.arrive(feed.rows) * 2)


@torch.no_grad()
def initialize_on_device(layer: nn.Module) -> None:
    """Normal weights, drawn where they lie: from the CPU's generator a billion of them would take longer than the rest."""
    generator = torch.Generator(next(layer.parameters()).device).manual_seed(1)
    for parameter in layer.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.02, generator=generator)
        else:
            parameter.zero_()


class Bench:
    """A layer of one shape, with tokens that have some likeness and a gradient."""

    def __init__(self, shape: Shape, dispatcher: str, device: torch.device) -> None:
        self.device = device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = ModelConfig(hidden_size=shape.hidden, num_layers=1, swiglu=True, add_bias_linear=False)
        moe = MoEConfig(
            num_experts=shape.experts, moe_ffn_hidden_size=shape.ffn, moe_router_topk=shape.topk,
            moe_token_dispatcher_type=dispatcher, moe_router_force_load_balancing=True,
        )  # fmt: skip
        ctx = offline_context(device=str(device))
        self.layer = MoELayer(model, moe, LSHConfig(), ctx, 0, MoETelemetry(device))
        initialize_on_device(self.layer)
        self.layer.experts.to(dtype)
        generator = torch.Generator().manual_seed(0)
        kinds, noise, grad = (
            torch.randn(n, shape.hidden, generator=generator) for n in (1000, shape.tokens, shape.tokens)
        )
        x_TD = kinds[torch.randint(1000, (shape.tokens,), generator=generator)] + 0.5 * noise
        self.x_SBD, self.grad_SBD = (t.unsqueeze(1).to(device, dtype) for t in (x_TD, grad))

    def forward(self) -> Tensor:
        self.layer.zero_grad(set_to_none=True)
        y_SBD, _ = self.layer(self.x_SBD.clone().requires_grad_())
        return y_SBD

    def times(self) -> tuple[float, float]:
        """ms, forward and backward."""
        moments = [self._now()]
        y_SBD = self.forward()
        moments.append(self._now())
        y_SBD.backward(self.grad_SBD)
        moments.append(self._now())
        return 1e3 * (moments[1] - moments[0]), 1e3 * (moments[2] - moments[1])

    def in_a_row(self, passes: int = 8) -> float:
        """ms of a pass forward and backward where many follow one another, as in a step of training: nothing waits for the
        device between them, so that what the host does is hidden behind it, or the other way round."""
        started = self._now()
        for _ in range(passes):
            self.forward().backward(self.grad_SBD)
        return 1e3 * (self._now() - started) / passes

    def counts(self) -> dict[str, Any]:
        """Launches and waits without the experts."""
        experts, self.layer.experts = self.layer.experts, _Double()  # type: ignore[assignment]
        self.forward().backward(self.grad_SBD)  # what happens once
        y_SBD, forward = count_launches(self.forward, self.device)
        _, backward = count_launches(lambda: y_SBD.backward(self.grad_SBD), self.device)
        with count_waits(self.device) as waits:
            y_SBD = self.forward()
        with count_waits(self.device) as waits_backward:
            y_SBD.backward(self.grad_SBD)
        self.layer.experts = experts
        return {
            "launches_forward": forward, "launches_backward": backward,
            "waits": len(waits), "waits_backward": len(waits_backward), "waited_for": waits + waits_backward,
        }  # fmt: skip

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def measure(shape: Shape, device: torch.device, repeats: int) -> dict[str, Any]:
    """Exact and LSH in turn: medians in ms, and counts of the LSH layer."""
    benches = {name: Bench(shape, kind, device) for name, kind in (("exact", "alltoall"), ("lsh", "lsh"))}
    samples: dict[str, list[tuple[float, float, float]]] = {name: [] for name in benches}
    peaks: dict[str, float] = {}
    for repeat in range(repeats + 1):
        for name, bench in benches.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            times = (*bench.times(), bench.in_a_row())
            if repeat or not repeats:  # first calls
                samples[name].append(times)
            peaks[name] = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    found: dict[str, Any] = asdict(shape) | benches["lsh"].counts()
    for name, each in samples.items():
        for kind, values in zip(("forward", "backward", "in_a_row"), zip(*each, strict=True), strict=True):
            found[f"{name}_{kind}_ms"] = statistics.median(values)
            found[f"{name}_{kind}_quartiles_ms"] = (
                statistics.quantiles(values, n=4) if len(values) > 1 else list(values)
            )
        found[f"{name}_peak_gib"] = peaks[name]
    return found


def report(results: list[dict[str, Any]]) -> str:
    keys = [
        "tokens",
        "topk",
        "hidden",
        "ffn",
        "experts",
        "launches_forward",
        "launches_backward",
        "waits",
        "waits_backward",
    ]
    times = [key for key in results[0] if key.endswith(("_ms", "_gib")) and "quartiles" not in key]
    return table([*keys, *times], [[r[k] for k in keys] + [f"{r[k]:.2f}" for k in times] for r in results])


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", nargs="*", choices=list(SHAPES), default=[], help="instead of the five flags below")
    for name, default in asdict(SHAPES["small"]).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON, and write no file")
    parser.add_argument("--name", default="gpu_layer", help="of the result file")
    arguments = parser.parse_args(words)
    given = Shape(**{name: getattr(arguments, name) for name in asdict(SHAPES["small"])})
    shapes = [SHAPES[name] for name in arguments.shape] or [given]
    results = [measure(shape, torch.device(arguments.device), arguments.repeats) for shape in shapes]
    print(report(results))
    if arguments.json:
        print(json.dumps(results[0] if len(results) == 1 else results))
        return
    path = write_result(arguments.name, {"settings": vars(arguments), "shapes": results})
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
