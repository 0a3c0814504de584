"""What compression costs in accuracy when pretrained models are fine-tuned: 20 newsgroups, exact and with LSH.

    python -m benchmarks.finetuning --gpt runs/gpt-moe-lsh/checkpoints --bert runs/bert-moe-lsh/checkpoints

Each folder is the --save folder of a pretraining run, with its config.json. Every model is fine-tuned with each dispatcher
and seed on two CPU ranks with EP 2, one run after the other; the best epoch by validation accuracy is tested. Nothing is
pretrained here. All models pool by the mean over the tokens, unless --pooling says otherwise. Finished runs
are kept in --folder, and the table is made of all that are there: a comparison can be made in parts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, TrainingJob, finished, spread, table, train_all, write_result

DISPATCHERS = {
    "exact": ["--moe-token-dispatcher-type", "alltoall"],
    "LSH 20%": ["--moe-token-dispatcher-type", "lsh", "--lsh-target-rate", 0.2, "--lsh-eval", "both"],
}
RANKS = 2


def texts(folder: Path, counts: dict[str, int]) -> dict[str, Path]:
    """The three sets, made first if they are not there, cut to the first texts of these numbers (0: all)."""
    if not (folder / "train.jsonl").is_file():
        tool = [sys.executable, str(ROOT / "tools" / "prepare_20newsgroups.py"), "--output-dir", str(folder)]
        subprocess.run(tool, check=True)
    files = {name: folder / f"{name}.jsonl" for name in ("train", "valid", "test")}
    for name, count in counts.items():
        if count:
            lines = files[name].read_text().splitlines(keepends=True)[:count]
            files[name] = folder / f"{name}-{count}.jsonl"
            files[name].write_text("".join(lines))
    return files


def flags_for(
    pretrained: Path, dispatcher: str, seed: int, place: Path, files: dict[str, Path], options: argparse.Namespace
) -> list[Any]:
    """The command line of one run."""
    return [
        "--config", pretrained / "config.json", "--pretrained-checkpoint", pretrained,
        *(word for name, file in files.items() for word in (f"--{name}-data", file)),
        "--epochs", options.epochs, "--seq-length", options.seq_length, "--lr", options.lr, "--lr-warmup-fraction", 0.1,
        "--micro-batch-size", options.micro_batch_size, "--weight-decay", 0.01, "--seed", seed, "--pooling", options.pooling,
        "--expert-model-parallel-size", RANKS, "--device", "cpu", "--num-workers", 0, "--log-interval", 20,
        "--save", place / "checkpoints", "--no-save-optim", "--metrics-jsonl", place / "metrics.jsonl",
        *DISPATCHERS[dispatcher],
    ]  # fmt: skip


def outcome(place: Path) -> dict[str, Any]:
    """What one finished run is judged by."""
    records = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    training = [record for record in records if "lm_loss" in record]
    test = next(record for record in reversed(records) if "test_accuracy" in record)
    rates = [r["lsh_compression_rate"] for r in training if r["lsh_compression_rate"] is not None]
    return {
        "test_accuracy": test["test_accuracy"],
        "test_accuracy_exact": test.get("test_accuracy_exact", test["test_accuracy"]),
        "test_macro_f1": test["test_macro_f1"],
        "best_epoch": test["epoch"],
        "validation_accuracy": max(r["validation_accuracy"] for r in records if "validation_accuracy" in r),
        "alltoall_bytes": statistics.mean(r["alltoall_bytes"] for r in training),
        "alltoall_bytes_uncompressed": statistics.mean(r["alltoall_bytes_uncompressed"] for r in training),
        "rows_sent": statistics.mean(rates) if rates else 1.0,
        "iteration_time_ms": statistics.median(r["iteration_time_ms"] for r in training),
    }


def report(results: Mapping[Any, dict[str, Any]]) -> str:
    """One row per model and dispatcher; mean ± standard deviation over the seeds."""
    rows = []
    for model, dispatcher in dict.fromkeys((model, dispatcher) for model, dispatcher, _ in results):
        runs = [result for job, result in results.items() if job[:2] == (model, dispatcher)]

        def mean(name: str, runs: list[dict[str, Any]] = runs) -> float:
            return statistics.mean(run[name] for run in runs)

        rows.append(
            (
                model,
                dispatcher,
                len(runs),
                spread([100 * run["test_accuracy"] for run in runs], 2),
                spread([100 * run["test_accuracy_exact"] for run in runs], 2),
                spread([100 * run["test_macro_f1"] for run in runs], 2),
                f"{mean('alltoall_bytes') / 1e6:.2f} MB",
                f"{100 * mean('alltoall_bytes') / mean('alltoall_bytes_uncompressed'):.1f}%",
                f"{mean('iteration_time_ms'):.0f} ms",
            )
        )
    header = (
        "model", "dispatcher", "seeds", "test accuracy, %", "evaluated exactly, %", "macro F1, %",
        "all-to-all bytes per iteration", "of exact", "iteration",
    )  # fmt: skip
    return table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpt", type=Path, help="--save folder of a GPT-MoE")
    parser.add_argument("--bert", type=Path, help="--save folder of a BERT-MoE")
    parser.add_argument("--t5", type=Path, help="--save folder of a T5-MoE")
    parser.add_argument("--dispatchers", nargs="+", default=list(DISPATCHERS), choices=list(DISPATCHERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--micro-batch-size", type=int, default=16)
    parser.add_argument("--pooling", default="mean")
    parser.add_argument("--train-texts", type=int, default=3200, help="train on the first ones only; 0: all")
    parser.add_argument("--test-texts", type=int, default=2000, help="test on the first ones only; 0: all")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "20newsgroups")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "finetuning")
    options = parser.parse_args()
    models = {
        name: folder.resolve() for name in ("gpt", "bert", "t5") if (folder := getattr(options, name)) is not None
    }
    if not models and not finished(options.folder):
        parser.error("give --gpt, --bert or --t5")
    files = texts(options.data, {"train": options.train_texts, "test": options.test_texts})
    jobs = []
    for seed, model, dispatcher in product(options.seeds, models, options.dispatchers):
        place = options.folder / f"{model}-{dispatcher.replace(' ', '-').replace('%', '')}-seed{seed}"
        if not (place / "done.json").exists():
            shutil.rmtree(place, ignore_errors=True)  # its checkpoints are in the way of a new run
        flags = flags_for(models[model], dispatcher, seed, place, files, options)
        jobs.append(TrainingJob((model, dispatcher, seed), place, flags, RANKS, "finetune_classification.py"))
    train_all(jobs, outcome)
    results = finished(options.folder)
    print(f"\n{report(results)}")
    places = {"gpt", "bert", "t5", "data", "folder"}
    settings = {name: value for name, value in vars(options).items() if name not in places}
    runs = [{"model": m, "dispatcher": d, "seed": s} | result for (m, d, s), result in sorted(results.items())]
    print(f"\nwrote {write_result('finetuning', {'settings': settings, 'runs': runs})}")


if __name__ == "__main__":
    main()
