"""The planner against the clock: predicted and measured step times of 20 cases that were listed before anything was fitted.

    sudo python -m benchmarks.plan_validation --minutes 20

A case is a size of model, a link between nodes and a layout of at most four ranks on nodes (benchmarks/slow_link.py). In
each the same training step runs under several layouts and dispatches, which take turns in the same processes on the same
link. The planner knows of a case what ``tools/profile_alltoall.py --primitives-out`` measures: speeds of the model's
micro-batches under expert parallelism with unlimited links, and all-to-alls on the link. Three factors (on arithmetic, on
what crosses nodes, on what stays inside) are fitted to ten cases; the other ten are held out. What is measured of a case is
kept at once; the same command after a stop measures the rest.

Four ranks share the two cores of the machine that docs/instruments.md has figures of: speeds are those of a rank with all
ranks busy, and ``ranks_per_processor`` says that who waits leaves the core to others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist

from benchmarks.common import ROOT, progress, result_path, table, write_result
from benchmarks.layouts import seconds_of_rank_0
from benchmarks.slow_link import run_ranks, set_rate, why_not
from benchmarks.variants import Bench, Variant, configure
from megatron_lsh.families import GPT
from megatron_lsh.parallel.initialize import initialize, shutdown
from megatron_lsh.parallel.layout import ParallelLayout
from megatron_lsh.plan.cluster import Cluster, cluster_of
from megatron_lsh.plan.counting import parameter_counts
from megatron_lsh.plan.dry_run import vocabulary_of
from megatron_lsh.plan.step_time import StepTime, step_cost
from megatron_lsh.training.link_speeds import measure_links
from megatron_lsh.training.primitives import measure_primitives
from megatron_lsh.training.run import set_up

MODEL = [
    "--num-layers", 4, "--num-attention-heads", 4, "--seq-length", 128, "--vocab-size", 1023,
    "--position-embedding-type", "rope", "--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear",
    "--attention-dropout", 0, "--hidden-dropout", 0, "--num-experts", 8, "--moe-router-topk", 2,
    "--moe-aux-loss-coeff", 1e-2, "--micro-batch-size", 2, "--global-batch-size", 16, "--mock-data", "--num-workers", 0,
    "--device", "cpu", "--peak-tflops", 1, "--distributed-timeout-minutes", 3,
]  # fmt: skip
PORT = 29649
LEAST, MOST = 3, 9
"""times that a step of a way is measured"""


class Case(NamedTuple):
    nodes: int
    ranks_per_node: int
    hidden: int
    mbit: float
    """of a node"""
    held_out: bool

    @property
    def key(self) -> str:
        return f"{self.nodes}x{self.ranks_per_node}, {self.hidden}, {self.mbit:g}"


#: Listed before anything was fitted. Held out: a link of most sizes and ranks, both of one, and one faster than any fitted.
#: Those of a first list (30 to 600 Mbit/s) showed what the model lacked, and are held out no more: these have other links.
CASES = (
    Case(2, 1, 64, 30, False), Case(2, 1, 64, 60, True),
    Case(2, 1, 128, 80, True), Case(2, 1, 128, 200, False),
    Case(2, 1, 256, 100, False), Case(2, 1, 256, 250, True),
    Case(4, 1, 64, 50, True), Case(4, 1, 64, 120, False),
    Case(4, 1, 128, 80, True), Case(4, 1, 128, 300, True),
    Case(4, 1, 256, 100, False), Case(4, 1, 256, 400, False),
    Case(2, 2, 64, 30, False), Case(2, 2, 64, 80, True),
    Case(2, 2, 128, 50, False), Case(2, 2, 128, 120, True), Case(2, 2, 128, 200, False), Case(2, 2, 128, 500, True),
    Case(2, 2, 256, 150, True), Case(2, 2, 256, 400, False),
)  # fmt: skip


@dataclass(frozen=True)
class Way:
    """A layout, and how its rows travel; None for as its flags say."""

    layout: str
    variant: Variant | None = None

    @property
    def name(self) -> str:
        return self.layout if self.variant is None else f"{self.layout}, {self.variant.name}"


def layouts(case: Case) -> dict[str, list[Any]]:
    """Flags by name; the first one is that of expert parallelism over all ranks."""
    ranks = case.nodes * case.ranks_per_node
    model = [*MODEL, "--hidden-size", case.hidden, "--moe-ffn-hidden-size", 2 * case.hidden,
             "--moe-node-size", case.ranks_per_node]  # fmt: skip
    found = {f"EP {ranks}": [*model, "--expert-model-parallel-size", ranks]}
    if ranks == 2:
        found["DP 2"] = model
        found["PP 2"] = [*model, "--pipeline-model-parallel-size", 2]
    elif case.ranks_per_node == 1:
        found["DP 4"] = model
        found["PP 2 of EP 2"] = [*model, "--pipeline-model-parallel-size", 2, "--expert-model-parallel-size", 2]
    else:
        found["DP 2 of EP 2 inside"] = [*model, "--expert-model-parallel-size", 2]
        found["PP 2 of EP 2 inside"] = [*model, "--pipeline-model-parallel-size", 2, "--expert-model-parallel-size", 2]
    return found


def ways(case: Case) -> list[Way]:
    """All that a case compares."""
    spread, *others = layouts(case)
    across = [Variant(), Variant(rate=0.2), Variant(wire="bf16")]
    if case.ranks_per_node > 1:
        across = [
            Variant(),
            Variant(deduplicated=True),
            Variant(rate=0.2, scope="rank"),
            Variant(rate=0.2, scope="node"),
        ]
    return [Way(spread, variant) for variant in across] + [Way(layout) for layout in others]


# On the ranks


def work(arguments: argparse.Namespace) -> None:
    """One rank: all cases of one size and layout of ranks that are not measured yet; rank 0 writes the figures."""
    kept = Path(arguments.kept)
    measured = read_kept(kept)
    cases = [CASES[number] for number in arguments.cases]
    started, deadline = time.monotonic(), time.monotonic() + arguments.seconds
    with ExitStack() as stack:
        benches = {}
        for name, flags in layouts(cases[0]).items():
            cfg = configure(flags, cases[0].nodes * cases[0].ranks_per_node)
            run = set_up(cfg, GPT, initialize(cfg.parallel, moe=True))
            benches[name] = Bench(run, stack.enter_context(run.batches("train")))
        first = next(iter(benches.values())).run
        for way in ways(cases[0]):  # first calls, at full speed
            step(benches, way)
        primitives = measure_primitives(first, arguments.steps)
        for number, case in enumerate(cases):
            set_rate(case.mbit, max(16.0, case.mbit / 8))  # 1 ms of it: a call must not leave in one burst
            dist.barrier(group=first.ctx.world.process_group)
            links = measure_links(first.ctx)
            for way in ways(case):  # what the link's queue still lets through at once is no measurement
                step(benches, way)
            left = seconds_of_rank_0(deadline, first.ctx.world) / (len(cases) - number)
            measured[case.key] = {"primitives": {**primitives, **links}, "steps_ms": measure(benches, ways(case), left)}
            if first.ctx.rank == 0:
                kept.write_text(json.dumps(measured))
                rounds = len(next(iter(measured[case.key]["steps_ms"].values())))
                progress(number + 1, len(cases), started, f"{case.key} Mbit/s: {rounds} times")
        set_rate(None)
    if first.ctx.rank == 0:
        Path(arguments.out).write_text(json.dumps(measured))
    shutdown(first.ctx)


def step(benches: dict[str, Bench], way: Way) -> float:
    """ms of one step."""
    bench = benches[way.layout]
    if way.variant is not None:
        bench.use(way.variant)
    return bench.step()["step_ms"]


def measure(benches: dict[str, Bench], compared: Sequence[Way], seconds: float) -> dict[str, list[float]]:
    """ms of the steps of every way, in turn, as often as fits into the time."""
    times: dict[str, list[float]] = {way.name: [] for way in compared}
    spent_ms = 0.0  # of the slowest rank, the same on all
    for repeat in range(MOST):
        if repeat >= LEAST and spent_ms * (1 + 1 / repeat) > 1e3 * seconds:
            break
        for way in compared if repeat % 2 == 0 else compared[::-1]:  # a drift meets all alike
            times[way.name].append(step(benches, way))
            spent_ms += times[way.name][-1]
    return times


# Predictions


def predict(case: Case, primitives: dict[str, Any], processors: int) -> dict[str, StepTime]:
    """By the planner, from primitives, by way."""
    ranks = case.nodes * case.ranks_per_node
    compute = primitives["compute"] | {"ranks_per_processor": max(ranks / processors, 1.0)}
    document = {"nodes": case.nodes, "ranks_per_node": case.ranks_per_node, "memory_gib": 8.0, "compute": compute}
    cluster = cluster_of(primitives | document, case.key)
    return {way.name: predicted(cluster, layouts(case)[way.layout], way.variant or Variant()) for way in ways(case)}


def predicted(cluster: Cluster, flags: list[Any], variant: Variant) -> StepTime:
    """One way's step."""
    words = [*flags, "--moe-node-deduplication", "on" if variant.deduplicated else "off"]
    words += ["--moe-token-dispatcher-type", "lsh", "--lsh-target-rate", variant.rate] if variant.rate else []
    words += ["--lsh-scope", variant.scope] if variant.scope else []
    words += ["--lsh-wire-dtype", variant.wire] if variant.wire else []
    cfg = configure(words, cluster.ranks)
    layout = ParallelLayout.from_config(cfg.parallel, cluster.ranks)
    padded = vocabulary_of(GPT, cfg, layout).padded
    counts = parameter_counts(GPT, configure(flags, cluster.ranks), padded, layout)
    return step_cost(GPT, cfg, cluster, layout, counts, padded).at()


