"""What compression costs in accuracy on pictures: Swin-MoE on Fashion-MNIST, exact and with LSH, paired by seed.

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist*.deb fashion
    python -m benchmarks.vision --data fashion/usr/share/datasets/fashion-mnist
    python -m benchmarks.vision --data ... --pretrain-on data/digits --seeds 1 2          # fine-tuning; make data MODEL=swin

Two stages of two blocks, of widths 64 and 128; the second block of each has 8 experts, top-1: 256 and 64 rows per rank and
expert. Every run takes 3,000 steps of 64 pictures on two CPU ranks with EP 2, one after the other, and is judged on all
10,000 test pictures. With --pretrain-on all runs begin with the weights of one exact run on those pictures, and a new head.
A seed is the same weights, order and changes of pictures for every dispatcher, so that differences are paired: their mean
and its 95% interval (Student's t) are the result. Finished runs are kept in --folder, and the table is made of all that are
there: a comparison can be stopped, resumed, and made in parts.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.common import (
    ROOT,
    TrainingJob,
    finish,
    finished,
    interval,
    spread,
    start_training,
    table,
    train_all,
    write_result,
)  # fmt: skip
from megatron_lsh.checkpoint.folders import TRACKER

DISPATCHERS: Mapping[str, list[object]] = {
    "exact": ["--moe-token-dispatcher-type", "alltoall"],
    "LSH 20%": ["--moe-token-dispatcher-type", "lsh", "--lsh-target-rate", 0.2, "--lsh-eval", "both"],
    "LSH 11.7%": ["--moe-token-dispatcher-type", "lsh", "--lsh-target-rate", 0.117, "--lsh-eval", "both"],
    "paper": [
        "--moe-token-dispatcher-type", "lsh", "--lsh-clustering", "bucket", "--lsh-residual", "identity",
        "--lsh-eval", "both",
    ],
}  # fmt: skip
RANKS, BATCH = 2, 64
SCRIPT = "pretrain_swin_moe.py"
MODEL: list[object] = [
    "--img-h", 32, "--num-channels", 1, "--patch-dim", 4, "--swin-window-size", 4, "--swin-depths", 2, 2,
    "--hidden-size", 64, "--num-attention-heads", 2, "--num-experts", 8, "--moe-router-topk", 1,
    "--moe-expert-capacity-factor", 1.25, "--moe-aux-loss-coeff", 0.01,
]  # fmt: skip
#: Folder of the run that fine-tuning starts from, and its steps.
START, START_STEPS = "start", 1000


def flags_for(dispatcher: str, seed: int, place: Path, options: argparse.Namespace) -> list[object]:
    """The command line of one run."""
    start: list[object] = []
    if options.pretrain_on is not None:
        start = ["--pretrained-checkpoint", options.folder / START / "checkpoints"]
    return [
        *_training_flags(options.data, options.steps, options.lr),
        "--image-mean", 0.286, "--image-std", 0.353, "--crop-scale", 0.6, 1, "--hflip", 0.5, "--random-erasing", 0.1,
        "--mixup", 0.2, "--mix-prob", 0.5, "--seed", seed, "--log-interval", min(50, options.steps),
        "--metrics-jsonl", place / "metrics.jsonl", *start, *DISPATCHERS[dispatcher],
    ]  # fmt: skip


def _training_flags(data: Path, steps: int, lr: float) -> list[object]:
    """What the runs on Fashion-MNIST and the one before them have in common."""
    return [
        *MODEL, "--data-path", data, "--expert-model-parallel-size", RANKS, "--eval-crop-ratio", 1,
        "--randaugment-ops", 0, "--cutmix", 0, "--micro-batch-size", BATCH // RANKS, "--global-batch-size", BATCH,
        "--train-iters", steps, "--eval-interval", steps, "--lr", lr, "--min-lr", lr / 100,
        "--lr-decay-style", "cosine", "--lr-warmup-fraction", 0.1, "--weight-decay", 0.05, "--clip-grad", 3,
        "--device", "cpu", "--num-workers", 1, "--no-progress",
    ]  # fmt: skip


def starting_point(options: argparse.Namespace) -> None:
    """Train it, unless it is there."""
    place = options.folder / START
    if (place / "checkpoints" / TRACKER).exists():
        return
    flags = [
        *_training_flags(options.pretrain_on, START_STEPS, options.lr),
        "--image-mean", 0.13, "--image-std", 0.31, "--crop-scale", 1, 1, "--hflip", 0, "--random-erasing", 0,
        "--random-shift", 2, "--random-rotation", 10, "--mixup", 0, "--save", place / "checkpoints",
        *DISPATCHERS["exact"],
    ]  # fmt: skip
    finish(start_training(flags, place / "log.txt", RANKS, script=SCRIPT), place / "log.txt")
    print("".join(line for line in (place / "log.txt").open() if line.startswith("validation top-1")), end="")


def outcome(place: Path) -> dict[str, Any]:
    """What one finished run is judged by."""
    records = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    training = [record for record in records if "lm_loss" in record]
    last = [record for record in records if "validation_top1" in record][-1]
    rates = [r["lsh_compression_rate"] for r in training if r.get("lsh_compression_rate") is not None]
    return {
        "top1": last["validation_top1"],
        "top1_exact": last.get("validation_top1_exact", last["validation_top1"]),
        "top5": last["validation_top5"],
        "alltoall_bytes": statistics.mean(r["alltoall_bytes"] for r in training),
        "alltoall_bytes_uncompressed": statistics.mean(r["alltoall_bytes_uncompressed"] for r in training),
        "rows_sent": statistics.mean(rates) if rates else 1.0,
        "iteration_time_ms": statistics.median(r["iteration_time_ms"] for r in training),
    }


def paired(ours: Sequence[float], exact: Sequence[float]) -> tuple[float, float | None]:
    """Mean of exact - ours in points of accuracy, and half of its 95% interval (None for one pair)."""
    differences = [100 * (b - a) for a, b in zip(ours, exact, strict=True)]
    mean, ends = statistics.mean(differences), interval(differences)
    return mean, None if ends is None else ends[1] - mean


def report(results: Mapping[Any, dict[str, Any]]) -> str:
    """One row per dispatcher; mean ± standard deviation over the seeds, and what is lost against the exact runs of them."""
    rows = []
    for dispatcher in dict.fromkeys(key[0] for key in results):
        runs = {seed: result for (name, seed), result in results.items() if name == dispatcher}
        both = [seed for seed in runs if ("exact", seed) in results]
        lost = "-"
        if both and dispatcher != "exact":
            mean, half = paired([runs[s]["top1"] for s in both], [results["exact", s]["top1"] for s in both])
            lost = f"{mean:.2f}" + ("" if half is None else f" ± {half:.2f}") + f" ({len(both)})"
        sent, whole = (
            statistics.mean(run[name] for run in runs.values())
            for name in ("alltoall_bytes", "alltoall_bytes_uncompressed")
        )
        rows.append(
            (
                dispatcher,
                len(runs),
                spread([100 * run["top1"] for run in runs.values()], 2),
                spread([100 * run["top1_exact"] for run in runs.values()], 2),
                lost,
                f"{100 * statistics.mean(run['rows_sent'] for run in runs.values()):.1f}%",
                f"{sent / 1e6:.2f} MB" + (f", {100 * sent / whole:.1f}%" if whole else ""),
                f"{statistics.mean(run['iteration_time_ms'] for run in runs.values()):.0f} ms",
            )
        )
    header = (
        "dispatcher", "seeds", "top-1, %", "evaluated exactly, %", "points lost, 95% interval (pairs)", "rows sent",
        "all-to-all bytes per iteration, of exact", "iteration",
    )  # fmt: skip
    return table(header, rows)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--dispatchers", nargs="+", default=["exact", "LSH 20%"], choices=list(DISPATCHERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--pretrain-on", type=Path, help="other pictures, to start from weights that were trained on them"
    )
    parser.add_argument("--folder", type=Path, help="of the runs (default: runs/vision, runs/vision-finetuning)")
    options = parser.parse_args(words)
    name = "vision" if options.pretrain_on is None else "vision-finetuning"
    options.folder = folder = options.folder or ROOT / "runs" / name
    if not options.data.is_dir():
        parser.error(f"--data {options.data} is not there: give the folder with Fashion-MNIST's IDX files")
    if options.pretrain_on is not None:
        starting_point(options)
    jobs = []
    for seed, dispatcher in product(options.seeds, options.dispatchers):  # by seed, so that pairs are complete early
        place = folder / f"{dispatcher.replace(' ', '-').replace('%', '')}-seed{seed}"
        jobs.append(TrainingJob((dispatcher, seed), place, flags_for(dispatcher, seed, place, options), RANKS, SCRIPT))
    train_all(jobs, outcome)
    results = finished(folder)
    print(f"\n{report(results)}")
    settings = {"steps": options.steps, "batch": BATCH, "lr": options.lr, "data": options.data.name}
    runs = [{"dispatcher": d, "seed": s} | result for (d, s), result in sorted(results.items())]
    print(f"\nwrote {write_result(name.replace('-', '_'), {'settings': settings, 'runs': runs})}")


if __name__ == "__main__":
    main()
