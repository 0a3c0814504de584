"""The LSH kernels against plain PyTorch operations, and against what the machine can do.

    python -m benchmarks.kernels                  the LSH path, forward and backward, with and without kernels
    python -m benchmarks.kernels --ops            each kernel: time, bytes it must move, share of the copy bandwidth
    python -m benchmarks.kernels --device cuda    both, on a GPU, over many sizes; and the path's share of the experts

The path leads from tokens to their outputs on one rank and back, with a copy in the place of the experts and no network.
What LSH adds is its time less that of the exact dispatcher, which permutes and weighs as well. All variants run in turn,
so that whatever else the machine does hits each of them; reported are medians, quartiles and medians of paired
differences. On a machine that is busy with other things, --clock cpu counts the processor time of all threads instead
of the wall's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import table, write_result
from megatron_lsh import lsh
from megatron_lsh.lsh.blocks import Blocks
from megatron_lsh.moe.permute import permute, sort_by_expert, unpermute
from megatron_lsh.moe.wire import make_codec
from megatron_lsh.ops import PlainOps, choose, describe, reference_only
from megatron_lsh.ops.library import STATUS
from megatron_lsh.ops.wire_formats import FORMATS

HASHES, WIDTH = 6, 16  # the defaults of --lsh-clustering budget
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Size:
    """One MoE layer on one rank: N rows of T = N / K tokens."""

    rows: int = 8192
    hidden: int = 512
    experts: int = 8
    topk: int = 2
    rate: float = 0.2

    def __str__(self) -> str:
        return f"N={self.rows} D={self.hidden} E={self.experts} K={self.topk} rate={self.rate}"


# The sizes of the issue: each axis alone, from a Mixtral-like middle.
GPU_SIZES = [
    *(Size(rows, 4096) for rows in (8192, 16384, 32768, 65536)),
    *(Size(16384, hidden) for hidden in (1024, 2048, 7168)),
    *(Size(16384, 2048, experts, 8) for experts in (32, 128, 256)),
    *(Size(16384, 4096, rate=rate) for rate in (0.1, 0.35, 0.5)),
]
# Layers whose experts LSH is compared to: (size, F).
LAYERS = {"Mixtral": (Size(16384, 4096, 8, 2), 14336), "fine-grained": (Size(65536, 2048, 128, 8), 768)}


class Clock:
    """Times functions on one device: seconds, one after the other."""

    def __init__(self, device: torch.device, cpu_time: bool = False) -> None:
        self._cuda = device.type == "cuda"
        self._now = time.process_time if cpu_time else time.perf_counter
        # Reading and writing more than the last-level cache holds leaves nothing of the inputs in it.
        self._flush = torch.empty(1 << 28, dtype=torch.uint8, device=device) if self._cuda else None

    def __call__(self, function: Callable[[], Any]) -> float:
        if not self._cuda:
            start = self._now()
            function()
            return self._now() - start
        assert self._flush is not None
        self._flush.add_(1)
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        function()
        end_event.record()
        end_event.synchronize()
        return start_event.elapsed_time(end_event) / 1e3


class Inputs:
    """Tokens with some likeness, routed evenly, and everything later stages need."""

    def __init__(self, size: Size, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.size, tokens = size, size.rows // size.topk
        kinds = torch.randn(1000, size.hidden, generator=generator)
        noise = torch.randn(tokens, size.hidden, generator=generator)
        x_TD = (kinds[torch.randint(1000, (tokens,), generator=generator)] + 0.5 * noise).to(device, dtype)
        self.x_TD = x_TD
        self.ids_TK = torch.rand(tokens, size.experts, generator=generator).topk(size.topk).indices.to(device)
        self.probs_TK = torch.rand(tokens, size.topk, generator=generator).to(device)
        self.rows_ND, self.counts_E, self.permutation = permute(x_TD, self.ids_TK, size.experts, num_rows=size.rows)
        self.rotation = lsh.make_rotation(size.hidden, HASHES, WIDTH, seed=1, device=device)
        self.budgets_E = lsh.row_budgets(self.counts_E, size.rate)
        self.num_clusters = int(self.budgets_E.sum())
        self.grad_ND = torch.randn(size.rows, size.hidden, generator=generator).to(device, dtype)
        self.grad_TD = self.grad_ND[:tokens].contiguous()
        self.projection = lsh.project(self.rows_ND, self.rotation)
        start = lsh.cluster_projection(self.projection, self.counts_E, self.budgets_E, self.num_clusters, HASHES)
        self.clusters = lsh.refine(self.rows_ND, start, self.counts_E)


STAGES = ("permute", "project", "cluster", "refine", "compress", "restore", "unpermute", "backward")


class Path:
    """From tokens to their outputs and back, stage by stage. Experts are the identity, so what is timed is all the rest."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, size = inputs, inputs.size
        self.x = inputs.x_TD.detach().requires_grad_()
        self.probs = inputs.probs_TK.detach().requires_grad_()
        self._permute = (inputs.ids_TK, size.experts, size.rows)

    def stages(self) -> dict[str, Callable[[], None]]:
        return {name: getattr(self, name) for name in STAGES if hasattr(self, name)}

    def backward(self) -> None:
        torch.autograd.grad(self.y, (self.x, self.probs), self.inputs.grad_TD)


