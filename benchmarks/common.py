"""What every benchmark needs: the machine in words, training runs as subprocesses, tables, results as JSON."""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data" / "stdlib"

#: The corpus and tokenizer that `make pretrain` prepares (`make data` alone does, too).
DATA_FLAGS = [
    "--data-path", str(DATA / "stdlib_text_document"), "--split", "95,5,0",
    "--tokenizer-type", "GPTSentencePieceTokenizer", "--tokenizer-model", str(DATA / "tokenizer.model"),
]  # fmt: skip


def machine() -> dict[str, Any]:
    """Hardware, versions and commit, for the head of every result."""
    import torch

    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def training_command(flags: Iterable[object], ranks: int = 1, script: str = "pretrain_gpt_moe.py") -> list[str]:
    """The command that trains with these flags on `ranks` processes of this machine."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    start = torchrun if ranks > 1 else [sys.executable]
    return [*start, str(ROOT / script), *map(str, flags)]


def start_training(
    flags: Iterable[object], log: Path, ranks: int = 1, threads: int = 1, script: str = "pretrain_gpt_moe.py"
) -> subprocess.Popen[bytes]:
    """Start a training run in the background, its output in `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as out:
        return subprocess.Popen(
            training_command(flags, ranks, script), stdout=out, stderr=out, env=environment, cwd=ROOT
        )


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for a run; its last lines become the error if it failed."""
    if process.wait() != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(f"training failed ({log}):\n{tail}")


@dataclass(frozen=True)
class TrainingJob:
    """One training run of a comparison. `key` says which, and becomes JSON; `place` is its folder, of its own."""

    key: tuple[Hashable, ...]
    place: Path
    flags: Sequence[object]
    ranks: int = 1
    script: str = "pretrain_gpt_moe.py"


def train_all(jobs: Iterable[TrainingJob], outcome: Callable[[Path], dict[str, Any]], parallel: int = 1) -> None:
    """Train what is not there yet, `parallel` runs at a time; what `outcome` finds in a folder is kept in its done.json."""
    waiting = [job for job in jobs if not (job.place / "done.json").exists()]

    def afresh() -> Iterator[TrainingJob]:
        for job in waiting:
            (job.place / "metrics.jsonl").unlink(missing_ok=True)
            yield job

    started = time.monotonic()
    for done, job in enumerate(as_they_end(afresh(), parallel), 1):
        (job.place / "done.json").write_text(json.dumps({"job": job.key} | outcome(job.place)))
        progress(done, len(waiting), started, ", ".join(map(str, job.key)))


def as_they_end(jobs: Iterable[TrainingJob], parallel: int) -> Iterator[TrainingJob]:
    """Train, `parallel` runs at a time, and yield each job when it has ended well; it is taken from `jobs` when it starts.

    Raises:
        SystemExit: a run failed.
    """
    queue = iter(jobs)
    running: list[tuple[TrainingJob, subprocess.Popen[bytes]]] = []
    while True:
        for job in itertools.islice(queue, parallel - len(running)):
            running.append((job, start_training(job.flags, job.place / "log.txt", job.ranks, script=job.script)))
        if not running:
            return
        for entry in [entry for entry in running if entry[1].poll() is not None]:
            job, process = entry
            running.remove(entry)
            finish(process, job.place / "log.txt")
            yield job
        time.sleep(0.5)


def finished(folder: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Outcomes of all runs that `train_all` finished in subfolders of `folder`, by key."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*/done.json"))]
    return {tuple(result.pop("job")): result for result in results}


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training records, evaluation records) of a --metrics-jsonl file."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [r for r in records if "lm_loss" in r], [r for r in records if "validation_loss" in r]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """``mean +- standard deviation (n)``; a single value stands alone."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def standard_error(values: Sequence[float]) -> float | None:
    """Of their mean; None for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def paired(differences: Sequence[float]) -> str:
    """The mean of paired differences and its standard error; a single value stands alone."""
    error = standard_error(differences)
    return f"{statistics.mean(differences):+.3f}" + ("" if error is None else f" ± {error:.3f}")


#: 0.975 quantiles of Student's t for 1, 2, ... degrees of freedom: what a 95% interval is made of.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """95% interval of the mean of paired differences (Student's t); None for a single one.

    A bar holds if the upper end is below it.
    """
    error = standard_error(differences)
    if error is None:
        return None
    # A quantile of fewer degrees of freedom is larger: more than 16 seeds get a little too wide an interval.
    half = _STUDENT[min(len(differences) - 1, len(_STUDENT)) - 1] * error
    return statistics.mean(differences) - half, statistics.mean(differences) + half


def mean_and_interval(differences: Sequence[float], digits: int = 3) -> str:
    """``+0.050 (-0.004 to +0.104)``; a single difference stands alone."""
    mean, ends = f"{statistics.mean(differences):+.{digits}f}", interval(differences)
    return mean if ends is None else f"{mean} ({ends[0]:+.{digits}f} to {ends[1]:+.{digits}f})"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def result_path(name: str) -> Path:
    """benchmarks/results/NAME.json, or in the folder of the checkout that MEGATRON_LSH_RESULTS names."""
    return ROOT / os.environ.get("MEGATRON_LSH_RESULTS", "benchmarks/results") / f"{name}.json"


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Save a result with the machine it was measured on."""
    path = result_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine()} | result, indent=1) + "\n")
    return path


def progress(done: int, total: int, started: float, what: str) -> None:
    """One line: percent, what just ended, time to go."""
    elapsed = time.monotonic() - started
    left = elapsed / max(done, 1) * (total - done)
    print(f"{100 * done / total:5.1f}% | {what} | {elapsed / 60:.1f} min, ETA {left / 60:.1f} min", flush=True)
