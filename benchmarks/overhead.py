"""What LSH costs beside the MoE layer's own compute: hash, cluster, refine, compress and restore, forward and backward.

    python -m benchmarks.overhead

One rank, one thread, no network. T tokens with K experts each, spread evenly; starting from one size, each of tokens,
width D (with F = 4 D) and experts varies alone. Two shares: LSH against the exact layer from tokens to outputs (permutation,
experts on all rows, weighted sum); and the layer with LSH against the same, below 1 where LSH saves time without any
network. Where kernels are built, restoring includes the weighted sum, which is therefore counted as LSH.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import ROOT, progress, table, write_result
from megatron_lsh.config import LSHConfig, ModelConfig, MoEConfig
from megatron_lsh.moe.compressors.lsh import STAGES as LSH_STAGES
from megatron_lsh.moe.experts import Experts
from megatron_lsh.moe.layer import GAUGES
from megatron_lsh.moe.layer_pass import LayerPass
from megatron_lsh.moe.registry import DispatcherSpec, lsh_dispatcher, row_dispatcher
from megatron_lsh.moe.router import Routing
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.parallel.context import offline_context
from megatron_lsh.parallel.parameters import initialize_parameters


@dataclass(frozen=True)
class Size:
    """One MoE layer on one rank; experts are SwiGLU of width F = 4 D."""

    tokens: int = 2048
    hidden: int = 256
    experts: int = 8
    topk: int = 2

    @property
    def ffn(self) -> int:
        return 4 * self.hidden


def sizes(tokens: list[int], hidden: list[int], experts: list[int]) -> list[Size]:
    """The base size, and each axis varied alone."""
    base = Size()
    varied = [replace(base, tokens=n) for n in tokens] + [replace(base, hidden=n) for n in hidden]
    return list(dict.fromkeys([*varied, *(replace(base, experts=n) for n in experts)]))


class Layer:
    """Compressor and experts of one size, with tokens to run them on."""

    def __init__(self, size: Size, lsh: LSHConfig, device: torch.device, dtype: torch.dtype) -> None:
        ctx = offline_context(device=str(device))
        model = ModelConfig(hidden_size=size.hidden, num_layers=1, swiglu=True, add_bias_linear=False)
        moe = MoEConfig(num_experts=size.experts, moe_ffn_hidden_size=size.ffn)
        self.size, self.ctx = size, ctx
        self.telemetry = MoETelemetry(device)
        self.record = self.telemetry.layer(0, size.experts, GAUGES)
        spec = DispatcherSpec(moe, lsh, ctx, size.hidden, size.experts, 0)
        self.dispatchers = {"exact_": row_dispatcher(spec), "": lsh_dispatcher(spec)}
        self.experts = Experts(model, moe, ctx)
        initialize_parameters(self.experts, seed=1)
        self.experts.to(dtype)
        self.tokens_TD = make_tokens(size).to(device, dtype)
        self.ids_TK = spread_evenly(size).to(device)
        self.probs_TK = torch.full(self.ids_TK.shape, 1 / size.topk, device=device)
        self.grad_TD = torch.randn_like(self.tokens_TD)

    def exact(self) -> dict[str, float]:
        """The layer without compression, forward and backward: ms."""
        return self._time("exact_")

    def lsh(self) -> dict[str, float]:
        """The layer with compression, by kernels where there are any, forward and backward: ms."""
        return self._time("")

    def _time(self, prefix: str) -> dict[str, float]:
        started, (x_TD, probs_TK) = time.perf_counter(), self._inputs()
        zero = torch.zeros((), device=x_TD.device)
        routing = Routing(self.ids_TK, probs_TK, zero, zero, zero, torch.bincount(self.ids_TK.flatten()), complete=True)
        y_TD = self.dispatchers[prefix](x_TD, routing, self.experts, LayerPass(self.record))
        return self._finish(y_TD, started, prefix)

    def _inputs(self) -> tuple[Tensor, Tensor]:
        return self.tokens_TD.clone().requires_grad_(), self.probs_TK.clone().requires_grad_()

    def _finish(self, y_TD: Tensor, started: float, prefix: str) -> dict[str, float]:
        y_TD.backward(self.grad_TD)
        if y_TD.is_cuda:
            torch.cuda.synchronize()
        layer_ms = 1e3 * (time.perf_counter() - started)
        self.experts.zero_grad(set_to_none=True)
        (report,) = self.telemetry.collect(self.ctx, iterations=1)
        stages = {stage: ms for stage in LSH_STAGES if (ms := report[f"lsh_{stage}_time_ms"]) is not None}
        return {f"{prefix}layer": layer_ms, f"{prefix}experts": report["experts_time_ms"] or 0.0, **stages}


def make_tokens(size: Size) -> Tensor:
    """Tokens with some likeness, as those of a text have: a thousand kinds, plus noise."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(1000, size.hidden, generator=generator)
    noise = torch.randn(size.tokens, size.hidden, generator=generator)
    return kinds[torch.randint(1000, (size.tokens,), generator=generator)] + 0.5 * noise


