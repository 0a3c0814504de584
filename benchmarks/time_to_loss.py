"""Seconds to the exact run's final loss on slow links: benchmarks.quality says the steps,
benchmarks.slow_network their time.

    python -m benchmarks.quality --variants exact interpolate --iters 250 325 750
    sudo python -m benchmarks.slow_network --shape quality --name slow_network_quality
    python -m benchmarks.time_to_loss

Both measure the same model. A run of n steps has its own learning rate schedule, so "steps needed" is the length of a
whole run that ends at the exact run's loss: a variant's final losses, means over seeds, are interpolated linearly in log n
between two of its lengths, never beyond them. Losses are those of the exactly evaluated model, which is what is exported.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, table, write_result

RESULTS = ROOT / "benchmarks" / "results"


def final_losses(runs: list[dict[str, Any]], variant: str) -> dict[int, float]:
    """Length -> mean exact validation loss over seeds."""
    lengths = sorted({run["iters"] for run in runs if run["variant"] == variant})
    return {
        n: statistics.mean(
            run["validation_loss_exact"] for run in runs if run["variant"] == variant and run["iters"] == n
        )
        for n in lengths
    }


def steps_needed(losses: dict[int, float], wanted: float) -> float | None:
    """Length of the run that ends at `wanted`; None where it lies outside the lengths that were run."""
    points = sorted(losses.items())
    for (short, high), (long, low) in pairwise(points):
        if low <= wanted <= high:
            share = (high - wanted) / (high - low)
            return math.exp(math.log(short) + share * (math.log(long) - math.log(short)))
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quality", type=Path, default=RESULTS / "quality.json")
    parser.add_argument("--network", type=Path, default=RESULTS / "slow_network_quality.json")
    parser.add_argument(
        "--variants", nargs="+", default=["interpolate"], help="of benchmarks.quality, at 20%% of the rows"
    )
    arguments = parser.parse_args()
    runs = json.loads(arguments.quality.read_text())["runs"]
    measurements = json.loads(arguments.network.read_text())["measurements"]
    exact = final_losses(runs, "exact")
    rows, results = [], []
    for measurement in measurements:
        for link in measurement["links"]:
            times = {v["variant"]: v for v in link["variants"]}
            exact_ms, lsh_ms = times["exact"]["step_ms"], times["LSH 20%"]["step_ms"]
            for variant in arguments.variants:
                losses = final_losses(runs, variant)
                for n, wanted in exact.items():
                    needed = steps_needed(losses, wanted)
                    if needed is None:
                        continue
                    ratio = needed * lsh_ms / (n * exact_ms)
                    share = times["exact"]["alltoall_share"]
                    results.append(
                        {
                            "ranks": measurement["ranks"], "alltoall_share": share, "variant": variant, "iters": n,
                            "loss": wanted, "steps_needed": needed, "exact_s": n * exact_ms / 1e3,
                            "lsh_s": needed * lsh_ms / 1e3, "ratio": ratio,
                        }
                    )  # fmt: skip
                    rows.append(
                        (
                            measurement["ranks"], f"{share:.0%}", variant, f"{wanted:.3f}", n, f"{needed:.0f}",
                            f"{n * exact_ms / 1e3:.0f}", f"{needed * lsh_ms / 1e3:.0f}", f"{ratio:.2f}",
                        )
                    )  # fmt: skip
    header = (
        "ranks",
        "exact all-to-all",
        "variant",
        "loss",
        "exact steps",
        "steps needed",
        "exact, s",
        "LSH, s",
        "ratio",
    )
    print(table(header, rows))
    print(f"\nwrote {write_result('time_to_loss', {'results': results})}")


if __name__ == "__main__":
    main()
