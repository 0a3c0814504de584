"""LSH's own time (hash, cluster, refine, compress, restore; forward and backward) against that of another checkout.

    git worktree add ../before REVISION && (cd ../before && python kernels/build.py cpu)
    python -m benchmarks.against ../before

Each checkout runs in a process of its own, on the layers of benchmarks/overhead.py, on one thread; passes of the two take
turns. Times are those of the process, which other processes on the machine lengthen little. Blocks have 128 representatives
in both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, table, write_result

BLOCK = 128


class Checkout:
    """A process that measures passes of one checkout's layer, one whenever it is asked to."""

    def __init__(self, root: Path, size: dict[str, int]) -> None:
        environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(size)],
            cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self) -> dict[str, float]:
        """ms of each stage in one pass."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print("pass", file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"the benchmark ended with exit code {self._process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def work(size: dict[str, int]) -> None:
    """Answer each line of standard input with one pass."""
    time.perf_counter = time.process_time  # what spans are measured with
    import torch

    from benchmarks import overhead
    from megatron_lsh.config import LSHConfig

    torch.set_num_threads(1)
    cfg = LSHConfig(lsh_interpolation_block=BLOCK)
    layer = overhead.Layer(overhead.Size(**size), cfg, torch.device("cpu"), torch.float32)
    for _ in sys.stdin:
        ms = layer.lsh()
        print(json.dumps({stage: ms[stage] for stage in overhead.LSH_STAGES}), flush=True)


def compare(roots: tuple[Path, Path], size: dict[str, int], repeats: int) -> dict[str, Any]:
    """Medians in ms of both, by stage, and the ratio of this checkout's to the other's: median and quartiles."""
    checkouts = [Checkout(root, size) for root in roots]
    samples: list[list[dict[str, float]]] = [[], []]
    for repeat in range(repeats + 2):
        for which in (0, 1) if repeat % 2 else (1, 0):
            sample = checkouts[which].ask()
            if repeat >= 2:  # first calls
                samples[which].append(sample)
    for checkout in checkouts:
        checkout.close()
    ratios = [sum(a.values()) / sum(b.values()) for a, b in zip(*samples, strict=True)]
    ours, theirs = ({key: statistics.median(s[key] for s in each) for key in each[0]} for each in samples)
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return size | {"ms": ours, "before_ms": theirs, "ratio": statistics.median(ratios), "quartiles": quartiles}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, nargs="?", help="another checkout of this project, its kernels built")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", nargs="*", type=int, default=[128, 256, 512, 1024])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--name", default="against", help="of the result file")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.worker:
        return work(arguments.worker)
    if arguments.other is None:
        parser.error("name the other checkout")
    roots = (Path(__file__).resolve().parents[1], arguments.other.resolve())
    results = []
    for hidden in arguments.hidden:
        results.append(compare(roots, {"tokens": arguments.tokens, "hidden": hidden}, arguments.repeats))
        print(f"D {hidden}: {results[-1]['ratio']:.2f}", flush=True)
    stages = list(results[0]["ms"])
    rows = [
        [r["hidden"], *(f"{r['ms'][s]:.2f} / {r['before_ms'][s]:.2f}" for s in stages), f"{r['ratio']:.2f}",
         f"{r['quartiles'][0]:.2f}-{r['quartiles'][2]:.2f}"]
        for r in results
    ]  # fmt: skip
    print(f"\n{table(['D', *(f'{s}, ms, now / before' for s in stages), 'ratio', 'quartiles'], rows)}\n")
    commits = [
        subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True).stdout.strip()
        for root in roots
    ]
    path = write_result(arguments.name, {"settings": {"tokens": arguments.tokens, "repeats": arguments.repeats},
                                         "commits": commits, "sizes": results})  # fmt: skip
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
