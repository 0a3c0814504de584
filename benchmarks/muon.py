"""Muon against AdamW: the README's model on one rank with a third of its batch, exact and with LSH, by pairs of runs.

    python -m benchmarks.muon --seeds 1 2 3 --iters 120

Both optimizers get the README's learning rate: with a scale factor of 0.2 Muon's updates are as large as AdamW's
(arXiv:2502.16982, section 2.2). Losses are given with their standard deviation over seeds, paired differences with the
standard error of their mean. Finished runs are kept in --folder, and a comparison that was stopped goes on there.
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
    paired,
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
KINDS = [(optimizer, dispatcher) for optimizer in OPTIMIZERS for dispatcher in DISPATCHERS]
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
    """The table, and its paired differences: Muon - AdamW by dispatcher, LSH - exact by optimizer."""
    seeds = sorted(set.intersection(*({s for o, d, s, n in runs if (o, d, n) == (*kind, iters)} for kind in KINDS)))

    def column(optimizer: str, dispatcher: str, figure: str = "validation_loss") -> list[float]:
        return [runs[optimizer, dispatcher, seed, iters][figure] or 0.0 for seed in seeds]

    def less(one: list[float], other: list[float]) -> list[float]:
        return [a - b for a, b in zip(one, other, strict=True)]

    if not seeds:
        return "no seed has all four runs yet", {}
    muon = {d: less(column("Muon", d), column("AdamW", d)) for d in DISPATCHERS}
    lsh = {o: less(column(o, "LSH"), column(o, "exact")) for o in OPTIMIZERS}
    energies = " / ".join(f"{statistics.mean(column(o, 'LSH', 'lsh_residual_energy')):.2f}" for o in OPTIMIZERS)
    rows = [
        (d, *(spread(column(o, d)) for o in OPTIMIZERS), paired(muon[d]), energies if d == "LSH" else "")
        for d in DISPATCHERS
    ]
    rows.append(("LSH - exact", *(paired(lsh[o]) for o in OPTIMIZERS), paired(less(lsh["Muon"], lsh["AdamW"])), ""))
    header = ("validation loss", "AdamW", "Muon", "Muon - AdamW, paired", "residual energy, AdamW / Muon")
    return table(header, rows), {"seeds": seeds, "Muon - AdamW": muon, "LSH - exact": lsh}


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
    text, differences = compare(runs, args.iters)
    print(text)
    named = {"-".join(map(str, key)): run for key, run in runs.items()}
    print(f"wrote {write_result('muon', {'iters': args.iters, 'paired': differences, 'runs': named})}")


if __name__ == "__main__":
    main()
