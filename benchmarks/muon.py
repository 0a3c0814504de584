"""Muon against AdamW: the README's model on one rank with a third of its batch, exact and with LSH, by pairs of runs.

    python -m benchmarks.muon --seeds 1 2 3 --iters 120

Both optimizers get the README's learning rate: with a scale factor of 0.2 Muon's updates are as large as AdamW's
(arXiv:2502.16982, section 2.2). Finished runs are kept in --folder, and a comparison that was stopped goes on there.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchmarks.common import (
    DATA_FLAGS,
    ROOT,
    TrainingJob,
    finished,
    read_metrics,
    spread,
    table,
    train_all,
    write_result,
)  # fmt: skip

#: scripts/pretrain_readme.sh's, on one rank and with a third of its batch.
MODEL: list[Any] = [
    "--num-layers", 4, "--hidden-size", 256, "--num-attention-heads", 4, "--seq-length", 256,
    "--position-embedding-type", "rope", "--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear",
    "--attention-dropout", 0, "--hidden-dropout", 0, "--num-experts", 8, "--moe-ffn-hidden-size", 512,
    "--moe-router-topk", 2, "--moe-aux-loss-coeff", 1e-2, "--micro-batch-size", 4, "--global-batch-size", 4,
    "--lr", 3e-3, "--min-lr", 3e-4, "--lr-decay-style", "cosine", "--lr-warmup-fraction", 0.1,
    "--weight-decay", 0.1, "--adam-beta2", 0.95, "--device", "cpu", "--num-workers", 0,
]  # fmt: skip
OPTIMIZERS: dict[str, list[Any]] = {
    "AdamW": [],
    "Muon": ["--optimizer", "muon", "--muon-extra-scale-factor", 0.2],
}
DISPATCHERS: dict[str, list[Any]] = {"exact": [], "LSH": ["--moe-token-dispatcher-type", "lsh"]}
Key = tuple[str, str, int, int]
"""optimizer, dispatcher, seed, iterations"""


def flags_for(key: Key, place: Path) -> list[Any]:
    optimizer, dispatcher, seed, iters = key
    return [
        *MODEL, *DATA_FLAGS, *OPTIMIZERS[optimizer], *DISPATCHERS[dispatcher], "--seed", seed, "--train-iters", iters,
        "--log-interval", max(iters // 15, 1), "--eval-interval", iters, "--eval-iters", 16,
        "--metrics-jsonl", place / "metrics.jsonl",
    ]  # fmt: skip


def outcome(place: Path) -> dict[str, Any]:
    """The loss curve, the last validation, and what LSH merged."""
    records, evaluations = read_metrics(place / "metrics.jsonl")
    return {
        "training": [(record["iteration"], record["lm_loss"]) for record in records],
        "validation_loss": evaluations[-1]["validation_loss"],
        "lsh_residual_energy": records[-1].get("lsh_residual_energy"),
        "grad_norm": records[-1]["grad_norm"],
    }


def compare(runs: dict[tuple[Any, ...], dict[str, Any]], iters: int) -> tuple[str, dict[str, Any]]:
    """The table, and by dispatcher the paired differences Muon - AdamW."""
    rows, paired = [], {}
    for dispatcher in DISPATCHERS:
        found = {
            optimizer: {
                seed: run for (o, d, seed, n), run in runs.items() if (o, d, n) == (optimizer, dispatcher, iters)
            }
            for optimizer in OPTIMIZERS
        }
        both = sorted(found["AdamW"].keys() & found["Muon"].keys())
        if not both:
            continue
        losses = {optimizer: [found[optimizer][seed]["validation_loss"] for seed in both] for optimizer in OPTIMIZERS}
        differences = [muon - adamw for muon, adamw in zip(losses["Muon"], losses["AdamW"], strict=True)]
        paired[dispatcher] = {"seeds": both, "differences": differences}
        energies = [
            statistics.mean(run["lsh_residual_energy"] or 0.0 for run in by_seed.values()) for by_seed in found.values()
        ]
        rows.append(
            (
                dispatcher,
                *map(spread, losses.values()),
                spread(differences),
                "" if dispatcher == "exact" else " / ".join(f"{energy:.2f}" for energy in energies),
            )
        )
    header = ("dispatcher", "AdamW", "Muon", "difference, paired", "residual energy, AdamW / Muon")
    return table(header, rows), paired


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--iters", type=int, default=120)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "muon")
    args = parser.parse_args()
    keys: list[Key] = [
        (optimizer, dispatcher, seed, args.iters)
        for seed in args.seeds
        for dispatcher in DISPATCHERS
        for optimizer in OPTIMIZERS
    ]
    places = {key: args.folder / "-".join(map(str, key)).lower() for key in keys}
    train_all([TrainingJob(key, places[key], flags_for(key, places[key])) for key in keys], outcome, args.jobs)
    runs = finished(args.folder)
    text, paired = compare(runs, args.iters)
    print(text)
    named = {"-".join(map(str, key)): run for key, run in runs.items()}
    print(f"wrote {write_result('muon', {'iters': args.iters, 'paired': paired, 'runs': named})}")


if __name__ == "__main__":
    main()
