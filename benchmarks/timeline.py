"""Draws docs/figures/timeline.png: what overlaps with what in one MoE layer where the network is slow.

    sudo python -m benchmarks.timeline

Two ranks behind slow links (benchmarks/slow_link.py), the model of benchmarks/slow_network.py with one layer, forward and
backward. A profiler trace of rank 0 says when all-to-alls are under way; the spans of experts and LSH are measured as
`experts_time_ms` and `lsh_time_ms` are, those of experts for each piece. Exact and LSH, whole and in pieces, each the second
of two micro-batches.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import figures
from benchmarks.common import ROOT, result_path, write_result
from benchmarks.slow_link import run_ranks, set_rate, why_not
from benchmarks.slow_network import MODEL
from benchmarks.variants import Bench, Variant, configure
from megatron_lsh.families import GPT
from megatron_lsh.moe.experts import Experts, Feed
from megatron_lsh.moe.layer_pass import LayerPass, Span, measure
from megatron_lsh.parallel.initialize import initialize, shutdown
from megatron_lsh.training.pipeline import to_device
from megatron_lsh.training.run import set_up

VARIANTS = (Variant(), Variant(chunks=4), Variant(0.2), Variant(0.2, chunks=4))
RANKS, PORT = 2, 29643
LANES = {"all-to-all": "#c8621b", "experts": "#1f5fa8", "LSH": "#4d8c3f"}

Interval = tuple[str, float, float]
"""lane, start and end in ms from the beginning of the micro-batch"""


class Notes:
    """Spans of experts and LSH, with their moments. Within it the two methods that run them are replaced."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Span]] = []
        self._time, self._run = LayerPass.time, Experts._run

    def __enter__(self) -> Notes:
        LayerPass.time = lambda p, *call: self._lsh(p, *call)  # type: ignore[method-assign]
        Experts._run = lambda experts, *call: self._experts(experts, *call)  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        LayerPass.time, Experts._run = self._time, self._run  # type: ignore[method-assign]

    def _lsh(self, p: LayerPass, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        if not name.startswith("lsh_"):
            return function(*arguments)
        return self._measured("LSH", function, *arguments)

    def _experts(self, experts: Experts, feed: Feed, *weights: Any) -> Any:
        # Without the wait for the rows.
        arrived = Feed(feed.arrive(feed.rows), feed.counts, feed.experts)
        return self._measured("experts", lambda here: self._run(experts, here, *weights), arrived)

    def _measured(self, lane: str, function: Callable[..., Any], *arguments: Any) -> Any:
        note = lambda span: self.spans.append((lane, span))  # noqa: E731
        return measure(torch.device("cpu"), note, function, *arguments)


def trace(bench: Bench, variant: Variant) -> list[Interval]:
    """One micro-batch, forward and backward."""
    run, notes = bench.run, Notes()
    bench.use(variant)
    with run.batches("train") as batches:
        first, second = (to_device(next(batches), run.ctx.device) for _ in range(2))
    run.step.forward_step(run.model, first).objective(micro_batches=1).backward()
    dist.barrier(group=run.ctx.world.process_group)
    with notes, profile(activities=[ProfilerActivity.CPU]) as profiler:
        with record_function("origin"):
            origin = time.perf_counter()
        run.step.forward_step(run.model, second).objective(micro_batches=1).backward()
    run.step.optimizer.zero_grad(set_to_none=True)
    events = profiler.events() or []
    zero_us = next(event.time_range.start for event in events if event.name == "origin")
    moving = [event.time_range for event in events if event.name == "gloo:all_to_all"]
    found = [("all-to-all", (span.start - zero_us) / 1e3, (span.end - zero_us) / 1e3) for span in moving]
    return found + [(lane, 1e3 * (span._began - origin), 1e3 * (span._ended - origin)) for lane, span in notes.spans]


def work(arguments: argparse.Namespace) -> None:
    """One rank."""
    flags = ["--num-layers", 1, "--global-batch-size", 16, "--expert-model-parallel-size", RANKS]
    cfg = configure([*MODEL, *flags], RANKS)
    ctx = initialize(cfg.parallel, moe=True)
    run = set_up(cfg, GPT, ctx)
    with run.batches("train") as batches:
        bench = Bench(run, batches)
        for variant in VARIANTS:  # first calls, at full speed
            bench.use(variant)
            bench.step()
        set_rate(arguments.mbit)
        found = {variant.name: trace(bench, variant) for variant in VARIANTS}
    set_rate(None)
    if ctx.rank == 0:
        Path(arguments.out).write_text(json.dumps(found))
    shutdown(ctx)


def plot(found: dict[str, list[Interval]], mbit: float) -> Any:
    """One panel per variant, one lane per kind of work, all on the same scale."""
    figure, axes = figures.panels(1, 10, 1.25 * len(found) + 0.7, rows=len(found), sharex=True)
    for axis, (name, intervals) in zip(axes, found.items(), strict=True):
        begin = min(start for _, start, _ in intervals)
        for row, (lane, color) in enumerate(LANES.items()):
            bars = [(start - begin, end - start) for kind, start, end in intervals if kind == lane]
            axis.broken_barh(bars, (-row - 0.4, 0.8), facecolors=color, edgecolor="white", linewidth=0.4)
        axis.set_yticks([-row for row in range(len(LANES))], list(LANES))
        axis.set_title(name, fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel(f"ms; one MoE layer, forward and backward, rank 0 of 2, links of {mbit:g} Mbit/s", fontsize=8)
    return figure


def drawn() -> Any:
    """The figure of the recorded trace."""
    result = json.loads(result_path("timeline").read_text())
    return plot(result["intervals"], result["mbit"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", type=float, default=150.0, help="that each rank may send per second")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments)
    if reason := why_not():
        raise SystemExit(f"timeline cannot run here: {reason}")
    found = run_ranks("benchmarks.timeline", ["--mbit", arguments.mbit], PORT, RANKS)
    path = figures.save(plot(found, arguments.mbit), "timeline")
    print(
        f"wrote {path.relative_to(ROOT)} and {write_result('timeline', {'mbit': arguments.mbit, 'intervals': found})}"
    )


if __name__ == "__main__":
    main()