class ExactPath(Path):
    """Every row travels."""

    def permute(self) -> None:
        self.rows, _, self.permutation = permute(self.x, *self._permute)

    def unpermute(self) -> None:
        self.y = unpermute(self.rows, self.probs, self.permutation)


class LSHPath(Path):
    """What clustering does with ``source``: the rows, or the tokens that ``index`` makes rows of."""

    source: Tensor
    index: Tensor | None = None

    def project(self) -> None:
        self.projection = lsh.project(self.source, self.inputs.rotation)

    def cluster(self) -> None:
        i = self.inputs
        self.clusters = lsh.cluster_projection(
            self.projection, i.counts_E, i.budgets_E, i.num_clusters, HASHES, self.index
        )

    def refine(self) -> None:
        self.clusters = lsh.refine(self.source, self.clusters, self.inputs.counts_E, 1, self.index)


class RowPath(LSHPath):
    """LSH on permuted rows."""

    def permute(self) -> None:
        self.rows, _, self.permutation = permute(self.x, *self._permute)
        self.source = self.rows.detach()

    def compress(self) -> None:
        self.centroids, self.residual = lsh.compress(self.rows, self.clusters, with_residual=True)

    def restore(self) -> None:
        self.restored = lsh.restore(self.centroids, self.residual, self.clusters)

    def unpermute(self) -> None:
        self.y = unpermute(self.restored, self.probs, self.permutation)


class TokenPath(LSHPath):
    """LSH on tokens; "permute" only sorts, and "restore" includes the weighted sum."""

    def permute(self) -> None:
        self.permutation = sort_by_expert(*self._permute)
        self.source, self.index = self.x.detach(), self.permutation.token_of_row_N

    def compress(self) -> None:
        self.slots = lsh.clusters_of_slots(self.clusters, self.permutation.row_of_TK)
        assert self.index is not None
        self.centroids = lsh.compress_tokens(self.x, self.index, self.clusters, self.slots)

    def restore(self) -> None:
        p, kept = self.permutation, self.centroids.detach()
        self.y = lsh.restore_tokens(
            self.centroids, self.probs, self.x, kept, p.token_of_row_N, p.row_of_TK, self.clusters, self.slots
        )


# What is compared: (path, with kernels). The difference to the exact path of the same kind is what LSH adds.
VARIANTS: dict[str, tuple[type[Path], bool]] = {
    "exact, plain": (ExactPath, False),
    "exact, kernels": (ExactPath, True),
    "LSH, plain": (RowPath, False),
    "LSH, kernels, rows": (RowPath, True),
    "LSH, kernels": (TokenPath, True),
}


