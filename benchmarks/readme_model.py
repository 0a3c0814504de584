"""The README's model, trained with the exact all-to-all and with LSH: both loss curves, bytes and step time.

    python -m benchmarks.readme_model --iters 300

The runs are `make pretrain` with another dispatcher, one after the other on the same ranks. Writes
benchmarks/results/readme_model.json and docs/figures/readme_model.png.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks.common import ROOT, read_metrics, result_path, table, write_result

DISPATCHERS: dict[str, list[str]] = {
    "alltoall": ["--moe-token-dispatcher-type", "alltoall"],
    "lsh": ["--moe-token-dispatcher-type", "lsh"],
    "lsh (paper)": ["--moe-token-dispatcher-type", "lsh", "--lsh-clustering", "bucket", "--lsh-residual", "identity"],
}


def train(name: str, iters: int, folder: Path) -> dict[str, Any]:
    """One run of scripts/pretrain_readme.sh; its figures."""
    place = folder / name.split(" ")[-1].strip(")")
    environment = os.environ | {"RUN_DIR": str(place), "ITERS": str(iters), "RESTART": "1"}
    command = ["bash", str(ROOT / "scripts" / "pretrain_readme.sh"), *DISPATCHERS[name]]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    records, evaluations = read_metrics(place / "metrics.jsonl")
    steady = records[len(records) // 4 :]

    def median(key: str) -> float | None:
        values = [record[key] for record in steady if record.get(key) is not None]
        return statistics.median(values) if values else None

    return {
        "training": [(record["iteration"], record["lm_loss"]) for record in records],
        "validation": [(record["iteration"], record["validation_loss"]) for record in evaluations],
        "iteration_time_ms": median("iteration_time_ms"),
        "iteration_time_quartiles_ms": statistics.quantiles([r["iteration_time_ms"] for r in steady], n=4),
        "alltoall_time_ms": median("alltoall_time_ms"),
        "alltoall_bytes": median("alltoall_bytes"),
        "alltoall_bytes_uncompressed": median("alltoall_bytes_uncompressed"),
        "lsh_compression_rate": median("lsh_compression_rate"),
        "lsh_residual_energy": median("lsh_residual_energy"),
    }


def plot(results: dict[str, dict[str, Any]]) -> Any:
    """Training and validation loss of every run against the iteration."""
    figure, axes = figures.panels(2, 10, 4, sharey=True)
    for axis, kind in zip(axes, ("training", "validation"), strict=True):
        for name, result in results.items():
            axis.plot(*zip(*result[kind], strict=True), label=name, marker="o" if kind == "validation" else None)
        axis.set(xlabel="iteration", title=f"{kind} loss")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_ylabel("cross-entropy, nats per token")
    return figure


def drawn() -> Any:
    """The figure of the recorded runs."""
    return plot(json.loads(result_path("readme_model").read_text())["runs"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iters", type=int, default=300)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "readme-model")
    arguments = parser.parse_args()
    results = {name: train(name, arguments.iters, arguments.folder) for name in DISPATCHERS}
    rows = []
    for name, result in results.items():
        low, _, high = result["iteration_time_quartiles_ms"]
        rows.append(
            (
                name,
                f"{result['validation'][-1][1]:.3f}",
                "100%" if (rate := result["lsh_compression_rate"]) is None else f"{100 * rate:.1f}%",
                "" if (energy := result["lsh_residual_energy"]) is None else f"{energy:.2f}",
                f"{result['alltoall_bytes'] / 1e6:.2f}",
                f"{result['alltoall_bytes_uncompressed'] / 1e6:.2f}",
                f"{result['iteration_time_ms']:.0f} ({low:.0f}-{high:.0f})",
                f"{result['alltoall_time_ms']:.0f}",
            )
        )
    header = ("dispatcher", "validation loss", "rows sent", "residual energy", "MB sent / step", "MB uncompressed / step",
              "ms / step (quartiles)", "ms in all-to-all")  # fmt: skip
    print(table(header, rows))
    figures.save(plot(results), "readme_model")
    print(f"wrote {write_result('readme_model', {'iters': arguments.iters, 'runs': results})}")


if __name__ == "__main__":
    main()
