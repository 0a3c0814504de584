"""LSH among its rivals: validation loss against the bytes that travel, and against the experts' arithmetic.

    python -m benchmarks.rivals --list             # the plan, most important first, and what it takes
    python -m benchmarks.rivals                    # what is not there yet of it; goes on where it was stopped
    python -m benchmarks.rivals --hours 2          # as much of it as fits
    python -m benchmarks.rivals --plan long        # 5,000 steps, and models four times as wide
    python -m benchmarks.rivals --report           # table and figure of what is there

The model, its data and one rank with EP 1 are those of benchmarks/quality.py; what travels between many ranks is rounded as
if it had (benchmarks/dispatchers.py). Runs of one seed have the same data in the same order and, where shapes allow, the
same initial weights. Bytes are those of rows both ways, forward and backward, over those of exact dispatch of a row per
(token, expert) in bf16; FLOPs those of the routed experts over the exact ones'. What LSH computes to cluster and to restore
is in neither.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import figures
from benchmarks.common import (
    DATA_FLAGS,
    ROOT,
    TrainingJob,
    interval,
    mean_and_interval,
    read_metrics,
    spread,
    table,
)  # fmt: skip
from benchmarks.ledger import list_of_runs, recorded, seconds_per_step, train_recorded
from benchmarks.quality import BUCKET, INTERPOLATE, MODEL, plugin
from benchmarks.subspace import basis_bytes
from megatron_lsh.moe.wire import make_codec

HIDDEN, LAYERS, TOPK, FFN, TOKENS = 128, 4, 2, 256, 8 * 256


@dataclass(frozen=True)
class Rival:
    """One way to dispatch.

    Attributes:
        series: points of one line of the figure.
        numbers: in which rows travel.
        rows: share of the exact rows that travel; None: as many as the run measured.
        width: numbers of a row.
        ffn: width of an expert, of rows of which width.
    """

    series: str
    flags: Sequence[Any]
    numbers: str = "bf16"
    rows: float | None = 1.0
    width: int = HIDDEN
    ffn: tuple[int, int] = (FFN, HIDDEN)
    basis: int = 0
    """numbers per row of a basis that is sent now and then"""

    def bytes(self, rows_sent: float) -> float:
        """Over those of all rows in bf16."""
        row = torch.zeros(1, self.width, dtype=torch.bfloat16)
        payload = make_codec(self.numbers).encode(row)
        per_step = 4 * TOKENS * TOPK * rows_sent * payload.shape[1] * payload.element_size()
        return (per_step + (basis_bytes(HIDDEN, self.basis) if self.basis else 0)) / (4 * TOKENS * TOPK * HIDDEN * 2)

    def flops(self, rows_sent: float) -> float:
        """Of the routed experts, over the exact ones'."""
        return rows_sent * self.ffn[0] * self.ffn[1] / (FFN * HIDDEN)


def _lsh(percent: int, wire: str | None = None) -> Rival:
    rate = ["--lsh-target-rate", percent / 100]
    if wire is None:
        return Rival("LSH", [*INTERPOLATE, *rate], rows=None)
    flags = plugin("coded_lsh", "--lsh-residual", "interpolate", "--lsh-wire-dtype", wire, *rate)
    return Rival(f"LSH, {wire}", flags, wire, None)


TOP1 = ["--moe-router-topk", 1, "--moe-router-pre-softmax"]

