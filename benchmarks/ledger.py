"""Comparisons that are made in many sittings: a plan of runs, each of which is added to a JSON file when it has ended.

A stop loses what has not ended, or less where a run saves its state in its folder (`--save`, `--load`); the same command
goes on. Before the first run the plan is printed with what it takes.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import TrainingJob, as_they_end, progress, result_path, table, write_result

Key = tuple[Hashable, ...]


def recorded(name: str, fields: Sequence[str]) -> dict[Key, dict[str, Any]]:
    """All runs of the file, by their key."""
    path = result_path(name)
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    return {tuple(run.pop(field) for field in fields): run for run in runs}


def train_recorded(
    name: str,
    fields: Sequence[str],
    jobs: Sequence[TrainingJob],
    outcome: Callable[[Path], dict[str, Any]],
    head: dict[str, Any],
    cost: Callable[[TrainingJob], float] = lambda job: 1.0,
    parallel: int = 1,
) -> dict[Key, dict[str, Any]]:
    """Train what is not recorded yet, in the order of `jobs`, and return all that is.

    Args:
        fields: names of the parts of a job's key.
        outcome: what is kept of a run, found in its folder; the folder's `state` is deleted then.
        head: stands in the file above the runs.
        cost: of a job, in any unit; for the time that is left.
    """
    found = recorded(name, fields)
    waiting = [job for job in jobs if job.key not in found]
    started, total, done = time.monotonic(), sum(map(cost, waiting)), 0.0
    for ended in as_they_end(waiting, parallel):
        # Another command may have added its runs meanwhile.
        found |= recorded(name, fields) | {ended.key: outcome(ended.place)}
        runs = [dict(zip(fields, key, strict=True)) | run for key, run in found.items()]
        write_result(name, head | {"runs": runs})
        shutil.rmtree(ended.place / "state", ignore_errors=True)
        done += cost(ended)
        loss = found[ended.key].get("validation_loss")
        what = ", ".join(map(str, ended.key)) + ("" if loss is None else f": {loss:.4f}")
        progress(1000 * done / total, 1000, started, what)
    return found


def list_of_runs(rows: Sequence[tuple[str, Sequence[int], int, float]], done: int) -> str:
    """The plan and what it takes: (what, seeds, steps, seconds per step) in Markdown, and the sum in hours of one core."""
    hours = [len(seeds) * steps * seconds / 3600 for _, seeds, steps, seconds in rows]
    lines = [
        (what, " ".join(map(str, seeds)), steps, f"{seconds:.2f}", f"{taken:.2f}")
        for (what, seeds, steps, seconds), taken in zip(rows, hours, strict=True)
    ]
    runs = sum(len(seeds) for _, seeds, _, _ in rows)
    text = table(("runs", "seeds", "steps", "s per step", "hours"), lines)
    return f"{text}\n\n{runs} runs, {sum(hours):.1f} hours of one core; {done} of them are recorded"


def seconds_per_step(runs: Sequence[dict[str, Any]], otherwise: float) -> float:
    """The median of what recorded runs took."""
    return statistics.median([run["seconds_per_step"] for run in runs] or [otherwise])