def compare_paths(inputs: Inputs, clock: Clock, repeats: int) -> dict[str, Any]:
    """Medians of each stage of each variant in ms, runs alternating; and what LSH adds with and without kernels."""
    paths = {name: (path(inputs).stages(), by_kernels) for name, (path, by_kernels) in VARIANTS.items()}
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in paths}
    for repeat in range(repeats + 2):
        for name, (stages, by_kernels) in paths.items():
            with nullcontext() if by_kernels else reference_only():
                sample = {stage: 1e3 * clock(function) for stage, function in stages.items()}
            if repeat >= 2:  # first calls
                samples[name].append(sample | {"total": sum(sample.values())})
    result: dict[str, Any] = {"size": asdict(inputs.size), "repeats": repeats, "variants": {}}
    for name, runs in samples.items():
        totals = [run["total"] for run in runs]
        result["variants"][name] = {
            "median": {stage: statistics.median(run[stage] for run in runs) for stage in runs[0]},
            "quartiles": statistics.quantiles(totals, n=4),
            "least": min(totals),
        }

    def added(lsh_name: str, exact_name: str) -> list[float]:
        pairs = zip(samples[lsh_name], samples[exact_name], strict=True)
        return [ours["total"] - exact["total"] for ours, exact in pairs]

    def least(name: str) -> float:
        return result["variants"][name]["least"]

    plain, ours = added("LSH, plain", "exact, plain"), added("LSH, kernels", "exact, kernels")
    result["added_plain"], result["added_kernels"] = statistics.median(plain), statistics.median(ours)
    result["added_plain_quartiles"] = statistics.quantiles(plain, n=4)
    result["added_kernels_quartiles"] = statistics.quantiles(ours, n=4)
    result["added_plain_least"] = least("LSH, plain") - least("exact, plain")
    result["added_kernels_least"] = least("LSH, kernels") - least("exact, kernels")
    return result