def spread_evenly(size: Size) -> Tensor:
    """int64 [T, K]: every expert gets the same number of tokens, give or take one."""
    first_T = torch.randperm(size.tokens, generator=torch.Generator().manual_seed(1)).unsqueeze(1)
    return (first_T + torch.arange(size.topk) * (size.experts // size.topk)) % size.experts


def measure(layer: Layer, repeats: int) -> dict[str, Any]:
    """Medians in ms, exact and compressed passes in turn; and the shares."""
    samples: list[dict[str, float]] = []
    for repeat in range(repeats + 2):
        sample = layer.exact() | layer.lsh()
        if repeat >= 2:  # first calls
            samples.append(sample)
    medians = {key: statistics.median(sample[key] for sample in samples) for key in samples[0]}
    lsh_each = [sum(sample[stage] for stage in LSH_STAGES) / sample["exact_layer"] for sample in samples]
    lsh = sum(medians[stage] for stage in LSH_STAGES)
    return asdict(layer.size) | {
        "ms": medians,
        "lsh_ms": lsh,
        "share_of_layer": lsh / medians["exact_layer"],
        "share_range": [min(lsh_each), max(lsh_each)],
        "compressed_over_exact": medians["layer"] / medians["exact_layer"],
    }


def report(results: list[dict[str, Any]]) -> str:
    header = [
        "tokens",
        "D",
        "experts",
        "rows per expert",
        "exact layer, ms",
        "its experts",
        "layer with LSH, ms",
        "its experts",
    ]
    header += [f"{stage}, ms" for stage in LSH_STAGES] + ["LSH / exact layer (range)", "layer with LSH / exact"]
    rows = []
    for r in results:
        low, high = r["share_range"]
        rows.append(
            [
                r["tokens"], r["hidden"], r["experts"], r["tokens"] * r["topk"] // r["experts"],
                *(f"{r['ms'][key]:.1f}" for key in ("exact_layer", "exact_experts", "layer", "experts")),
                *(f"{r['ms'][stage]:.2f}" for stage in LSH_STAGES),
                f"{100 * r['share_of_layer']:.1f}% ({100 * low:.1f}-{100 * high:.1f})",
                f"{r['compressed_over_exact']:.2f}",
            ]
        )  # fmt: skip
    return table(header, rows)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="*", type=int, default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--hidden", nargs="*", type=int, default=[128, 256, 512, 1024])
    parser.add_argument("--experts", nargs="*", type=int, default=[4, 8, 16, 64])
    parser.add_argument("--rate", type=float, default=0.2)
    parser.add_argument("--refine-steps", type=int, default=1)
    parser.add_argument("--clustering", choices=["budget", "bucket"], default="budget")
    residuals = ["none", "identity", "interpolate"]
    parser.add_argument("--residual", choices=residuals, default=LSHConfig().lsh_residual)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--name", default="overhead", help="of the result file")
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    lsh = LSHConfig(
        lsh_target_rate=str(arguments.rate),
        lsh_refine_steps=arguments.refine_steps,
        lsh_clustering=arguments.clustering,
        lsh_residual=arguments.residual,
    )
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    results, started = [], time.monotonic()
    wanted = sizes(arguments.tokens, arguments.hidden, arguments.experts)
    for size in wanted:
        results.append(measure(Layer(size, lsh, torch.device(arguments.device), dtype), arguments.repeats))
        progress(len(results), len(wanted), started, str(size))
    print(f"\n{report(results)}\n")
    path = write_result(arguments.name, {"settings": vars(arguments), "sizes": results})
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
