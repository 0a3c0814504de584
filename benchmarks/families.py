"""What compression costs each kind of language model: GPT, BERT and T5 with experts, pretrained exactly and with LSH.

    python -m benchmarks.families --seeds 1 2 3

All are trained on the same text, one run after the other on two CPU ranks with EP 2; BERT without its second loss, as
RoBERTa. What they predict differs, so losses of different families do not compare. The data is what `make data MODEL=...`
prepares, and is made first if it is not there. Finished runs are kept in --folder, and table, JSON and curves are made of
all that are there: a long comparison can be made in parts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks.common import (
    DATA,
    ROOT,
    TrainingJob,
    finished,
    read_metrics,
    result_path,
    spread,
    table,
    train_all,
    write_result,
)  # fmt: skip

RANKS = 2
COMMON: list[Any] = [
    "--hidden-size", 128, "--num-attention-heads", 4, "--attention-dropout", 0, "--hidden-dropout", 0,
    "--num-experts", 8, "--moe-ffn-hidden-size", 256, "--moe-router-topk", 2, "--moe-aux-loss-coeff", 1e-2,
    "--expert-model-parallel-size", RANKS, "--micro-batch-size", 8, "--global-batch-size", 8 * RANKS,
    "--min-lr", 1e-4, "--lr-decay-style", "cosine", "--lr-warmup-fraction", 0.1, "--weight-decay", 0.1,
    "--adam-beta2", 0.95, "--split", "95,5,0", "--device", "cpu", "--num-workers", 0, "--lsh-eval", "both",
]  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One kind of model: its entry script, its data and its flags beside COMMON."""

    script: str
    data: str
    tokenizer: tuple[Any, ...]
    flags: tuple[Any, ...]


_SENTENCEPIECE = ("--tokenizer-model", DATA / "tokenizer.model", "--tokenizer-type")
FAMILIES = {
    "gpt": Family(
        "pretrain_gpt_moe.py",
        "stdlib_text_document",
        (*_SENTENCEPIECE, "GPTSentencePieceTokenizer"),
        ("--num-layers", 4, "--seq-length", 128, "--position-embedding-type", "rope", "--normalization", "RMSNorm",
         "--swiglu", "--disable-bias-linear", "--lr", 3e-3),
    ),
    "bert": Family(
        "pretrain_bert_moe.py",
        "stdlib_bert_text_sentence",
        ("--vocab-file", DATA / "vocab.txt", "--tokenizer-type", "BertWordPieceCase"),
        ("--num-layers", 4, "--seq-length", 128, "--position-embedding-type", "rope", "--bert-no-binary-head",
         "--lr", 1e-3),
    ),
    "t5": Family(
        "pretrain_t5_moe.py",
        "stdlib_t5_text_sentence",
        (*_SENTENCEPIECE, "SentencePieceTokenizer", "--vocab-extra-ids", 100),
        ("--encoder-num-layers", 3, "--decoder-num-layers", 3, "--encoder-seq-length", 128, "--decoder-seq-length", 48,
         "--position-embedding-type", "relative", "--normalization", "RMSNorm", "--disable-bias-linear", "--lr", 1e-3),
    ),
}  # fmt: skip
LSH = ["--moe-token-dispatcher-type", "lsh", "--lsh-target-rate", 0.2]
DISPATCHERS: dict[str, list[Any]] = {
    "exact": ["--moe-token-dispatcher-type", "alltoall"],
    "LSH 20%": LSH,
    "LSH 20%, none": [*LSH, "--lsh-residual", "none"],
    "LSH 20%, identity": [*LSH, "--lsh-residual", "identity"],
}

Key = tuple[str, str, int, int]
"""family, dispatcher, seed, iterations"""
Runs = dict[Any, dict[str, Any]]
"""outcome by Key"""


