"""What LSH costs beside the experts it relieves: hash, cluster, refine, compress and restore, forward and backward.

    python -m benchmarks.overhead

One rank, one thread, no network. Rows are those of T tokens with K experts each, spread evenly; starting from one size,
each of tokens, width D (with F = 4 D) and experts varies alone. Two shares: LSH against the experts on all rows, which is
what the exact all-to-all would compute; and LSH plus the experts on the centroids against the same, below 1 where LSH
saves time without any network.
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
from megatron_lsh.moe.compressor import LSHCompressor
from megatron_lsh.moe.experts import Experts
from megatron_lsh.moe.telemetry import LSH_STAGES, MoETelemetry
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
    """Compressor and experts of one size, with rows to run them on."""

    def __init__(self, size: Size, lsh: LSHConfig, device: torch.device, dtype: torch.dtype) -> None:
        ctx = offline_context(device=str(device))
        model = ModelConfig(hidden_size=size.hidden, num_layers=1, swiglu=True, add_bias_linear=False)
        moe = MoEConfig(num_experts=size.experts, moe_ffn_hidden_size=size.ffn)
        self.size, self.ctx = size, ctx
        self.telemetry = MoETelemetry([0], size.experts, device)
        self.compressor = LSHCompressor(lsh, size.hidden, 0, self.telemetry, device)
        self.experts = Experts(model, moe, ctx)
        initialize_parameters(self.experts, seed=1)
        self.experts.to(dtype)
        self.rows_ND, self.counts_E = make_rows(size, device, dtype)
        self.grad_ND = torch.randn_like(self.rows_ND)

    def exact(self) -> dict[str, float]:
        """Experts on all rows, forward and backward: ms."""
        rows = self.rows_ND.clone().requires_grad_()
        with self.telemetry.timed(0, "experts_time_ms") as region:
            out = region.leave(self.experts(region.enter(rows), self.counts_E))
        return self._finish(out, "exact_")

    def lsh(self) -> dict[str, float]:
        """Compress, experts on the centroids, restore, forward and backward: ms."""
        rows = self.rows_ND.clone().requires_grad_()
        wire, counts_E, state = self.compressor.compress(rows, self.counts_E, None)
        with self.telemetry.timed(0, "experts_time_ms") as region:
            out = region.leave(self.experts(region.enter(wire), counts_E))
        return self._finish(self.compressor.restore(out, state), "")

    def _finish(self, out: Tensor, prefix: str) -> dict[str, float]:
        out.backward(self.grad_ND)
        self.experts.zero_grad(set_to_none=True)
        (report,) = self.telemetry.collect(self.ctx, iterations=1)
        return {f"{prefix}experts": report.experts_time_ms, **report.lsh_time_ms}


def make_rows(size: Size, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows with some likeness, as tokens have: a few thousand kinds, plus noise; sorted by expert, evenly spread."""
    generator = torch.Generator().manual_seed(0)
    n = size.tokens * size.topk
    kinds = torch.randn(1000, size.hidden, generator=generator)
    rows = kinds[torch.randint(1000, (n,), generator=generator)] + 0.5 * torch.randn(
        n, size.hidden, generator=generator
    )
    counts = torch.full((size.experts,), n // size.experts)
    counts[: n % size.experts] += 1
    return rows.to(device, dtype), counts.to(device)


def measure(layer: Layer, repeats: int) -> dict[str, Any]:
    """Medians in ms, exact and compressed passes in turn; and the shares."""
    samples: list[dict[str, float]] = []
    for repeat in range(repeats + 2):
        sample = layer.exact() | layer.lsh()
        if repeat >= 2:  # first calls
            samples.append(sample)
    medians = {key: statistics.median(sample[key] for sample in samples) for key in samples[0]}
    lsh_each = [sum(sample[stage] for stage in LSH_STAGES) / sample["exact_experts"] for sample in samples]
    lsh = sum(medians[stage] for stage in LSH_STAGES)
    return asdict(layer.size) | {
        "ms": medians,
        "lsh_ms": lsh,
        "share_of_experts": lsh / medians["exact_experts"],
        "share_range": [min(lsh_each), max(lsh_each)],
        "compressed_over_exact": (lsh + medians["experts"]) / medians["exact_experts"],
    }


def report(results: list[dict[str, Any]]) -> str:
    header = ["tokens", "D", "experts", "rows per expert", "experts, all rows, ms", "experts, centroids, ms"]
    header += [f"{stage}, ms" for stage in LSH_STAGES] + ["LSH / experts (range)", "(LSH + centroids) / experts"]
    rows = []
    for r in results:
        low, high = r["share_range"]
        rows.append(
            [
                r["tokens"], r["hidden"], r["experts"], r["tokens"] * r["topk"] // r["experts"],
                f"{r['ms']['exact_experts']:.1f}", f"{r['ms']['experts']:.1f}",
                *(f"{r['ms'][stage]:.2f}" for stage in LSH_STAGES),
                f"{100 * r['share_of_experts']:.1f}% ({100 * low:.1f}-{100 * high:.1f})",
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
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--name", default="overhead", help="of the result file")
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    lsh = LSHConfig(
        lsh_target_rate=arguments.rate, lsh_refine_steps=arguments.refine_steps, lsh_clustering=arguments.clustering
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
