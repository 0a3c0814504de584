"""Step time of layouts on a slow link between two nodes of two ranks: experts across the link, or a pipeline across it.

    sudo python -m benchmarks.layouts --mbit 50 200 800 --hidden 128 256 512

Across the link are either the experts of each layer (EP 4: exact, de-duplicated, LSH) or the border of two pipeline stages,
with the experts inside the nodes (PP 2, EP 2). All layouts live in the same processes and take turns, step by step, on the
same link, with the same model and global batch. Every step has its optimizer, and its reduction of gradients where a layout
has one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, progress, table, write_result
from benchmarks.slow_link import run_ranks, set_rate, why_not
from benchmarks.slow_network import MODEL
from benchmarks.variants import Bench, Variant, configure
from megatron_lsh.families import GPT
from megatron_lsh.parallel.initialize import initialize, shutdown
from megatron_lsh.training.run import set_up

NODES, RANKS_PER_NODE = 2, 2
PORT = 29645
ACROSS = (Variant(), Variant(deduplicated=True), Variant(rate=0.2))
PIPELINE = "PP 2 across, EP 2 inside"


def layouts(hidden: int, batch: int) -> dict[str, list[Any]]:
    """Flags by name; what is measured of each is a step of the same global batch."""
    model = [
        *MODEL,
        "--moe-node-size",
        RANKS_PER_NODE,
        "--hidden-size",
        hidden,
        "--moe-ffn-hidden-size",
        4 * hidden,
        "--global-batch-size",
        batch,
    ]
    return {
        "EP 4": [*model, "--expert-model-parallel-size", 4],
        PIPELINE: [*model, "--pipeline-model-parallel-size", 2, "--expert-model-parallel-size", 2],
    }


def work(arguments: argparse.Namespace) -> None:
    """One rank: every layout on every link; rank 0 writes the figures."""
    measured: list[dict[str, Any]] = []
    started, total = time.monotonic(), len(arguments.hidden) * len(arguments.mbit) * arguments.repeats
    rank = 0
    for hidden in arguments.hidden:
        with ExitStack() as stack:
            benches = {}
            for name, flags in layouts(hidden, arguments.batch).items():
                cfg = configure([*flags, *arguments.flags], NODES * RANKS_PER_NODE)
                run = set_up(cfg, GPT, initialize(cfg.parallel, moe=True))
                rank = run.ctx.rank
                benches[name] = Bench(run, stack.enter_context(run.batches("train")))
            ways = [("EP 4", variant) for variant in ACROSS] + [(PIPELINE, None)]
            for name, variant in ways:  # first calls, at full speed
                step(benches[name], variant)
            for mbit in arguments.mbit:
                set_rate(mbit)
                times: dict[str, list[float]] = {}
                for repeat in range(arguments.repeats):
                    for name, variant in ways if repeat % 2 == 0 else ways[::-1]:  # a drift meets all alike
                        label = name if variant is None else f"{name} across, {variant.name}"
                        times.setdefault(label, []).append(step(benches[name], variant))
                    if rank == 0:
                        done = len(measured) * arguments.repeats + repeat + 1
                        progress(done, total, started, f"hidden size {hidden}, {mbit:g} Mbit/s")
                measured.append({"hidden": hidden, "mbit_per_node": mbit, "steps_ms": times})
            set_rate(None)
    if rank == 0:
        Path(arguments.out).write_text(json.dumps(measured))
    shutdown(run.ctx)


def step(bench: Bench, variant: Variant | None) -> float:
    """ms of one step; with `variant` as the way of rows."""
    if variant is not None:
        bench.use(variant)
    return bench.step()["step_ms"]


def report(measured: list[dict[str, Any]]) -> str:
    """Markdown: a row per size and link, the fastest layout in bold."""
    names = list(measured[0]["steps_ms"])
    rows = []
    for link in measured:
        medians = {name: statistics.median(link["steps_ms"][name]) for name in names}
        best = min(medians, key=medians.__getitem__)
        cells = [f"**{ms:.0f}**" if name == best else f"{ms:.0f}" for name, ms in medians.items()]
        rows.append([str(link["hidden"]), f"{link['mbit_per_node']:g}", *cells])
    return table(["hidden size", "Mbit/s per node", *(f"{name}, ms" for name in names)], rows)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", nargs="+", type=float, default=[50, 200, 800], help="what each node sends, Mbit/s")
    parser.add_argument(
        "--hidden", nargs="+", type=int, default=[128, 256, 512], help="hidden sizes; experts have 4 times"
    )
    parser.add_argument("--batch", type=int, default=64, help="global batch; micro-batches are of 8 samples")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="last: flags for pretrain_gpt_moe.py")
    parser.add_argument("--name", default="layouts", help="of the result file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.worker:
        return work(arguments)
    if reason := why_not():
        raise SystemExit(f"layouts cannot run here: {reason}")
    own = ["--batch", arguments.batch, "--repeats", arguments.repeats, "--mbit", *arguments.mbit]
    own += ["--hidden", *arguments.hidden, "--flags", *arguments.flags]
    measured = run_ranks("benchmarks.layouts", own, PORT, NODES * RANKS_PER_NODE, RANKS_PER_NODE)
    print(f"\n{report(measured)}\n", flush=True)
    settings = {"model": MODEL, "global_batch": arguments.batch, "flags": arguments.flags, "repeats": arguments.repeats}
    path = write_result(arguments.name, settings | {"measurements": measured})
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