def parts(time: StepTime) -> list[float]:
    """What factors are fitted to, ms; a bubble is arithmetic that others wait for."""
    return [1e3 * (time.compute + time.bubble), 1e3 * time.network, 1e3 * time.node_links]


def fit(rows: Sequence[tuple[list[float], float]]) -> list[float]:
    """Factors on the parts, none negative, that make the relative errors of these (parts, measured ms) smallest."""
    wanted = np.array([[part / ms for part in of] for of, ms in rows])
    free = list(range(wanted.shape[1]))
    factors = np.ones(wanted.shape[1])
    while free:
        used = [column for column in free if np.abs(wanted[:, column]).max() > 1e-3]
        found, *_ = np.linalg.lstsq(wanted[:, used], 1.0 - wanted[:, [c for c in range(wanted.shape[1]) if c not in used]]
                                    @ factors[[c for c in range(wanted.shape[1]) if c not in used]], rcond=None)  # fmt: skip
        factors[used] = found
        negative = [column for column in used if factors[column] < 0]
        if not negative:
            break
        factors[negative] = 0.0
        free = [column for column in free if column not in negative]
    return [float(factor) for factor in factors]


def evaluate(measured: dict[str, Any], processors: int) -> dict[str, Any]:
    """Predictions with fitted factors beside medians, case by case, and the summary of held-out cases."""
    found = []
    for case in CASES:
        if case.key in measured:
            entry = measured[case.key]
            medians = {name: statistics.median(times) for name, times in entry["steps_ms"].items()}
            found.append((case, entry, medians, predict(case, entry["primitives"], processors)))
    fitted = [(parts(times[name]), ms) for case, _, medians, times in found if not case.held_out
              for name, ms in medians.items()]  # fmt: skip
    factors = fit(fitted) if fitted else [1.0, 1.0, 1.0]
    cases = []
    for case, entry, medians, times in found:
        raw = {name: 1e3 * times[name].total for name in medians}
        scaled = {name: sum(f * part for f, part in zip(factors, parts(times[name]), strict=True)) for name in medians}
        chosen, best, worst = min(scaled, key=scaled.__getitem__), min(medians.values()), max(medians.values())
        cases.append({
            "case": case._asdict(), "measured_ms": medians, "predicted_ms": scaled, "before_the_fit_ms": raw,
            "noise": {name: _noise(times) for name, times in entry["steps_ms"].items()},
            "worst_over_best": worst / best, "chosen": chosen, "chosen_over_best": medians[chosen] / best,
        })  # fmt: skip
    return {"factors": factors, "cases": cases, "held_out": summary([c for c in cases if c["case"]["held_out"]]),
            "fitted": summary([c for c in cases if not c["case"]["held_out"]])}  # fmt: skip


