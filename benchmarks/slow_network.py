"""Step time with the exact all-to-all and with LSH, in several wire dtypes, where the network is slow.

    sudo python -m benchmarks.slow_network --ranks 2 4 --shares 30 45 70
    sudo python -m benchmarks.slow_network --nodes 2x2 --rates exact deduplicated 0.2 0.2/rank --wires model fp8 --chunks 1 2
    sudo python -m benchmarks.slow_network --shape swin --shares 70 --flags --data-path data/digits

Ranks run in network namespaces of this machine that send at a limited rate (benchmarks/slow_link.py). The rate is chosen
by measurement so that the exact all-to-all takes the wanted shares of the step, those of the paper's clusters. Then all
variants take turns, step by step, in the same processes on the same link. Optimizer, attention and the reduction of
gradients over data-parallel ranks are part of every step. With --nodes the ranks of a node share a namespace and fast links.

Beside each speed-up stands its ceiling: what remained of the exact step if compression cost nothing, the all-to-all took as
much less as it sends fewer bytes across, and the experts as much less as they see fewer rows; with rows in pieces, if the
shorter of the two vanished behind the longer. Also compares the payload that the telemetry counts with the
bytes that leave the network interfaces.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import vision
from benchmarks.common import progress, table, write_result
from benchmarks.slow_link import run_ranks, sent_bytes, set_rate, why_not
from benchmarks.variants import Bench, Variant, prepared
from megatron_lsh.families import GPT, SWIN, Family
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.data_parallel import accumulate
from megatron_lsh.parallel.initialize import initialize, shutdown
from megatron_lsh.training.pipeline import to_device
from megatron_lsh.training.run import set_up

MODEL = [
    "--num-layers", 4, "--hidden-size", 256, "--num-attention-heads", 4, "--seq-length", 256, "--vocab-size", 1023,
    "--position-embedding-type", "rope", "--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear",
    "--attention-dropout", 0, "--hidden-dropout", 0, "--num-experts", 8, "--moe-ffn-hidden-size", 1024,
    "--moe-router-topk", 2, "--moe-aux-loss-coeff", 1e-2, "--micro-batch-size", 8, "--mock-data", "--num-workers", 0,
    "--device", "cpu", "--peak-tflops", 1, "--distributed-timeout-minutes", 3,
]  # fmt: skip
QUALITY = [*MODEL, "--hidden-size", 128, "--moe-ffn-hidden-size", 256, "--vocab-size", 4095]
PICTURES = [*vision.MODEL, "--micro-batch-size", 32, "--num-workers", 0, *MODEL[MODEL.index("--device") :]]
SHAPES: dict[str, tuple[Family, list[Any]]] = {
    "wide": (GPT, MODEL),
    "quality": (GPT, QUALITY),
    "swin": (SWIN, PICTURES),
}
"""quality: the model of benchmarks/quality.py, whose loss is known (benchmarks/time_to_loss.py); swin: that of
benchmarks/vision.py, which needs ``--flags --data-path``"""
PORT = 29641
EXACT = Variant()


# On the ranks


def work(arguments: argparse.Namespace) -> None:
    """One rank: find the rates, measure everything in turn; rank 0 writes the figures."""
    ranks, per_node = arguments.ranks[0], arguments.ranks_per_node
    family, flags = SHAPES[arguments.shape]
    micro_batch = flags[flags.index("--micro-batch-size") + 1]
    whole = micro_batch * arguments.micro_batches * ranks
    batch = ["--global-batch-size", whole, "--expert-model-parallel-size", ranks]
    cfg, family = prepared([*flags, *batch, *arguments.flags], ranks, family)
    ctx = initialize(cfg.parallel, moe=True)
    run = set_up(cfg, family, ctx)
    variants = [
        dataclasses.replace(_variant(rows, wire), chunks=chunks)
        for rows in arguments.rates
        for wire in arguments.wires
        for chunks in arguments.chunks
        if not (rows == "deduplicated" and chunks > 1 and per_node == 1)  # its pieces are those inside the node
    ]
    with run.batches("train") as batches:
        bench = Bench(run, batches)
        for variant in dict.fromkeys([EXACT, *variants]):  # first calls, at full speed
            bench.use(variant)
            bench.step()
        bytes_checked = [check_bytes(bench, variant) for variant in dict.fromkeys([EXACT, *variants])]
        bench.use(EXACT)
        before, steps = sent_bytes(), [bench.step() for _ in range(3)]
        most = sum(step["bytes_network"] for step in steps) / crossed_since(before, ctx)
        unshaped = _medians(steps)
        links, started = [], time.monotonic()
        for number, share in enumerate(arguments.shares):
            mbit = find_rate(bench, share / 100, unshaped, most, ranks // per_node)
            samples: dict[Variant, list[dict[str, float]]] = {variant: [] for variant in variants}
            for repeat in range(arguments.repeats):
                order = variants if repeat % 2 == 0 else variants[::-1]  # a drift meets all alike
                for variant in order:
                    bench.use(variant)
                    samples[variant].append(bench.step())
                if ctx.rank == 0:
                    done = number * arguments.repeats + repeat + 1
                    total = len(arguments.shares) * arguments.repeats
                    progress(
                        done, total, started, f"{_where(ranks, per_node)}, all-to-all at {share}%, {mbit:.0f} Mbit/s"
                    )
            links.append({"wanted_share": share / 100, "mbit_per_rank": mbit, "variants": summary(samples)})
    set_rate(None)
    if ctx.rank == 0:
        result = {
            "ranks": ranks,
            "ranks_per_node": per_node,
            "unshaped_exact": unshaped,
            "links": links,
            "bytes": bytes_checked,
        }
        Path(arguments.out).write_text(json.dumps(result))
    shutdown(ctx)


def find_rate(bench: Bench, share: float, unshaped: dict[str, float], most: float, nodes: int) -> float:
    """Set the links so that the exact all-to-all takes `share` of the step; returns Mbit/s per node.

    Raises SystemExit where no link does: gradients cross it as well, once a step, and leave it `most` of the bytes.
    """
    bench.use(EXACT)
    if most < share + 0.05:
        raise SystemExit(
            f"an all-to-all at {share:.0%} of the step cannot be had: it sends {most:.0%} of what crosses the network, the "
            "rest are gradients, which a step sends once: raise --micro-batches"
        )
    wanted_ms = share / (1 - share) * (unshaped["step_ms"] - unshaped["alltoall_ms"])
    mbit = 8e-3 * unshaped["bytes_network"] / nodes / wanted_ms
    for _ in range(4):  # gloo gets less out of a link than its rate, and other traffic slows down, too
        set_rate(mbit)
        bench.step()
        now = _medians([bench.step() for _ in range(2)])
        measured = now["alltoall_ms"] / now["step_ms"]
        if abs(measured - share) < 0.015:
            break
        wanted_ms = share / (1 - share) * (now["step_ms"] - now["alltoall_ms"])
        mbit *= now["alltoall_ms"] / wanted_ms
    return mbit


def check_bytes(bench: Bench, variant: Variant) -> dict[str, Any]:
    """Payload by the telemetry against bytes by the interfaces, over all ranks, in one micro-batch whose gradients stay at
    home: nothing but all-to-alls (and their counts) crosses the network."""
    run = bench.run
    bench.use(variant)
    with run.batches("train") as batches:
        batch = to_device(next(batches), run.ctx.device)
    accumulate(run.model, last=False)
    dist.barrier(group=run.ctx.world.process_group)
    bench.collect()
    before = sent_bytes()
    run.step.forward_step(run.model, batch).objective(micro_batches=1).backward()
    counted = crossed_since(before, run.ctx)
    run.step.optimizer.zero_grad(set_to_none=True)
    payload = bench.collect()["bytes_network"]
    return {"variant": variant.name, "payload": payload, "interface": counted, "ratio": counted / payload}


def crossed_since(before: int, ctx: ParallelContext) -> float:
    """Bytes that left the interfaces of all nodes since this one had sent ``before``."""
    time.sleep(0.2)  # let the last acknowledgements leave
    counted = torch.tensor(float(sent_bytes() - before), dtype=torch.float64)
    dist.all_reduce(counted, group=ctx.world.process_group)
    return float(counted)


def _medians(samples: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(sample[key] for sample in samples) for key in samples[0]}


def summary(samples: dict[Variant, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Per variant: all step times, medians of everything, and the speed-up over exact in the model's numbers."""
    exact = _medians(samples[EXACT])
    exact_ms = exact["step_ms"]
    rows = []
    for variant, steps in samples.items():
        medians = _medians(steps)
        rows.append(
            {
                "variant": variant.name,
                "rate": variant.rate,
                "wire": variant.wire,
                "scope": variant.scope,
                "chunks": variant.chunks,
                "ceiling": ceiling(exact, medians, overlapped=variant.chunks > 1),
                "steps_ms": [round(step["step_ms"], 2) for step in steps],
                "speedup": exact_ms / medians["step_ms"],
                "alltoall_share": medians["alltoall_ms"] / medians["step_ms"],
                **medians,
            }
        )
    return rows