def job_for(key: Key, folder: Path) -> TrainingJob:
    """The command line of one run, and where it is kept."""
    name, dispatcher, seed, iters = key
    family = FAMILIES[name]
    words = "".join(letter if letter.isalnum() else "-" for letter in dispatcher)
    place = folder / f"{name}-{words}-seed{seed}-{iters}"
    flags = [
        *COMMON, *family.flags, "--data-path", DATA / family.data, *family.tokenizer, *DISPATCHERS[dispatcher],
        "--seed", seed, "--train-iters", iters, "--log-interval", max(iters // 30, 1),
        "--eval-interval", max(iters // 3, 1), "--eval-iters", 12, "--metrics-jsonl", place / "metrics.jsonl",
    ]  # fmt: skip
    return TrainingJob(key, place, flags, RANKS, family.script)


def prepare(families: list[str]) -> None:
    """The corpus, its tokenizers and the token files of these families, unless they are there."""
    for name in families:
        if not (DATA / f"{FAMILIES[name].data}.idx").exists():
            environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
            command = ["bash", str(ROOT / "scripts" / "prepare_readme_data.sh"), str(DATA), name]
            subprocess.run(command, check=True, cwd=ROOT, env=environment)


def outcome(place: Path) -> dict[str, Any]:
    """What one finished run is judged by, and its curves."""
    records, evaluations = read_metrics(place / "metrics.jsonl")
    steady = records[len(records) // 4 :]
    last = evaluations[-1]
    rates = [r["lsh_compression_rate"] for r in records if r["lsh_compression_rate"] is not None]
    energies = [r["lsh_residual_energy"] for r in records if r["lsh_residual_energy"] is not None]
    return {
        "validation_loss": last["validation_loss"],
        "validation_loss_exact": last.get("validation_loss_exact", last["validation_loss"]),
        "rows_sent": statistics.mean(rates) if rates else 1.0,
        "residual_energy": energies[-1] if energies else None,
        "alltoall_bytes": statistics.mean(r["alltoall_bytes"] for r in records),
        "alltoall_bytes_uncompressed": statistics.mean(r["alltoall_bytes_uncompressed"] for r in records),
        "iteration_time_ms": statistics.median(r["iteration_time_ms"] for r in steady),
        "training": [(r["iteration"], r["lm_loss"]) for r in records],
        "validation": [(r["iteration"], r["validation_loss"]) for r in evaluations],
    }


def groups(runs: Runs) -> dict[tuple[str, str, int], dict[int, dict[str, Any]]]:
    """(family, dispatcher, iterations) -> seed -> run, in the order of FAMILIES and DISPATCHERS."""
    kinds = sorted(
        {(name, dispatcher, iters) for name, dispatcher, _, iters in runs},
        key=lambda kind: (kind[2], list(FAMILIES).index(kind[0]), list(DISPATCHERS).index(kind[1])),
    )
    return {
        (name, dispatcher, iters): {
            seed: run for (n, d, seed, i), run in sorted(runs.items()) if (n, d, i) == (name, dispatcher, iters)
        }
        for name, dispatcher, iters in kinds
    }


def report(runs: Runs) -> str:
    """A Markdown table; gaps are paired by seed with the exact run."""
    rows = []
    for (name, dispatcher, iters), of_seed in groups(runs).items():
        found = list(of_seed.values())
        exact = {seed: run for (n, d, seed, i), run in runs.items() if (n, d, i) == (name, "exact", iters)}
        gaps = [
            run["validation_loss"] - exact[seed]["validation_loss"] for seed, run in of_seed.items() if seed in exact
        ]
        energies = [run["residual_energy"] for run in found if run["residual_energy"] is not None]

        def mean(key: str, found: list[dict[str, Any]] = found) -> float:
            return statistics.mean(run[key] for run in found)

        rows.append(
            (
                name, dispatcher, iters, len(found), spread([run["validation_loss"] for run in found]),
                spread(gaps) if gaps and dispatcher != "exact" else "",
                spread([run["validation_loss_exact"] for run in found]) if dispatcher != "exact" else "",
                f"{100 * mean('rows_sent'):.1f}%", f"{mean('alltoall_bytes') / 1e6:.2f}",
                f"{mean('alltoall_bytes_uncompressed') / 1e6:.2f}", spread(energies, 2) if energies else "",
                f"{mean('iteration_time_ms'):.0f}",
            )
        )  # fmt: skip
    header = (
        "model", "dispatcher", "iterations", "seeds", "validation loss", "gap to exact", "evaluated exactly", "rows sent",
        "MB sent / step", "MB uncompressed / step", "residual energy", "ms / step",
    )  # fmt: skip
    return table(header, rows)


def plot(runs: Runs) -> Any:
    """Training loss of every family over the iterations: the mean over the seeds, and their range as a band."""
    longest = max(iters for *_, iters in runs)
    shown = {kind: list(found.values()) for kind, found in groups(runs).items() if kind[2] == longest}
    names = list(dict.fromkeys(name for name, _, _ in shown))
    figure, axes = figures.panels(len(names), 4.2 * len(names), 3.6)
    for axis, name in zip(axes, names, strict=True):
        for (family, dispatcher, _), found in shown.items():
            if family != name:
                continue
            iterations = [iteration for iteration, _ in found[0]["training"]]
            points = list(zip(*([loss for _, loss in run["training"]] for run in found), strict=True))
            (line,) = axis.plot(iterations, list(map(statistics.mean, points)), label=dispatcher)
            lows, highs = list(map(min, points)), list(map(max, points))
            axis.fill_between(iterations, lows, highs, color=line.get_color(), alpha=0.2, linewidth=0)
        axis.set(xlabel="iteration", title=name.upper())
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("training loss, nats per predicted token")
    return figure


def drawn() -> Any:
    """The figure of the recorded runs."""
    runs = json.loads(result_path("families").read_text())["runs"]
    return plot({(run["model"], run["dispatcher"], run["seed"], run["iters"]): run for run in runs})


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--dispatchers", nargs="+", default=["exact", "LSH 20%"], choices=list(DISPATCHERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--iters", type=int, default=360)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "families")
    options = parser.parse_args(words)
    prepare(options.families)
    keys = [
        (f, d, seed, options.iters) for seed in options.seeds for f in options.families for d in options.dispatchers
    ]
    train_all([job_for(key, options.folder) for key in keys], outcome)
    runs = {k: run for k, run in finished(options.folder).items() if k[0] in FAMILIES and k[1] in DISPATCHERS}
    print(f"\n{report(runs)}")
    figures.save(plot(runs), "families")
    rows = [{"model": m, "dispatcher": d, "seed": s, "iters": i} | run for (m, d, s, i), run in sorted(runs.items())]
    print(f"\nwrote {write_result('families', {'runs': rows})}")


if __name__ == "__main__":
    main()