def _noise(times: Sequence[float]) -> float:
    """Half the distance of the quartiles over the median."""
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / 2 / middle


def errors(case: dict[str, Any]) -> list[float]:
    return [abs(case["predicted_ms"][name] / ms - 1.0) for name, ms in case["measured_ms"].items()]


def summary(cases: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    if not cases:
        return None
    every = [error for case in cases for error in errors(case)]
    return {
        "cases": len(cases),
        "median_error": statistics.median(every),
        "worst_error": max(every),
        "noise": statistics.median(noise for case in cases for noise in case["noise"].values()),
        "chosen_within_10_per_cent": sum(case["chosen_over_best"] <= 1.1 for case in cases),
        "apart_by_half": sum(case["worst_over_best"] >= 1.5 for case in cases),
    }


def report(result: dict[str, Any]) -> str:
    """Markdown, for docs/instruments.md."""
    rows = []
    for entry in result["cases"]:
        chosen, kind = entry["chosen"], "held out" if entry["case"]["held_out"] else "fitted"
        case, every, noise = Case(**entry["case"]), errors(entry), statistics.median(entry["noise"].values())
        best = min(entry["measured_ms"], key=entry["measured_ms"].__getitem__)
        rows.append([
            f"{case.nodes} x {case.ranks_per_node}", case.hidden, f"{case.mbit:g}", kind,
            f"{best}: {entry['measured_ms'][best]:.0f}", f"{chosen}: {entry['predicted_ms'][chosen]:.0f}",
            f"{entry['chosen_over_best']:.2f}", f"{entry['worst_over_best']:.1f}", f"{statistics.median(every):.0%}",
            f"{max(every):.0%}", f"{noise:.0%}",
        ])  # fmt: skip
    header = ["nodes x ranks", "hidden size", "Mbit/s per node", "", "fastest, ms measured", "chosen, ms predicted",
              "chosen / fastest", "slowest / fastest", "error, median", "error, worst", "noise"]  # fmt: skip
    lines = [table(header, rows), ""]
    for name in ("held_out", "fitted"):
        if found := result[name]:
            lines.append(
                f"{name.replace('_', ' ')}: {found['cases']} cases; error {found['median_error']:.1%} (median), "
                f"{found['worst_error']:.1%} (worst), noise {found['noise']:.1%}; chosen within 10% of the fastest in "
                f"{found['chosen_within_10_per_cent']}; fastest and slowest are 1.5x apart in {found['apart_by_half']}"
            )
    compute, network, inside = result["factors"]
    lines.append(f"factors: {compute:.3f} on arithmetic, {network:.3f} between nodes, {inside:.3f} inside nodes")
    return "\n".join(lines)


# Around the ranks


def read_kept(path: Path) -> dict[str, Any]:
    """What an earlier call measured before it was stopped."""
    return json.loads(path.read_text()) if path.exists() else {}


def groups(measured: dict[str, Any], chosen: Sequence[int]) -> list[list[int]]:
    """Numbers of the cases still to measure; those of one size and layout of ranks share their processes."""
    found: dict[tuple[int, int, int], list[int]] = {}
    for number in chosen:
        if CASES[number].key not in measured:
            found.setdefault(CASES[number][:3], []).append(number)
    return list(found.values())


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="in which to measure, shared by the cases")
    parser.add_argument("--steps", type=int, default=4, help="micro-batches of each kind behind the primitives")
    parser.add_argument(
        "--cases", nargs="+", type=int, default=list(range(len(CASES))), help="numbers of cases, from 0"
    )
    parser.add_argument("--name", default="plan_validation", help="of the result file")
    parser.add_argument("--report", action="store_true", help="only predict again and report what was measured")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    parser.add_argument("--kept", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.worker:
        return work(arguments)
    done, kept = result_path(arguments.name), result_path(f"{arguments.name}.part")
    measured, processors = read_kept(kept), os.cpu_count() or 1
    if done.exists() and not measured:
        earlier = json.loads(done.read_text())
        if arguments.report:
            measured, processors = earlier["measured"], earlier["machine"]["cores"]
    if not arguments.report:
        if reason := why_not():
            raise SystemExit(f"plan_validation cannot run here: {reason}")
        kept.parent.mkdir(parents=True, exist_ok=True)
        todo = groups(measured, arguments.cases)
        total = sum(map(len, todo))
        for numbers in todo:
            case = CASES[numbers[0]]
            ranks = case.nodes * case.ranks_per_node
            own: list[object] = ["--cases", *numbers, "--kept", kept, "--steps", arguments.steps]
            own += ["--seconds", 60 * arguments.minutes * len(numbers) / total]
            run_ranks("benchmarks.plan_validation", own, PORT, ranks, case.ranks_per_node)
            measured = read_kept(kept)
    result = evaluate(measured, processors)
    print(f"\n{report(result)}\n", flush=True)
    if arguments.report:
        return
    path = write_result(arguments.name, {"model": MODEL, **result, "measured": measured})
    if len(measured) == len(CASES):
        kept.unlink(missing_ok=True)
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