def report_paths(results: list[dict[str, Any]]) -> str:
    lines = []
    for r in results:
        rows = []
        for name, v in r["variants"].items():
            stage_times = [f"{v['median'][stage]:.2f}" if stage in v["median"] else "" for stage in (*STAGES, "total")]
            low, _, high = v["quartiles"]
            rows.append([name, *stage_times, f"{low:.2f}-{high:.2f}", f"{v['least']:.2f}"])
        lines.append(f"{Size(**r['size'])}; ms, medians of {r['repeats']}; quartiles and least are of the total")
        lines.append(table(["", *STAGES, "total", "quartiles", "least"], rows))
        (a, _, b), (c, _, d) = r["added_plain_quartiles"], r["added_kernels_quartiles"]
        lines.append(
            f"LSH adds {r['added_plain']:.1f} ms plain ({a:.1f}-{b:.1f}, least {r['added_plain_least']:.1f}), "
            f"{r['added_kernels']:.1f} ms with kernels ({c:.1f}-{d:.1f}, least {r['added_kernels_least']:.1f}): "
            f"{r['added_plain'] / r['added_kernels']:.1f} times less "
            f"(by the least {r['added_plain_least'] / r['added_kernels_least']:.1f})\n"
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class Measured:
    """One op: how to run it with and without kernels, and the bytes and operations it cannot avoid."""

    name: str
    run: Callable[[], Any]
    plain: Callable[[], Any]
    bytes: float
    flops: float = 0.0


def ops(inputs: Inputs) -> Iterator[Measured]:
    """The kernels of docs/kernels.md with the floors given there."""
    size, clusters, n = inputs.size, inputs.clusters, inputs.rows_ND.element_size()
    rows, hidden, count, tokens = size.rows, size.hidden, inputs.num_clusters, size.rows // size.topk
    row_bytes, wire_bytes, columns = rows * hidden * n, count * hidden * n, HASHES * WIDTH
    ends, cluster_ends = inputs.counts_E.cumsum(0), inputs.budgets_E.cumsum(0)
    op, bits = torch.ops.megatron_lsh, (2 * WIDTH - 1).bit_length()
    key = op.hash(inputs.projection, None, ends, HASHES, bits)
    centroids, residual = lsh.compress(inputs.rows_ND, clusters, with_residual=True)
    nearest, distance = op.nearest(inputs.rows_ND, None, centroids, ends, cluster_ends)
    order = (clusters.order_N, clusters.offsets_C, clusters.sizes_C)
    counts, budgets = inputs.counts_E.tolist(), inputs.budgets_E.tolist()
    cluster_N1, cluster_TK = clusters.cluster_N[:, None], clusters.cluster_N[inputs.permutation.row_of_TK]
    per_row = 8 * rows

    if inputs.rows_ND.device.type == "cpu":
        yield Measured(
            "project", lambda: op.project(inputs.rows_ND, inputs.rotation),
            lambda: inputs.rows_ND.float() @ inputs.rotation,
            row_bytes + 4 * rows * columns, 2.0 * rows * hidden * columns,
        )  # fmt: skip
    yield Measured(
        "hash", lambda: op.hash(inputs.projection, None, ends, HASHES, bits),
        lambda: lsh.codes_of(inputs.projection, HASHES), 4 * rows * columns + per_row,
    )  # fmt: skip
    yield Measured(
        "plan", lambda: op.plan(key, inputs.projection, None, ends, cluster_ends, count, HASHES, bits),
        lambda: lsh.cluster_by_budget(
            lsh.codes_of(inputs.projection, HASHES), inputs.projection, inputs.counts_E, inputs.budgets_E, count, 2 * WIDTH
        ),
        4 * rows * columns + 3 * per_row,
    )  # fmt: skip
    yield Measured(
        "nearest", lambda: op.nearest(inputs.rows_ND, None, centroids, ends, cluster_ends),
        lambda: lsh.nearest_centroid(inputs.rows_ND, centroids, counts, budgets),
        row_bytes + wire_bytes + 1.5 * per_row,
        2.0 * hidden * sum(r * c for r, c in zip(counts, budgets, strict=True)),
    )  # fmt: skip
    yield Measured(
        "regroup", lambda: op.regroup(nearest, distance, ends, cluster_ends, count),
        lambda: lsh.refine(inputs.rows_ND[:, :1], clusters, inputs.counts_E), 3.5 * per_row,
    )  # fmt: skip
    yield Measured(
        "segment (mean)", lambda: op.segment(inputs.rows_ND, None, None, *order, True),
        lambda: lsh.compress(inputs.rows_ND, clusters, with_residual=False), row_bytes + wire_bytes + per_row,
    )  # fmt: skip
    yield Measured(
        "segment_residual", lambda: op.segment_residual(inputs.rows_ND, *order),
        lambda: lsh.compress(inputs.rows_ND, clusters, with_residual=True), 2 * row_bytes + wire_bytes + per_row,
    )  # fmt: skip
    yield Measured(
        "members", lambda: op.members(inputs.rows_ND, *order),
        lambda: PlainOps().members(inputs.rows_ND, *order), row_bytes + 2 * per_row + 24 * count,
    )  # fmt: skip
    yield Measured(
        "combine (restore rows)", lambda: op.combine(centroids, cluster_N1, None, residual, None),
        lambda: lsh.restore(centroids, residual, clusters), 2 * row_bytes + wire_bytes + per_row,
    )  # fmt: skip
    yield Measured(
        "combine (restore tokens)", lambda: op.combine(centroids, cluster_TK, inputs.probs_TK, inputs.x_TD, centroids),
        lambda: unpermute(lsh.restore(centroids, residual, clusters), inputs.probs_TK, inputs.permutation),
        2 * tokens * hidden * n + 2 * wire_bytes + 1.5 * per_row,
    )  # fmt: skip
    yield Measured(
        "dots", lambda: op.dots(inputs.grad_TD, centroids, cluster_TK, inputs.x_TD, centroids),
        lambda: (centroids[cluster_TK] * inputs.grad_TD[:, None]).sum(-1),
        2 * tokens * hidden * n + 2 * wire_bytes + 1.5 * per_row,
    )  # fmt: skip
    yield Measured(
        "spread", lambda: op.spread(inputs.grad_ND, None, centroids, centroids, cluster_N1, clusters.sizes_C),
        lambda: inputs.grad_ND - centroids[clusters.cluster_N] + centroids[clusters.cluster_N],
        2 * row_bytes + 2 * wire_bytes + per_row,
    )  # fmt: skip
    yield from _grouped_products(inputs)
    codec, int8 = make_codec("int8"), FORMATS.index("int8")
    payload = codec.encode(centroids.detach())
    yield Measured(
        "encode (int8)", lambda: op.encode(centroids, None, int8), lambda: codec.encode(centroids),
        wire_bytes + payload.numel(),
    )  # fmt: skip
    yield Measured(
        "decode (int8)", lambda: op.decode(payload, int8, hidden, centroids.dtype),
        lambda: codec.decode(payload, like=centroids), wire_bytes + payload.numel(),
    )  # fmt: skip


def _grouped_products(inputs: Inputs) -> Iterator[Measured]:
    """Of interpolated restoration, in fp32: a block of representatives for every expert."""
    budgets, hidden = inputs.budgets_E.tolist(), inputs.size.hidden
    blocks, plain = Blocks.of(inputs.clusters, None, max(budgets), budgets, torch.float32), PlainOps()
    (groups, block), device = blocks.shape, inputs.rows_ND.device
    ours = choose(inputs.rows_ND.new_empty(0, dtype=torch.float32))
    around_NB = torch.rand(inputs.size.rows, block, device=device) * blocks.valid_GB[blocks.block_N]
    weights_GBD = torch.rand(groups, block, hidden, device=device) * blocks.valid_GB.unsqueeze(2)
    rows_ND = inputs.rows_ND.float()
    least = 4.0 * (around_NB.numel() + weights_GBD.numel() + rows_ND.numel())
    flops = 2.0 * around_NB.numel() * hidden
    yield Measured(
        "grouped", lambda: ours.grouped(around_NB, weights_GBD, blocks.rows),
        lambda: plain.grouped(around_NB, weights_GBD, blocks.rows), least, flops,
    )  # fmt: skip
    yield Measured(
        "grouped_outer", lambda: ours.grouped_outer(around_NB, rows_ND, blocks.rows),
        lambda: plain.grouped_outer(around_NB, rows_ND, blocks.rows), least, flops,
    )  # fmt: skip


def copy_bandwidth(clock: Clock, device: torch.device) -> float:
    """Bytes per second of a large copy on the device, read plus written."""
    source = torch.empty(1 << (30 if device.type == "cuda" else 26), dtype=torch.uint8, device=device).random_()
    to = torch.empty_like(source)
    return 2 * source.numel() / min(clock(lambda: to.copy_(source)) for _ in range(20))


def measure_ops(inputs: Inputs, clock: Clock, repeats: int, bandwidth: float) -> list[dict[str, Any]]:
    results = []
    for op in ops(inputs):
        ours, plain = [], []
        for repeat in range(repeats + 2):
            with reference_only():
                plain_time = clock(op.plain)
            our_time = clock(op.run)
            if repeat >= 2:
                ours.append(our_time)
                plain.append(plain_time)
        median = statistics.median(ours)
        results.append({
            "op": op.name, "ms": 1e3 * median, "least_ms": 1e3 * min(ours), "plain_ms": 1e3 * statistics.median(plain),
            "bytes": op.bytes, "flops": op.flops, "share_of_copy": op.bytes / min(ours) / bandwidth,
        })  # fmt: skip
    return results


def ops_table(results: list[dict[str, Any]]) -> str:
    rows = [
        [
            r["op"], f"{r['ms']:.3f}", f"{r['least_ms']:.3f}", f"{r['plain_ms']:.3f}", f"{r['bytes'] / 1e6:.1f}",
            f"{r['flops'] / r['least_ms'] / 1e6:.0f}" if r["flops"] else "", f"{100 * r['share_of_copy']:.0f}%",
        ]
        for r in results
    ]  # fmt: skip
    return table(["op", "ms", "least ms", "plain ms", "MB", "GFLOP/s", "of copy bandwidth (least)"], rows)


def experts_time(size: Size, ffn: int, clock: Clock, dtype: torch.dtype, device: torch.device, repeats: int) -> float:
    """Seconds of the SwiGLU experts of a layer on all rows, forward and backward."""
    per_expert = size.rows // size.experts
    ends = torch.arange(1, size.experts + 1, device=device, dtype=torch.int32) * per_expert
    x = torch.randn(per_expert * size.experts, size.hidden, device=device, dtype=dtype, requires_grad=True)
    up = torch.randn(size.experts, size.hidden, 2 * ffn, device=device, dtype=dtype, requires_grad=True)
    down = torch.randn(size.experts, ffn, size.hidden, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn_like(x)

    def run() -> None:
        gate, value = F.grouped_mm(x, up, offs=ends).chunk(2, dim=-1)
        torch.autograd.grad(F.grouped_mm(F.silu(gate) * value, down, offs=ends), (x, up, down), grad)

    return statistics.median([clock(run) for _ in range(repeats + 2)][2:])


def shares_of_experts(clock: Clock, dtype: torch.dtype, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    results = []
    for name, (size, ffn) in LAYERS.items():
        path = compare_paths(Inputs(size, device, dtype), clock, repeats)
        experts = 1e3 * experts_time(size, ffn, clock, dtype, device, repeats)
        results.append({"layer": name, "experts_ms": experts, **path})
        ours, plain = path["added_kernels"], path["added_plain"]
        print(f"{name}: experts {experts:.2f} ms, LSH adds {ours:.2f} ms with kernels ({100 * ours / experts:.1f}%), "
              f"{plain:.2f} ms without ({100 * plain / experts:.1f}%)", flush=True)  # fmt: skip
    return results


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Size()
    parser.add_argument("--rows", type=int, default=defaults.rows)
    parser.add_argument("--hidden", type=int, default=defaults.hidden)
    parser.add_argument("--experts", type=int, default=defaults.experts)
    parser.add_argument("--topk", type=int, default=defaults.topk)
    parser.add_argument("--rate", type=float, default=defaults.rate)
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="on a CPU")
    parser.add_argument("--ops", action="store_true", help="each kernel alone")
    parser.add_argument("--name", default="kernels", help="of the result file")
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    dtype = DTYPES[arguments.dtype or ("bf16" if on_gpu else "fp32")]
    print(describe(device.type))
    if device.type not in STATUS.devices:
        raise SystemExit("nothing to compare")

    clock = Clock(device, arguments.clock == "cpu")
    one = Size(arguments.rows, arguments.hidden, arguments.experts, arguments.topk, arguments.rate)
    sizes = GPU_SIZES if on_gpu and one == defaults else [one]
    bandwidth = copy_bandwidth(clock, device)
    print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s, {dtype}, {arguments.threads} threads, {arguments.clock} clock\n")
    result: dict[str, Any] = {"dtype": str(dtype), "threads": arguments.threads, "clock": arguments.clock}
    result["copy_bytes_per_s"] = bandwidth
    if arguments.ops or on_gpu:
        result["ops"] = {}
        for size in sizes:
            result["ops"][str(size)] = measure_ops(Inputs(size, device, dtype), clock, arguments.repeats, bandwidth)
            print(f"{size}\n{ops_table(result['ops'][str(size)])}\n", flush=True)
    if not arguments.ops:
        result["paths"] = [compare_paths(Inputs(size, device, dtype), clock, arguments.repeats) for size in sizes]
        print(report_paths(result["paths"]))
    if on_gpu:
        result["layers"] = shares_of_experts(clock, dtype, device, arguments.repeats)
    print(f"\nwritten to {write_result(arguments.name, result)}")


if __name__ == "__main__":
    main()
