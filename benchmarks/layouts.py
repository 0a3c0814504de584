"""Step time of layouts on a slow link between two nodes of two ranks: experts across the link, or a pipeline across it.

    sudo python -m benchmarks.layouts --batch 32 --minutes 11 --flags --micro-batch-size 4

Across the link are either the experts of each layer (EP 4: exact, de-duplicated, LSH) or the border of two pipeline stages,
with the experts inside the nodes (PP 2, EP 2). All layouts live in the same processes and take turns, step by step, on the
same link, with the same model and global batch. Every step has its optimizer, and its reduction of gradients where a layout
has one. What is measured of a size and link is kept at once; the same command after a stop measures the rest.

Where ranks share cores, one that waits leaves its core to the others: the bubble of a pipeline, in which ranks wait,
then costs less than on devices of their own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import ROOT, progress, result_path, table, write_result
from benchmarks.slow_link import run_ranks, set_rate, why_not
from benchmarks.slow_network import MODEL
from benchmarks.variants import Bench, Variant, configure
from megatron_lsh.families import GPT
from megatron_lsh.parallel.context import Group
from megatron_lsh.parallel.initialize import initialize, shutdown
from megatron_lsh.training.run import set_up

NODES, RANKS_PER_NODE = 2, 2
PORT = 29645
ACROSS = (Variant(), Variant(deduplicated=True), Variant(rate=0.2))
PIPELINE = "PP 2 across, EP 2 inside"
NOBODY = "nobody, by the quartiles"
LEAST = 3
"""times that each size and link is measured at least, for quartiles"""


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
    """One rank: every layout on every link that is not measured yet; rank 0 writes the figures."""
    kept = Path(arguments.kept)
    measured = read_kept(kept)
    todo = left_to_measure(arguments, measured)
    left = total = sum(len(links) for links in todo.values())
    started, deadline = time.monotonic(), time.monotonic() + 60 * arguments.minutes
    for hidden, links in todo.items():
        with ExitStack() as stack:
            benches = {}
            for name, flags in layouts(hidden, arguments.batch).items():
                cfg = configure([*flags, *arguments.flags], NODES * RANKS_PER_NODE)
                run = set_up(cfg, GPT, initialize(cfg.parallel, moe=True))
                benches[name] = Bench(run, stack.enter_context(run.batches("train")))
            ways = [("EP 4", variant) for variant in ACROSS] + [(PIPELINE, None)]
            for name, variant in ways:  # first calls, at full speed
                step(benches[name], variant)
            for mbit in links:
                set_rate(mbit)
                for name, variant in ways:  # what the link's queue still lets through at once is no measurement
                    step(benches[name], variant)
                times = measure(benches, ways, arguments.repeats, seconds_of_rank_0(deadline, run.ctx.world) / left)
                left -= 1
                measured.append({"hidden": hidden, "mbit_per_node": mbit, "steps_ms": times})
                if run.ctx.rank == 0:
                    kept.write_text(json.dumps(measured))
                    rounds = len(next(iter(times.values())))
                    progress(total - left, total, started, f"hidden size {hidden}, {mbit:g} Mbit/s, {rounds} times")
            set_rate(None)
    if run.ctx.rank == 0:
        Path(arguments.out).write_text(json.dumps(measured))
    shutdown(run.ctx)


def read_kept(path: Path) -> list[dict[str, Any]]:
    """What an earlier call measured before it was stopped."""
    return json.loads(path.read_text()) if path.exists() else []


def left_to_measure(arguments: argparse.Namespace, measured: list[dict[str, Any]]) -> dict[int, list[float]]:
    """Links by size."""
    done = {(link["hidden"], link["mbit_per_node"]) for link in measured}
    links = {hidden: [mbit for mbit in arguments.mbit if (hidden, mbit) not in done] for hidden in arguments.hidden}
    return {hidden: rates for hidden, rates in links.items() if rates}


def seconds_of_rank_0(deadline: float, world: Group) -> float:
    """Left until the deadline, by the clock of rank 0, so that all ranks repeat equally often."""
    seconds = torch.tensor(deadline - time.monotonic(), dtype=torch.float64)
    dist.broadcast(seconds, src=0, group=world.process_group)
    return float(seconds)


def measure(
    benches: dict[str, Bench], ways: Sequence[tuple[str, Variant | None]], repeats: int, seconds: float
) -> dict[str, list[float]]:
    """ms of the steps of every way, by its label: as often as fits into the time, but LEAST times at least."""
    times: dict[str, list[float]] = {}
    spent_ms = 0.0  # of the slowest rank, the same on all
    for repeat in range(repeats):
        if repeat >= LEAST and spent_ms * (1 + 1 / repeat) > 1e3 * seconds:
            break
        for name, variant in ways if repeat % 2 == 0 else ways[::-1]:  # a drift meets all alike
            label = name if variant is None else f"{name} across, {variant.name}"
            times.setdefault(label, []).append(step(benches[name], variant))
            spent_ms += times[label][-1]
    return times


def step(bench: Bench, variant: Variant | None) -> float:
    """ms of one step; with `variant` as the way of rows."""
    if variant is not None:
        bench.use(variant)
    return bench.step()["step_ms"]


def report(measured: list[dict[str, Any]]) -> str:
    """Markdown: a row per size and link, medians with quartiles, the fastest layout in bold; and where each layout wins.

    A layout wins where its third quartile is below the first one of every other; elsewhere nobody does.
    """
    names = list(measured[0]["steps_ms"])
    rows: list[list[str]] = []
    won: dict[str, list[str]] = {name: [] for name in [*names, NOBODY]}
    for link in sorted(measured, key=lambda link: (link["hidden"], link["mbit_per_node"])):
        quartiles = {name: statistics.quantiles(link["steps_ms"][name], n=4, method="inclusive") for name in names}
        best = min(names, key=lambda name: quartiles[name][1])
        wins = all(quartiles[best][2] < quartiles[name][0] for name in names if name != best)
        won[best if wins else NOBODY].append(f"{link['hidden']} at {link['mbit_per_node']:g}")
        cells = []
        for name in names:
            low, middle, high = quartiles[name]
            cells.append(
                f"**{middle:.0f}** ({low:.0f}-{high:.0f})" if name == best else f"{middle:.0f} ({low:.0f}-{high:.0f})"
            )
        rows.append([str(link["hidden"]), f"{link['mbit_per_node']:g}", str(len(link["steps_ms"][best])), *cells])
    header = ["hidden size", "Mbit/s per node", "times", *(f"{name}, ms" for name in names)]
    places = [f"{name}: {', '.join(where) or 'nowhere'}" for name, where in won.items()]
    return table(header, rows) + "\n\nFastest at (hidden size at Mbit/s per node)\n" + "\n".join(places)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", nargs="+", type=float, default=[50, 200, 800], help="what each node sends, Mbit/s")
    parser.add_argument(
        "--hidden", nargs="+", type=int, default=[64, 128, 256], help="hidden sizes; experts have 4 times"
    )
    parser.add_argument("--batch", type=int, default=64, help="global batch; micro-batches are of 8 samples")
    parser.add_argument("--repeats", type=int, default=15, help=f"at most; {LEAST} at least")
    parser.add_argument("--minutes", type=float, default=60.0, help="in which to measure, shared by sizes and links")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="last: flags for pretrain_gpt_moe.py")
    parser.add_argument("--name", default="layouts", help="of the result file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    parser.add_argument("--kept", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.worker:
        return work(arguments)
    if reason := why_not():
        raise SystemExit(f"layouts cannot run here: {reason}")
    kept = result_path(f"{arguments.name}.part")
    kept.parent.mkdir(parents=True, exist_ok=True)
    own = ["--batch", arguments.batch, "--repeats", arguments.repeats, "--minutes", arguments.minutes, "--kept", kept]
    own += ["--mbit", *arguments.mbit]
    own += ["--hidden", *arguments.hidden, "--flags", *arguments.flags]
    measured = read_kept(kept)
    if left_to_measure(arguments, measured):
        measured = run_ranks("benchmarks.layouts", own, PORT, NODES * RANKS_PER_NODE, RANKS_PER_NODE)
    print(f"\n{report(measured)}\n", flush=True)
    settings = {"model": MODEL, "global_batch": arguments.batch, "flags": arguments.flags}
    path = write_result(arguments.name, settings | {"measurements": measured})
    kept.unlink(missing_ok=True)
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
