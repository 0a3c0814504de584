"""What compression costs in loss where expert parallelism spans nodes: paired runs of the emulation.

    python -m benchmarks.node_quality                    # the plan below, what is not there yet of it
    python -m benchmarks.node_quality --report           # tables of what is there
    python -m benchmarks.node_quality --variants exact "node, one fit" --seeds 1 2 3 --iters 300 --group-rows 2048
    python -m benchmarks.node_quality --gpu --jobs 16    # on a GPU, in bf16; into a file of its own

Every run of one seed has the same initial weights and the same data in the same order, so that the difference of two is
what the dispatcher did; given are its mean over seeds and its standard error. Nodes are emulated by one process
(benchmarks/emulation.py): two nodes of ranks with 1,024 tokens each, 4 experts, top-2, so 512 rows per rank and expert; a
node of 4 ranks brings 2,048 rows together, one of 16 ranks 8,192. A micro-batch is one node's, the nodes take turns.

Each finished run is added to benchmarks/results/node_quality.json at once. A run that was stopped goes on from its last
checkpoint, in --folder.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import DATA_FLAGS, ROOT, TrainingJob, paired, read_metrics, table
from benchmarks.ledger import recorded, train_recorded

MODEL: list[Any] = [
    "--num-layers", 4, "--hidden-size", 128, "--num-attention-heads", 4, "--seq-length", 256,
    "--position-embedding-type", "rope", "--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear",
    "--attention-dropout", 0, "--hidden-dropout", 0, "--num-experts", 4, "--moe-ffn-hidden-size", 256,
    "--moe-router-topk", 2, "--moe-aux-loss-coeff", 1e-2,
    "--lr", 3e-3, "--min-lr", 3e-4, "--lr-decay-style", "cosine", "--lr-warmup-fraction", 0.1,
    "--weight-decay", 0.1, "--adam-beta2", 0.95, "--device", "cpu", "--num-workers", 0,
]  # fmt: skip
ROWS_PER_RANK, SEQUENCES_PER_RANK = 512, 4
ONE_FIT = ("--lsh-interpolation-block", 1 << 16)
BLOCKS = ("--lsh-interpolation-block", 128)
GPU = ("--device", "cuda", "--bf16")
LATENT = ("--moe-latent-size", 32, "--moe-ffn-hidden-size", 1024)
"""Rows of a quarter of the width; experts of four times the width have as many parameters."""

#: Dispatcher of benchmarks/emulation.py, and further flags.
VARIANTS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "exact": ("exact", ()),
    "rank": ("rank", BLOCKS),
    "rank, own node exact": ("rank_own_exact", BLOCKS),
    "node, blocks of 128": ("node", BLOCKS),
    "node, one fit": ("node", ONE_FIT),
    **{f"node, one fit, {rate}%": ("node", (*ONE_FIT, "--lsh-target-rate", rate / 100)) for rate in (5, 10, 35)},
    "latent exact": ("exact", LATENT),
    "latent node, one fit": ("node", (*LATENT, *ONE_FIT)),
}


class Job(NamedTuple):
    variant: str
    seed: int
    iters: int
    group_rows: int


def _plan() -> list[Job]:
    """Most important first."""
    main = ("exact", "node, one fit", "rank, own node exact")
    jobs = [Job(variant, seed, 300, 2048) for seed in (1, 2, 3) for variant in main]
    jobs += [Job(variant, 1, 2000, 2048) for variant in main]
    jobs += [Job(variant, seed, 300, 2048) for seed in (1, 2, 3) for variant in ("node, blocks of 128", "rank")]
    jobs += [Job(variant, seed, 300, 2048) for seed in (1, 2, 3) for variant in VARIANTS if "%" in variant]
    jobs += [Job(variant, seed, 300, 2048) for seed in (1, 2, 3) for variant in VARIANTS if "latent" in variant]
    jobs += [Job(variant, seed, 300, 8192) for seed in (1, 2, 3) for variant in main[:2]]
    jobs += [Job(variant, 1, 2000, 2048) for variant in ("node, blocks of 128", "rank")]
    jobs += [Job(variant, seed, 2000, 2048) for seed in (2, 3) for variant in main]
    return jobs + [Job(variant, 1, 2000, 8192) for variant in main[:2]]


def flags_for(job: Job, gpu: bool = False) -> list[Any]:
    """What one run is. Four evaluations along it; clusters of an evaluation are as in training."""
    scope, extra = VARIANTS[job.variant]
    ranks = job.group_rows // ROWS_PER_RANK
    batch = SEQUENCES_PER_RANK * ranks
    name = scope if scope == "exact" else f"{scope}_2x{ranks}_in_turn"
    return [
        *MODEL, *DATA_FLAGS, "--micro-batch-size", batch, "--global-batch-size", batch, "--seed", job.seed,
        "--train-iters", job.iters, "--log-interval", max(job.iters // 20, 1), "--eval-interval", job.iters // 4,
        "--eval-iters", max(96 // batch, 2), "--lsh-eval", "both",
        "--moe-token-dispatcher-type", f"benchmarks.emulation:{name}", *extra, *(GPU if gpu else ()),
    ]  # fmt: skip


def kept_in(folder: Path) -> list[Any]:
    """Where a run writes, and goes on from."""
    return [
        "--metrics-jsonl", folder / "metrics.jsonl", "--save", folder / "state", "--load", folder / "state",
        "--save-interval", 25, "--save-retain-interval", 1_000_000,
    ]  # fmt: skip


def outcome(folder: Path) -> dict[str, Any]:
    """What one finished run is judged by."""
    records, evaluations = read_metrics(folder / "metrics.jsonl")
    rates, seen, energies = (
        [record[key] for record in records if record.get(key) is not None]
        for key in ("lsh_compression_rate", "expert_rows_rate", "lsh_residual_energy")
    )
    along = {entry["iteration"]: entry["validation_loss"] for entry in evaluations}  # a resumed run may repeat one
    last = evaluations[-1]
    stopped = records[-1]["iteration"]
    return {
        # The loss is that of the last evaluation, and no run's result, where this is not the end.
        "iterations": stopped,
        "validation_loss": last["validation_loss"],
        "validation_loss_exact": last.get("validation_loss_exact") or last["validation_loss"],
        "along": along,
        "rows_sent": statistics.mean(rates) if rates else 1.0,
        "expert_rows": statistics.mean(seen) if seen else 1.0,
        "residual_energy": energies[-1] if energies else None,
    }


def train(jobs: Sequence[Job], folder: Path, name: str, parallel: int = 1, gpu: bool = False) -> None:
    """``parallel`` runs at a time; each result is written when it is there."""
    waiting = [training_job(job, folder, gpu) for job in jobs]
    train_recorded(name, Job._fields, waiting, outcome, {"model": MODEL}, _cost, parallel)


def _cost(of: TrainingJob) -> float:
    job = Job._make(of.key)  # type: ignore[arg-type]
    return float(job.iters * job.group_rows)


def training_job(job: Job, folder: Path, gpu: bool = False) -> TrainingJob:
    place = folder / "-".join(map(str, job)).replace(" ", "-").replace("%", "").replace(",", "")
    return TrainingJob(job, place, [*flags_for(job, gpu), *kept_in(place)])


def results(name: str) -> dict[Job, dict[str, Any]]:
    """All finished runs."""
    return {Job._make(key): run for key, run in recorded(name, Job._fields).items()}


def report(found: dict[Job, dict[str, Any]]) -> str:
    """Markdown: differences to the exact run of the same seed, in nats and per cent of its loss; and how they grow."""
    parts = []
    for iters, group_rows in sorted({(job.iters, job.group_rows) for job in found}):
        ended, along = [], []
        for variant in VARIANTS:
            runs = {j.seed: r for j, r in found.items() if j[0] == variant and j[2:] == (iters, group_rows)}
            base = "latent exact" if variant.startswith("latent ") and variant != "latent exact" else "exact"
            exact = {
                seed: found[Job(base, seed, iters, group_rows)]
                for seed in runs
                if Job(base, seed, iters, group_rows) in found
            }
            if row := _end_row(
                variant, {s: r for s, r in runs.items() if r.get("iterations", iters) == iters}, exact, base
            ):
                ended.append(row)
            if variant != base and (row := _along_row(variant, runs, exact)):
                along.append(row)
        title = f"{iters} iterations, {group_rows:,} rows per node and expert"
        if ended:
            header = ["variant", "seeds", "rows sent", "rows at experts", "validation loss", "to exact ± standard error",
                      "of the loss", "evaluated exactly"]  # fmt: skip
            parts.append(f"{title}\n\n{table(header, ended)}")
        if along:
            steps = sorted({step for row in along for step in row[1]})
            lines = [[name, *(gaps.get(step, "") for step in steps)] for name, gaps in along]
            parts.append(
                f"{title}: to exact along the way\n\n{table(['variant', *(f'after {s}' for s in steps)], lines)}"
            )
    return "\n\n".join(parts)


def _end_row(variant: str, runs: dict[int, dict[str, Any]], exact: dict[int, dict[str, Any]], base: str) -> list[Any]:
    if not runs:
        return []
    pairs = [(run, exact[seed]) for seed, run in runs.items() if seed in exact]
    gaps = [run["validation_loss"] - pair["validation_loss"] for run, pair in pairs]
    cells = ["", "", ""]
    if gaps and variant != base:
        exactly = [run["validation_loss_exact"] - pair["validation_loss"] for run, pair in pairs]
        share = statistics.mean(gaps) / statistics.mean(pair["validation_loss"] for _, pair in pairs)
        cells = [paired(gaps), f"{share:+.2%}", f"{statistics.mean(exactly):+.3f}"]
    loss, sent, seen = (
        statistics.mean(run[key] for run in runs.values()) for key in ("validation_loss", "rows_sent", "expert_rows")
    )
    return [variant, len(runs), f"{sent:.0%}", f"{seen:.0%}", f"{loss:.3f}", *cells]


def _along_row(
    variant: str, runs: dict[int, dict[str, Any]], exact: dict[int, dict[str, Any]]
) -> tuple[str, dict[int, str]] | None:
    """The gap after each evaluation that all seeds have."""
    pairs = [
        ({int(k): v for k, v in run["along"].items()}, {int(k): v for k, v in exact[seed]["along"].items()})
        for seed, run in runs.items() if seed in exact
    ]  # fmt: skip
    if not pairs:
        return None
    common = set.intersection(*(set(ours) & set(theirs) for ours, theirs in pairs))
    cells = {}
    for step in sorted(common):
        share = sum(ours[step] - theirs[step] for ours, theirs in pairs) / sum(theirs[step] for _, theirs in pairs)
        cells[step] = f"{paired([ours[step] - theirs[step] for ours, theirs in pairs])} ({share:+.2%})"
    return f"{variant} ({len(pairs)} seeds)", cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), metavar="VARIANT", help="instead of the plan")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--iters", nargs="+", type=int, default=[300])
    parser.add_argument("--group-rows", nargs="+", type=int, default=[2048], help="rows per node and expert")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "node_quality")
    parser.add_argument("--gpu", action="store_true", help="on a GPU, in bf16")
    parser.add_argument("--name", help="of the result file (default: node_quality, with --gpu node_quality_gpu)")
    parser.add_argument("--report", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    name = arguments.name or ("node_quality_gpu" if arguments.gpu else "node_quality")
    jobs = _plan()
    if arguments.variants:
        jobs = [
            Job(variant, seed, iters, rows)
            for iters in arguments.iters
            for rows in arguments.group_rows
            for seed in arguments.seeds
            for variant in arguments.variants
        ]
    if not arguments.report:
        train(jobs, arguments.folder, name, arguments.jobs, arguments.gpu)
    print(report(results(name)))


if __name__ == "__main__":
    main()