RIVALS: dict[str, Rival] = {
    "exact": Rival("exact, fewer bits", []),
    **{f"exact {wire}": Rival("exact, fewer bits", plugin("coded", "--lsh-wire-dtype", wire), wire)
       for wire in ("fp8", "mxfp4", "int4x32")},
    "top-1": Rival("top-1", TOP1, rows=0.5),
    "top-1 int4x32": Rival("top-1", [*plugin("coded", "--lsh-wire-dtype", "int4x32"), *TOP1], "int4x32", 0.5),
    **{f"LSH {rate}%": _lsh(rate) for rate in (20, 35, 50)},
    **{f"LSH {rate}% int4x32": _lsh(rate, "int4x32") for rate in (20, 35, 50)},
    **{f"experts of {width}": Rival("smaller experts", ["--moe-ffn-hidden-size", width], ffn=(width, HIDDEN))
       for width in (52, 128)},
    **{f"capacity {rate}%": Rival("capacity, rows dropped", ["--moe-expert-capacity-factor", rate / 100],
                                  rows=rate / 100) for rate in (20, 50)},
    **{f"subspace of {dims}": Rival("subspace", ["--moe-token-dispatcher-type", f"benchmarks.subspace:dims_{dims}"],
                                    width=dims, basis=dims) for dims in (26, 64)},
    "latent 32": Rival("latent rows", ["--moe-latent-size", 32], width=32, ffn=(FFN, 32)),
    "latent 32, experts of 1024": Rival("latent rows, wide experts",
                                        ["--moe-latent-size", 32, "--moe-ffn-hidden-size", 1024], width=32,
                                        ffn=(1024, 32)),
    **{f"past rows {rate}%": Rival("LSH, rows of before", ["--moe-token-dispatcher-type", "benchmarks.past:past",
                                   "--lsh-target-rate", rate / 100], rows=None) for rate in (20, 50)},
    "the paper's": Rival("the paper's", BUCKET, rows=None),
    "LSH by energy": Rival("LSH by energy", [*INTERPOLATE, "--lsh-target-rate", 0.5, "--lsh-target-energy", 0.1],
                           rows=None),
    "LSH 20%, exact finish": Rival("LSH, exact finish", [*INTERPOLATE, "--lsh-anneal-iters", "15%"], rows=None),
}  # fmt: skip


class Job(NamedTuple):
    variant: str
    seed: int
    iters: int
    hidden: int = HIDDEN


FIRST = ("exact", "top-1", "LSH 20% int4x32", "LSH 35% int4x32", "exact int4x32", "exact fp8")
SECOND = (
    "LSH 20%", "past rows 20%", "LSH 50% int4x32", "capacity 20%", "experts of 128", "subspace of 26", "LSH 35%",
    "top-1 int4x32", "latent 32", "subspace of 64",
)  # fmt: skip
LONG = ("exact", "LSH 20%", "LSH by energy", "LSH 35%", "LSH 20%, exact finish")


def plans() -> dict[str, list[Job]]:
    """Most important first, so that what is there when time is up is the best that fits."""
    rest = [name for name in RIVALS if name not in (*FIRST, *SECOND)]
    rivals = [Job(name, seed, 250) for seed in (1, 2, 3) for name in FIRST]
    rivals += [Job(name, seed, 250) for names in (SECOND, rest) for seed in (1, 2, 3) for name in names]
    rivals += [Job(name, seed, 250) for seed in (4, 5) for name in (*FIRST, *SECOND)]
    rivals += [Job(name, seed, 1000) for seed in (1, 2, 3) for name in FIRST]
    long = [Job(name, 1, 5000) for name in LONG] + [Job(name, 1, 600, 512) for name in LONG[:3]]
    return {"rivals": rivals, "long": long + [Job(name, seed, 5000) for seed in (2, 3) for name in LONG]}


