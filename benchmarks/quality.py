"""What compression costs in loss: one small GPT-MoE on real text, trained with every variant, seed and length.

    python -m benchmarks.quality --variants exact paper budget --seeds 1 2 3 --iters 400

Each run is one process with one thread; several run side by side (--jobs). Clusters form per (rank, expert) among the
rows of one micro-batch, so one rank with EP 1 compresses as each of many ranks would; the loss needs no network.
(Wire dtypes do: with one rank nothing is encoded, so they are not among the variants.)
Every validation loss is measured twice: with the dispatcher the model was trained with, and exactly.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.common import (
    DATA_FLAGS,
    ROOT,
    finish,
    progress,
    read_metrics,
    spread,
    start_training,
    table,
    write_result,
)  # fmt: skip

MODEL = [
    "--num-layers", 4, "--hidden-size", 128, "--num-attention-heads", 4, "--seq-length", 256,
    "--position-embedding-type", "rope", "--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear",
    "--attention-dropout", 0, "--hidden-dropout", 0, "--num-experts", 8, "--moe-ffn-hidden-size", 256,
    "--moe-router-topk", 2, "--moe-aux-loss-coeff", 1e-2, "--micro-batch-size", 8, "--global-batch-size", 8,
    "--lr", 3e-3, "--min-lr", 3e-4, "--lr-decay-style", "cosine", "--lr-warmup-fraction", 0.1,
    "--weight-decay", 0.1, "--adam-beta2", 0.95, "--device", "cpu", "--num-workers", 0,
]  # fmt: skip

LSH = ["--moe-token-dispatcher-type", "lsh"]
NONE = [*LSH, "--lsh-residual", "none"]
SHORTCUT = ["--moe-gradient-shortcut"]

#: What can be compared. Add a line to try something.
VARIANTS: dict[str, list[Any]] = {
    "exact": [],
    "paper": [*LSH, "--lsh-clustering", "bucket"],
    "budget unrefined": [*LSH, "--lsh-refine-steps", 0],
    "budget": LSH,
    "budget refined twice": [*LSH, "--lsh-refine-steps", 2],
    "budget none": NONE,
    "budget straight-through": [*NONE, "--lsh-gradient", "straight-through"],
    "budget lowrank": [*LSH, "--lsh-residual", "lowrank"],
    "budget finish": [*LSH, "--lsh-anneal-iters", "15%"],
    "budget lowrank finish": [*LSH, "--lsh-residual", "lowrank", "--lsh-anneal-iters", "15%"],
    **{f"budget {rate}%": [*LSH, "--lsh-target-rate", rate / 100] for rate in (10, 35, 50, 75)},
    "shortcut exact": SHORTCUT,
    **{
        f"shortcut none {rate}%": [*NONE, "--lsh-target-rate", rate / 100, *SHORTCUT]
        for rate in (10, 20, 35, 50, 75, 100)
    },
    "shortcut paper": [*NONE, "--lsh-clustering", "bucket", *SHORTCUT],
    "shortcut none finish": [*NONE, "--lsh-anneal-iters", "15%", *SHORTCUT],
}


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


def run_all(jobs: list[tuple[str, int, int]], parallel: int, folder: Path) -> dict[tuple[str, int, int], dict]:
    """Train everything, `parallel` runs at a time; finished runs of an earlier call are kept."""
    results, running, started = {}, [], time.monotonic()
    queue = list(jobs)
    while queue or running:
        while queue and len(running) < parallel:
            job = queue.pop(0)
            place = folder / f"{job[0].replace(' ', '-').replace('%', '')}-seed{job[1]}-{job[2]}"
            if (place / "done").exists():
                results[job] = outcome(place)
                continue
            (place / "metrics.jsonl").unlink(missing_ok=True)
            running.append((job, place, start_training(flags_for(*job, place), place / "log.txt")))
        for entry in [entry for entry in running if entry[2].poll() is not None]:
            job, place, process = entry
            running.remove(entry)
            finish(process, place / "log.txt")
            (place / "done").touch()
            results[job] = outcome(place)
            progress(len(results), len(jobs), started, f"{job}: {results[job]['validation_loss']:.4f}")
        time.sleep(0.5)
    return results


def report(results: dict[tuple[str, int, int], dict], iters: int, seeds: list[int]) -> str:
    """Rows in the order of VARIANTS; the gap is paired by seed with the exact run of the same gradient path."""
    rows = []
    for variant in VARIANTS:
        runs = [results.get((variant, seed, iters)) for seed in seeds]
        if not all(runs):
            continue
        control = "shortcut exact" if variant.startswith("shortcut") else "exact"
        gaps = [
            run["validation_loss"] - results[control, seed, iters]["validation_loss"]
            for run, seed in zip(runs, seeds, strict=True)
            if (control, seed, iters) in results
        ]
        energy = [run["residual_energy"] for run in runs if run["residual_energy"] is not None]
        rows.append(
            (
                variant,
                f"{100 * statistics.mean(run['rows_sent'] for run in runs):.1f}%",
                spread([run["validation_loss"] for run in runs]),
                spread(gaps) if gaps else "",
                spread([run["validation_loss_exact"] for run in runs]),
                spread(energy, 2) if energy else "",
            )
        )
    header = ("variant", "rows sent", "validation loss", "gap to its control", "evaluated exactly", "residual energy")
    return table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--iters", nargs="+", type=int, default=[400, 800])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "quality")
    arguments = parser.parse_args()
    jobs = [(v, s, i) for i in arguments.iters for s in arguments.seeds for v in arguments.variants]
    results = run_all(jobs, arguments.jobs, arguments.folder)
    for iters in arguments.iters:
        print(f"\n{iters} iterations, seeds {arguments.seeds}\n\n{report(results, iters, arguments.seeds)}")
    rows = [{"variant": v, "seed": s, "iters": i} | results[v, s, i] for v, s, i in jobs]
    print(f"\nwrote {write_result('quality', {'runs': rows})}")


if __name__ == "__main__":
    main()