def ceiling(exact: dict[str, float], variant: dict[str, float], *, overlapped: bool) -> float:
    """The speed-up over exact that the module's docstring says, from the exact step's parts and this variant's counts."""
    alltoall_ms = exact["alltoall_ms"] * variant["bytes_network"] / exact["bytes_network"]
    experts_ms = exact["experts_ms"] * variant["expert_rows"]
    rest_ms = exact["step_ms"] - exact["alltoall_ms"] - exact["experts_ms"]
    return exact["step_ms"] / (rest_ms + (max if overlapped else sum)((alltoall_ms, experts_ms)))


# Around the ranks


def words_for(arguments: argparse.Namespace, ranks: int) -> list[object]:
    """What the ranks of one measurement are told."""
    words = ["--ranks", ranks, "--ranks-per-node", arguments.ranks_per_node, "--shape", arguments.shape]
    words += ["--repeats", arguments.repeats, "--micro-batches", arguments.micro_batches, "--shares", *arguments.shares]
    words += ["--wires", *(wire or "model" for wire in arguments.wires), "--chunks", *arguments.chunks]
    return [*words, "--rates", *arguments.rates, "--flags", *arguments.flags]


def report(result: dict[str, Any]) -> str:
    """Markdown: step times per variant and link, then where the time goes, then the count of bytes."""
    links = result["links"]
    header = ["step, ms (quartiles), speed-up (ceiling)"]
    for link in links:
        header.append(f"all-to-all at {_exact(link)['alltoall_share']:.0%}, {link['mbit_per_rank']:.0f} Mbit/s")
    rows = []
    for same in zip(*(link["variants"] for link in links), strict=True):
        rows.append(
            [same[0]["variant"], *(f"{_times(v['steps_ms'])} {v['speedup']:.2f}x ({v['ceiling']:.2f}x)" for v in same)]
        )
    parts = []
    for link in links:
        for v in (v for v in link["variants"] if v["wire"] is None):
            cells = [f"{v[key]:.0f}" for key in ("step_ms", "alltoall_ms", "experts_ms", "lsh_ms", "wire_ms")]
            parts.append(
                [
                    f"{link['mbit_per_rank']:.0f}",
                    v["variant"],
                    *cells,
                    f"{v['bytes'] / 1e6:.1f}",
                    f"{v['bytes_network'] / 1e6:.1f}",
                ]
            )
    counted = [
        [c["variant"], f"{c['payload'] / 1e6:.2f}", f"{c['interface'] / 1e6:.2f}", f"{c['ratio']:.3f}"]
        for c in result["bytes"]
    ]
    return "\n\n".join(
        [
            _where(result["ranks"], result["ranks_per_node"]),
            table(header, rows),
            table(
                [
                    "Mbit/s",
                    "model's numbers",
                    "step, ms",
                    "all-to-all",
                    "experts",
                    "LSH",
                    "encoding",
                    "MB sent",
                    "across",
                ],
                parts,
            ),
            table(["one micro-batch", "payload, MB", "interfaces, MB", "ratio"], counted),
        ]
    )