def flags_for(job: Job, folder: Path) -> list[Any]:
    """The command line of one run. One of more than 500 steps can be resumed, and is evaluated ten times along it."""
    iters = job.iters
    extra = [
        int(iters * int(x[:-1]) / 100) if isinstance(x, str) and x.endswith("%") else x
        for x in RIVALS[job.variant].flags
    ]
    shape = [] if job.hidden == HIDDEN else ["--hidden-size", job.hidden, "--moe-ffn-hidden-size", 2 * job.hidden]
    along = [] if iters <= 500 else [
        "--save", folder / "state", "--load", folder / "state", "--save-interval", 100,
        "--save-retain-interval", 1_000_000, "--lsh-probe-interval", 50,
    ]  # fmt: skip
    return [
        *MODEL, *DATA_FLAGS, *shape, "--seed", job.seed, "--train-iters", iters, "--log-interval", max(iters // 20, 1),
        "--eval-interval", iters if iters <= 500 else iters // 10, "--eval-iters", 24, "--lsh-eval", "both",
        "--metrics-jsonl", folder / "metrics.jsonl", *along, *extra,
    ]  # fmt: skip


def training_job(job: Job, folder: Path) -> TrainingJob:
    place = folder / "-".join(map(str, job)).replace(" ", "-").replace("%", "").replace(",", "").replace("'", "")
    return TrainingJob(job, place, flags_for(job, place))


def outcome(folder: Path) -> dict[str, Any]:
    """What one finished run is judged by."""
    records, evaluations = read_metrics(folder / "metrics.jsonl")
    last = evaluations[-1]

    def along(entries: Iterable[dict[str, Any]], key: str) -> dict[int, float]:
        """By iteration, so that what a resumed run repeats counts once."""
        return {entry["iteration"]: entry[key] for entry in entries if entry.get(key) is not None}

    rates = list(along(records, "lsh_compression_rate").values())
    return {
        "validation_loss": last["validation_loss"],
        "validation_loss_exact": last.get("validation_loss_exact") or last["validation_loss"],
        "rows_sent": statistics.mean(rates) if rates else None,
        "along": along(evaluations, "validation_loss"),
        "residual_energy": along(records, "lsh_residual_energy"),
        "restored_error": along(records, "lsh_restored_error"),
        "seconds_per_step": statistics.median(record["iteration_time_ms"] for record in records) / 1e3,
    }


def gaps(found: Mapping[Any, dict[str, Any]], variant: str, iters: int, hidden: int = HIDDEN) -> dict[int, float]:
    """Validation loss above the exact run's of the same seed, by seed."""
    pairs = {
        job[1]: (run, found.get(("exact", *job[1:])))
        for job, run in found.items()
        if (job[0], *job[2:]) == (variant, iters, hidden)
    }
    return {seed: run["validation_loss"] - pair["validation_loss"] for seed, (run, pair) in pairs.items() if pair}


def entries(found: Mapping[Any, dict[str, Any]], iters: int, hidden: int = HIDDEN) -> list[dict[str, Any]]:
    """One per rival with runs of this length, in the order of RIVALS."""
    rows = []
    for variant, rival in RIVALS.items():
        runs = [run for job, run in found.items() if (job[0], *job[2:]) == (variant, iters, hidden)]
        if not runs:
            continue
        sent = statistics.mean(run["rows_sent"] for run in runs) if rival.rows is None else rival.rows
        rows.append(
            {
                "variant": variant,
                "series": rival.series,
                "seeds": len(runs),
                "bytes": rival.bytes(sent),
                "flops": rival.flops(sent),
                "loss": [run["validation_loss"] for run in runs],
                "exactly": [run["validation_loss_exact"] for run in runs],
                "gap": list(gaps(found, variant, iters, hidden).values()),
            }
        )
    return rows


def deduplicated(nodes: int, topk: int = TOPK) -> float:
    """Bytes of one row per (token, node) over those of a row per (token, expert): same loss. Beside a row go 8 bytes of id
    and weight per expert, and 4 of the weight's gradient come back (docs/nodes.md)."""
    visits, rows = (nodes - 1) * (1 - (1 - 1 / nodes) ** topk), topk * (nodes - 1) / nodes
    return visits / rows * (1 + 12 * topk / (4 * HIDDEN * 2))


def report(found: Mapping[Any, dict[str, Any]]) -> str:
    """Markdown: one table per length and width."""
    parts = []
    for iters, hidden in sorted({(job[2], job[3]) for job in found}):
        rows = [
            (
                entry["variant"], entry["seeds"], f"{entry['bytes']:.1%}", f"{entry['flops']:.0%}",
                spread(entry["loss"]), mean_and_interval(entry["gap"]) if entry["gap"] else "", spread(entry["exactly"]),
            )
            for entry in sorted(entries(found, iters, hidden), key=lambda entry: -entry["bytes"])
        ]  # fmt: skip
        header = ("dispatch", "seeds", "bytes", "experts' FLOPs", "validation loss", "above exact (95% interval)",
                  "evaluated exactly")  # fmt: skip
        parts.append(f"{iters} steps, d {hidden}\n\n{table(header, rows)}")
    shares = ", ".join(f"{deduplicated(nodes):.0%} over {nodes}" for nodes in (2, 8))
    return "\n\n".join(parts) + f"\n\nOne row per (token, node) has exact's loss, at {shares} nodes of its bytes."


def plot(rows: Sequence[dict[str, Any]]) -> Any:
    """Gap to exact against bytes, and against FLOPs; bars are 95% intervals."""
    from matplotlib import colormaps

    figure, axes = figures.panels(2, 12, 5.6, sharey=True)
    series = list(dict.fromkeys(entry["series"] for entry in rows))
    strong_and_pale = colormaps["tab20"].colors
    for axis, measure, label in zip(
        axes, ("bytes", "flops"), ("bytes, % of all rows in bf16", "experts' FLOPs, % of exact"), strict=True
    ):
        for place, name in enumerate(series):
            points = sorted(
                (entry for entry in rows if entry["series"] == name and entry["gap"]), key=lambda e: e[measure]
            )
            means = [statistics.mean(entry["gap"]) for entry in points]
            ends = [interval(entry["gap"]) or (mean, mean) for entry, mean in zip(points, means, strict=True)]
            axis.errorbar(
                [100 * entry[measure] for entry in points], means,
                [[mean - low for mean, (low, _) in zip(means, ends, strict=True)],
                 [high - mean for mean, (_, high) in zip(means, ends, strict=True)]],
                color=strong_and_pale[2 * place % 20 + place // 10], marker="os^DvPX*<>hp8"[place], markersize=5,
                capsize=2, linewidth=1, label=name,
            )  # fmt: skip
        axis.axhline(0, color="black", linewidth=0.7)
        axis.set(xlabel=label, xscale="log")
        axis.set_xticks([5, 10, 20, 50, 100], labels=["5", "10", "20", "50", "100"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        figures.legend_below(axis, columns=3)
    axes[0].set_ylabel("validation loss above exact, nats")
    seeds = sorted({entry["seeds"] for entry in rows}) or [0]
    axes[0].set_title(f"250 steps, seeds: {seeds[0]}" + (f" to {seeds[-1]}" if len(seeds) > 1 else ""))
    return figure


def drawn() -> Any:
    """The figure of the recorded runs."""
    return plot(entries(recorded("rivals", Job._fields), 250))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=list(plans()), default="rivals")
    parser.add_argument("--hours", type=float, help="end the plan where it takes more, of one core")
    parser.add_argument("--list", action="store_true", help="print the plan and train nothing")
    parser.add_argument("--report", action="store_true", help="print tables, draw, and train nothing")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "rivals")
    parser.add_argument("--name", default="rivals", help="of the result file and the figure")
    arguments = parser.parse_args()
    found = recorded(arguments.name, Job._fields)
    jobs = plans()[arguments.plan]

    def pace(job: Job) -> float:
        known = [run for key, run in found.items() if key[3] == job.hidden]
        return seconds_per_step(known, 0.7 * (job.hidden / HIDDEN) ** 1.8)

    if not arguments.report:
        if arguments.hours is not None:
            spent, fitting = 0.0, []
            for job in jobs:
                spent += 0.0 if job in found else job.iters * pace(job) / 3600
                fitting += [job] if spent <= arguments.hours else []
            jobs = fitting
        rows = [
            (f"{name}, d {hidden}", [job.seed for job in jobs if (job.variant, job.iters, job.hidden) == key],
             iters, pace(Job(name, 0, iters, hidden)))
            for key in dict.fromkeys((job.variant, job.iters, job.hidden) for job in jobs)
            for name, iters, hidden in [key]
        ]  # fmt: skip
        print(list_of_runs(rows, sum(job in found for job in jobs)), flush=True)
    if arguments.list:
        return
    if not arguments.report:
        found = train_recorded(
            arguments.name, Job._fields, [training_job(job, arguments.folder) for job in jobs], outcome,
            {"model": MODEL}, lambda job: Job._make(job.key).iters * pace(Job._make(job.key)), arguments.jobs,
        )  # fmt: skip
    print(report(found))
    if entries(found, 250):
        figures.save(plot(entries(found, 250)), arguments.name)


if __name__ == "__main__":
    main()
