"""What compression costs in loss: one small GPT-MoE on real text, trained with every variant, seed and length.

    python -m benchmarks.quality --variants exact paper budget --seeds 1 2 3 --iters 300

Each run is one process with one thread; several run side by side (--jobs). Clusters form per (rank, expert) among the
rows of one micro-batch, so one rank with EP 1 compresses as each of many ranks would; the loss needs no network. Wire
dtypes round every row as if it travelled (`benchmarks/dispatchers.py`).
Every validation loss is measured twice: with the dispatcher the model was trained with, and exactly. Finished runs are
kept in --folder, and tables, JSON and plot are made of all that are there: a long comparison can be made in parts.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks.common import (
    DATA_FLAGS,
    ROOT,
    TrainingJob,
    finished,
    interval,
    mean_and_interval,
    read_metrics,
    result_path,
    spread,
    table,
    train_all,
    write_result,
)  # fmt: skip

MODEL: list[Any] = [
    "--num-layers", 4, "--hidden-size", 128, "--num-attention-heads", 4, "--seq-length", 256,
    "--position-embedding-type", "rope", "--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear",
    "--attention-dropout", 0, "--hidden-dropout", 0, "--num-experts", 8, "--moe-ffn-hidden-size", 256,
    "--moe-router-topk", 2, "--moe-aux-loss-coeff", 1e-2, "--micro-batch-size", 8, "--global-batch-size", 8,
    "--lr", 3e-3, "--min-lr", 3e-4, "--lr-decay-style", "cosine", "--lr-warmup-fraction", 0.1,
    "--weight-decay", 0.1, "--adam-beta2", 0.95, "--device", "cpu", "--num-workers", 0,
]  # fmt: skip

LSH = ["--moe-token-dispatcher-type", "lsh"]
NONE = [*LSH, "--lsh-residual", "none"]
INTERPOLATE = [*LSH, "--lsh-residual", "interpolate"]
IDENTITY = [*LSH, "--lsh-residual", "identity"]
BUCKET = [*IDENTITY, "--lsh-clustering", "bucket"]
SHORTCUT = ["--moe-gradient-shortcut"]
RATES = (10, 35, 50, 75)
"""beside the default of 20; at 100% everything is bit-equal to exact (tests/moe/test_dispatchers.py)"""


def plugin(name: str, *flags: Any) -> list[Any]:
    """A dispatcher of benchmarks/dispatchers.py."""
    return ["--moe-token-dispatcher-type", f"benchmarks.dispatchers:{name}", *flags]


#: What can be compared. Add a line to try something.
VARIANTS: dict[str, list[Any]] = {
    "exact": [],
    **{wire: plugin("coded", "--lsh-wire-dtype", wire) for wire in ("fp8", "int8", "int4")},
    # the paper's recipe, and its parts
    "paper": BUCKET,
    "paper, finer hashes": [*BUCKET, "--lsh-num-hashes", 3],
    "bucket none": [*NONE, "--lsh-clustering", "bucket"],
    "bucket finish": [*BUCKET, "--lsh-anneal-iters", "15%"],
    # budgets
    "budget": IDENTITY,
    **{f"budget {rate}%": [*IDENTITY, "--lsh-target-rate", rate / 100] for rate in RATES},
    "none": NONE,
    **{f"none {rate}%": [*NONE, "--lsh-target-rate", rate / 100] for rate in RATES},
    "interpolate": INTERPOLATE,
    **{f"interpolate {rate}%": [*INTERPOLATE, "--lsh-target-rate", rate / 100] for rate in RATES},
    "interpolate means": [*INTERPOLATE, "--lsh-representative", "mean"],
    "interpolate finish": [*INTERPOLATE, "--lsh-anneal-iters", "15%"],
    "interpolate warm-up": [*INTERPOLATE, "--lsh-warmup-iters", "15%"],
    **{
        f"interpolate {w}": plugin("coded_lsh", "--lsh-residual", "interpolate", "--lsh-wire-dtype", w)
        for w in ("fp8", "int4")
    },
    "straight-through": [*NONE, "--lsh-gradient", "straight-through"],
    "lowrank": [*LSH, "--lsh-residual", "lowrank"],
    "finish": [*IDENTITY, "--lsh-anneal-iters", "15%"],
    "none finish": [*NONE, "--lsh-anneal-iters", "15%"],
    "lowrank finish": [*LSH, "--lsh-residual", "lowrank", "--lsh-anneal-iters", "15%"],
    "warm-up": [*IDENTITY, "--lsh-warmup-iters", "15%"],
    "none warm-up": [*NONE, "--lsh-warmup-iters", "15%"],
    **{
        f"budget {w}": plugin("coded_lsh", "--lsh-residual", "identity", "--lsh-wire-dtype", w)
        for w in ("fp8", "int8", "int4")
    },
    **{f"none {w}": plugin("coded_lsh", "--lsh-residual", "none", "--lsh-wire-dtype", w) for w in ("fp8", "int4")},
    # other clusters
    "unrefined": [*IDENTITY, "--lsh-refine-steps", 0],
    "refined twice": [*IDENTITY, "--lsh-refine-steps", 2],
    "random seeds": plugin("random_seeds", "--lsh-residual", "identity"),
    "Hadamard": plugin("hadamard", "--lsh-residual", "identity"),
    "hyperplanes": [*IDENTITY, "--lsh-hash-width", 1, "--lsh-num-hashes", 24],
    "shared lowrank": plugin("shared_low_rank", "--lsh-residual", "lowrank"),
    # the gradient of the identity around every expert, exact training included
    "shortcut exact": SHORTCUT,
    "shortcut paper": [*NONE, "--lsh-clustering", "bucket", *SHORTCUT],
    "shortcut": [*NONE, *SHORTCUT],
    **{f"shortcut {rate}%": [*NONE, "--lsh-target-rate", rate / 100, *SHORTCUT] for rate in RATES},
    "shortcut finish": [*NONE, "--lsh-anneal-iters", "15%", *SHORTCUT],
}

Job = tuple[str, int, int]
"""variant, seed, iterations"""


def flags_for(variant: str, seed: int, iters: int, folder: Path) -> list[Any]:
    """The command line of one run; a percentage becomes that share of the iterations."""
    extra = [int(iters * int(x[:-1]) / 100) if isinstance(x, str) and x.endswith("%") else x for x in VARIANTS[variant]]
    return [
        *MODEL, *DATA_FLAGS, "--seed", seed, "--train-iters", iters, "--log-interval", max(iters // 10, 1),
        "--eval-interval", iters, "--eval-iters", 24, "--lsh-eval", "both", "--metrics-jsonl", folder / "metrics.jsonl",
        *extra,
    ]  # fmt: skip


def outcome(folder: Path) -> dict[str, Any]:
    """What one finished run is judged by."""
    records, evaluations = read_metrics(folder / "metrics.jsonl")
    last = evaluations[-1]
    rates = [r["lsh_compression_rate"] for r in records if r.get("lsh_compression_rate") is not None]
    energies = [r["lsh_residual_energy"] for r in records if r.get("lsh_residual_energy") is not None]
    return {
        "validation_loss": last["validation_loss"],
        "validation_loss_exact": last.get("validation_loss_exact") or last["validation_loss"],
        "rows_sent": statistics.mean(rates) if rates else 1.0,
        "residual_energy": energies[-1] if energies else None,
    }


def job_for(job: Job, folder: Path, micro_batch_size: int | None = None) -> TrainingJob:
    """The command line of one run, and where it is kept."""
    variant, seed, iters = job
    words = variant.replace(" ", "-").replace("%", "").replace(",", "")
    place = folder / f"{words}-seed{seed}-{iters}"
    batch = (
        ["--micro-batch-size", micro_batch_size, "--global-batch-size", micro_batch_size] if micro_batch_size else []
    )
    return TrainingJob(job, place, [*flags_for(variant, seed, iters, place), *batch])


def relative_bytes(variant: str, rows_sent: float) -> float:
    """Payload over that of all rows in bf16. Quantized rows carry an fp32 scale."""
    hidden = MODEL[MODEL.index("--hidden-size") + 1]
    flags = VARIANTS[variant]
    wire = flags[flags.index("--lsh-wire-dtype") + 1] if "--lsh-wire-dtype" in flags else "bf16"
    per_row = {"bf16": 2 * hidden, "fp8": hidden + 4, "int8": hidden + 4, "int4": hidden / 2 + 4}[wire]
    return rows_sent * per_row / (2 * hidden)


def summarize(results: Mapping[Any, dict[str, Any]], iters: int) -> list[dict[str, Any]]:
    """One entry per variant in the order of VARIANTS; gaps are paired by seed with the exact run of the same gradient."""
    entries = []
    for variant in VARIANTS:
        runs = {seed: run for (v, seed, n), run in results.items() if v == variant and n == iters}
        if not runs:
            continue
        control = "shortcut exact" if variant.startswith("shortcut") else "exact"
        controls = {seed: results[control, seed, iters] for seed in runs if (control, seed, iters) in results}
        rows_sent = statistics.mean(run["rows_sent"] for run in runs.values())
        entries.append(
            {
                "variant": variant,
                "control": control,
                "seeds": sorted(runs),
                "rows_sent": rows_sent,
                "bytes": relative_bytes(variant, rows_sent),
                "loss": [run["validation_loss"] for run in runs.values()],
                "gap": [runs[seed]["validation_loss"] - c["validation_loss"] for seed, c in controls.items()],
                "exactly": [run["validation_loss_exact"] for run in runs.values()],
                "energy": [run["residual_energy"] for run in runs.values() if run["residual_energy"] is not None],
            }
        )
    return entries


def report(entries: list[dict[str, Any]]) -> str:
    """A Markdown table; a single run proves nothing and has no interval."""
    header = (
        "variant", "seeds", "rows sent", "bytes", "validation loss", "above its control (95% interval)",
        "evaluated exactly", "residual energy",
    )  # fmt: skip
    rows = [
        (
            entry["variant"], len(entry["seeds"]), f"{100 * entry['rows_sent']:.1f}%", f"{100 * entry['bytes']:.1f}%",
            spread(entry["loss"]), mean_and_interval(entry["gap"]) if any(entry["gap"]) else "", spread(entry["exactly"]),
            spread(entry["energy"], 2) if entry["energy"] else "",
        )
        for entry in entries
    ]  # fmt: skip
    return table(header, rows)


#: Panels of the figure: title, steps, and its series of variants.
PANELS: tuple[tuple[str, int, dict[str, list[str]]], ...] = (
    (
        "what is restored, 250 steps",
        250,
        {
            "nothing (none)": ["none 10%", "none", "none 35%", "none 50%", "none 75%"],
            "interpolated (default)": [
                "interpolate 10%", "interpolate", "interpolate 35%", "interpolate 50%", "interpolate 75%",
            ],
            "own difference (identity)": ["budget 10%", "budget", "budget 35%", "budget 50%", "budget 75%"],
            "learned map (lowrank)": ["lowrank"],
            "the paper's buckets": ["paper"],
        },
    ),
    (
        "numbers of fewer bits, 250 steps",
        250,
        {
            "all rows in int4, int8, fp8": ["int4", "int8", "fp8"],
            "20% interpolated, in int4, fp8, bf16": ["interpolate int4", "interpolate fp8", "interpolate"],
            "20% interpolated, exact finish": ["interpolate finish"],
        },
    ),
    (
        "what is restored, 500 steps",
        500,
        {
            "interpolated (default)": ["interpolate"],
            "own difference (identity)": ["budget"],
            "the paper's buckets": ["paper"],
        },
    ),
)  # fmt: skip


def plot(by_length: Mapping[int, list[dict[str, Any]]]) -> Any:
    """Gap to exact training against bytes; bars are 95% intervals. What has one seed is left out.

    Points of as many bytes stand side by side; a series looks the same in all panels.
    """
    looks: dict[str, int] = {}
    shown = [panel for panel in PANELS if panel[1] in by_length]
    figure, axes = figures.panels(len(shown), 4.6 * len(shown), 5.2)
    for axis, (title, iters, series) in zip(axes, shown, strict=True):
        known = {entry["variant"]: entry for entry in by_length[iters] if len(entry["gap"]) > 1}
        for place, (label, variants) in enumerate(series.items()):
            points = [known[variant] for variant in variants if variant in known]
            if points:
                means = [statistics.mean(entry["gap"]) for entry in points]
                ends = [interval(entry["gap"]) or (0.0, 0.0) for entry in points]
                look = looks.setdefault(label, len(looks))
                axis.errorbar(
                    [100 * entry["bytes"] + 0.7 * (place - len(series) // 2) for entry in points], means,
                    [high - mean for mean, (_, high) in zip(means, ends, strict=True)],
                    color=f"C{look}", marker="os^DvPX*"[look], markersize=5, capsize=3, label=label, linewidth=1,
                )  # fmt: skip
        axis.axhline(0, color="black", linewidth=0.7)
        axis.set(xlabel="bytes, % of all rows in bf16", title=title, xlim=(0, None))
        axis.grid(alpha=0.3)
        figures.legend_below(axis)
    axes[0].set_ylabel("validation loss above exact, nats")
    return figure


def drawn(name: str = "quality") -> Any:
    """The figure of the recorded runs."""
    runs = json.loads(result_path(name).read_text())["runs"]
    results = {(run["variant"], run["seed"], run["iters"]): run for run in runs}
    return plot({iters: summarize(results, iters) for iters in sorted({job[2] for job in results})})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--iters", nargs="+", type=int, default=[300, 900])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "quality")
    parser.add_argument("--micro-batch-size", type=int, help="sequences of 256 tokens per step, in which clusters form")
    parser.add_argument("--name", default="quality", help="of the result file and the plot")
    arguments = parser.parse_args()
    jobs = [(v, s, i) for i in arguments.iters for s in arguments.seeds for v in arguments.variants]
    train_all([job_for(job, arguments.folder, arguments.micro_batch_size) for job in jobs], outcome, arguments.jobs)
    results = {job: run for job, run in finished(arguments.folder).items() if job[0] in VARIANTS}
    by_length = {iters: summarize(results, iters) for iters in sorted({job[2] for job in results})}
    for iters, entries in by_length.items():
        print(f"\n{iters} iterations\n\n{report(entries)}")
    rows = [{"variant": v, "seed": s, "iters": i} | result for (v, s, i), result in sorted(results.items())]
    print(f"\nwrote {write_result(arguments.name, {'runs': rows})}")
    if any(panel[1] in by_length for panel in PANELS):
        figures.save(plot(by_length), arguments.name)


if __name__ == "__main__":
    main()