def _exact(link: dict[str, Any]) -> dict[str, Any]:
    return next(v for v in link["variants"] if v["variant"] == EXACT.name)


def _times(steps_ms: list[float]) -> str:
    median = f"{statistics.median(steps_ms):.0f}"
    if len(steps_ms) < 4:
        return median
    low, _, high = statistics.quantiles(steps_ms, n=4)
    return f"{median} ({low:.0f}-{high:.0f})"


def _where(ranks: int, per_node: int) -> str:
    return f"{ranks} ranks" if per_node == 1 else f"{ranks // per_node} nodes of {per_node} ranks"


def _rows(text: str) -> str:
    if text not in ("exact", "deduplicated"):
        rate, _, scope = text.partition("/")
        float(rate)
        if scope not in ("", "rank", "node"):
            raise ValueError(scope)
    return text


def _nodes(text: str) -> tuple[int, int]:
    nodes, _, ranks = text.partition("x")
    return int(nodes), int(ranks)


def _variant(rows: str, wire: str | None) -> Variant:
    if rows in ("exact", "deduplicated"):
        return Variant(None, wire, deduplicated=rows == "deduplicated")
    rate, _, scope = rows.partition("/")
    return Variant(float(rate), wire, scope=scope or None)


def _wire(text: str) -> str | None:
    return None if text == "model" else text


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[2])
    parser.add_argument("--nodes", type=_nodes, help="e.g. 2x2, two nodes of two ranks; instead of --ranks")
    parser.add_argument("--ranks-per-node", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--shares", nargs="+", type=float, default=[30, 45, 70], help="of exact all-to-all, per cent")
    parser.add_argument(
        "--rates",
        nargs="+",
        type=_rows,
        default=["exact", "deduplicated", "0.1", "0.2", "0.35", "0.5"],
        help="exact, deduplicated (exact, a row per token and node), or the part of the rows that LSH sends: 0.2, 0.2/rank, "
        "0.2/node",
    )
    wires = [None, "bf16", "fp8", "int8", "int4"]
    parser.add_argument("--wires", nargs="+", type=_wire, default=wires, help="model, fp32, bf16, fp8, int8, int4")
    parser.add_argument("--chunks", nargs="+", type=int, default=[1], help="pieces in which rows travel, 1 among them")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shape", choices=list(SHAPES), default="wide", help="of the model")
    parser.add_argument("--micro-batches", type=int, default=2, help="per rank and step")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="last: flags for pretrain_gpt_moe.py")
    parser.add_argument("--name", default="slow_network", help="of the result file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.nodes is not None:
        arguments.ranks, arguments.ranks_per_node = [arguments.nodes[0] * arguments.nodes[1]], arguments.nodes[1]
    if arguments.worker:
        return work(arguments)
    if reason := why_not():
        raise SystemExit(f"slow_network cannot run here: {reason}")
    if "exact" not in arguments.rates or None not in arguments.wires or 1 not in arguments.chunks:
        parser.error("--rates needs exact, --wires model and --chunks 1: everything is compared with them")
    results = []
    for ranks in arguments.ranks:
        own = words_for(arguments, ranks)
        results.append(run_ranks("benchmarks.slow_network", own, PORT, ranks, arguments.ranks_per_node))
        print(f"\n{report(results[-1])}\n", flush=True)
    settings = {
        "model": SHAPES[arguments.shape][1],
        "micro_batches": arguments.micro_batches,
        "flags": arguments.flags,
        "repeats": arguments.repeats,
    }
    path = write_result(arguments.name, settings | {"measurements": results})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
