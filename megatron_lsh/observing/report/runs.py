"""What a run left behind, as curves: metrics.jsonl and config.json."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_lsh.config.serialize import positions_per_sample
from megatron_lsh.errors import DataError
from megatron_lsh.observing.report.merges import FILE, LayerMerges, load
from megatron_lsh.observing.writers import MOST, is_number, read_jsonl

#: What a step consists of, as keys of a metrics record -> words; the rest is what these leave of the iteration's time.
STEP_PARTS = {
    "alltoall_time_ms": "all-to-all",
    "experts_time_ms": "experts",
    "lsh_hash_time_ms": "LSH: hash",
    "lsh_cluster_time_ms": "LSH: cluster",
    "lsh_refine_time_ms": "LSH: refine",
    "lsh_compress_time_ms": "LSH: compress",
    "lsh_restore_time_ms": "LSH: restore",
    "wire_time_ms": "wire encoding",
}
REST = "attention, optimizer, rest"

Point = tuple[float, float]


@dataclass
class RunData:
    """One run. `training` and `evaluations` are its metrics records in order; `config` its settings by section; `merges`
    what see_merges found of its model."""

    name: str
    training: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)
    merges: list[LayerMerges] = field(default_factory=list)

    @property
    def tokens_per_sample(self) -> int | None:
        return positions_per_sample(self.config)

    def positions(self, axis: str) -> dict[int, float]:
        """Iteration -> place on an axis: "steps", "tokens", "seconds" or "bytes" (totals since the run began)."""
        places, total, before = {0: 0.0}, 0.0, 0
        for record in self.training:
            iteration = record["iteration"]
            if axis == "steps":
                total = iteration
            elif axis == "tokens":
                total = (record.get("consumed_samples") or 0) * (self.tokens_per_sample or 0)
            else:
                milliseconds, size = record.get("iteration_time_ms") or 0.0, record.get("alltoall_bytes")
                per_step = milliseconds / 1e3 if axis == "seconds" else size
                total += (per_step or 0.0) * (iteration - before)
            places[iteration], before = total, iteration
        return places

    def curve(self, key: str, axis: str = "steps") -> list[Point]:
        """A quantity of the training records, or of the evaluations, along an axis."""
        places = self.positions(axis)
        return [(_place(places, r["iteration"]), r[key]) for r in self._records(key) if r.get(key) is not None]

    def _records(self, key: str) -> list[dict[str, Any]]:
        return self.evaluations if key.startswith(("validation", "test")) else self.training

    def steady(self, key: str) -> float | None:
        """Median over the last three quarters of the log intervals; None if it was never measured."""
        values = [r[key] for r in self.training[len(self.training) // 4 :] if r.get(key) is not None]
        return statistics.median(values) if values else None

    def last(self, key: str) -> float | None:
        """The last value of a training or evaluation quantity; None if it was never measured, or was not finite then."""
        return next((record[key] for record in reversed(self._records(key)) if key in record), None)

    def breakdown(self) -> dict[str, float]:
        """Milliseconds of a step by part, without the parts that take none."""
        parts = {words: self.steady(key) or 0.0 for key, words in STEP_PARTS.items()}
        rest = (self.steady("iteration_time_ms") or 0.0) - sum(parts.values())
        return {words: ms for words, ms in (parts | {REST: max(rest, 0.0)}).items() if ms > 0.0}

    def per_layer(self, key: str) -> list[Point]:
        """(layer, median of the last three quarters) of a quantity, where --moe-per-layer-logging wrote it."""
        records = [r for r in self.training[len(self.training) // 4 :] if r.get(f"{key}_per_layer")]
        if not records:
            return []
        points = []
        for index, layer in enumerate(records[-1].get("moe_layers") or []):
            columns = (r[f"{key}_per_layer"] for r in records)
            values = [column[index] for column in columns if index < len(column) and column[index] is not None]
            if values:
                points.append((float(layer), statistics.median(values)))
        return points


def _place(places: dict[int, float], iteration: int) -> float:
    """Where an iteration lies; between two log lines in proportion, beyond the last one at its place."""
    if iteration in places:
        return places[iteration]
    after = next((i for i in places if i > iteration), None)
    if after is None:
        return list(places.values())[-1]
    before = max(i for i in places if i < iteration)
    return places[before] + (places[after] - places[before]) * (iteration - before) / (after - before)


def read_run(place: Path, name: str | None = None) -> RunData:
    """Read a run's folder, or one metrics file.

    Raises:
        DataError: there are no metrics.
    """
    metrics = place if place.is_file() else _first_of(place, "metrics.jsonl", "*.jsonl")
    if metrics is None:
        raise DataError(f"{place} holds no metrics: start runs with --metrics-jsonl {place / 'metrics.jsonl'}")
    records = [record for found in read_jsonl(metrics) if (record := _sound(found)) is not None]
    training = [record for record in records if "lm_loss" in record]
    if not training:
        raise DataError(f"{metrics} holds no training records: the run has not reached its first --log-interval")
    evaluations = [record for record in records if "validation_loss" in record]
    settings = _beside(metrics, "config.json")
    config = _settings(settings) if settings else {}
    seen = _beside(metrics, FILE)
    return RunData(name or _name(place), training, evaluations, config, load(seen) if seen else [])


def _sound(record: dict[str, Any]) -> dict[str, Any] | None:
    """The record without what no run writes; None for one that does not say of which iteration it is."""
    iteration = record.get("iteration")
    if type(iteration) is not int or not 0 <= iteration < 1 << 62:
        return None
    fits = {key: _is_list if key.endswith(("_per_layer", "moe_layers")) else _is_figure for key in record}
    return {key: value for key, value in record.items() if fits[key](value)}


def _is_figure(value: Any) -> bool:
    return value is None or (is_number(value) and abs(value) < MOST)  # false for NaN


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_figure, value))


def _settings(path: Path) -> dict[str, Any]:
    """Sections of a config.json. Raises DataError."""
    try:
        config = json.loads(path.read_text(encoding="utf-8")).get("config", {})
        return {section: fields for section, fields in config.items() if isinstance(fields, dict)}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path} must be the config.json of a run: {error}; remove it, and the report goes without"
        ) from None


def _beside(metrics: Path, name: str) -> Path | None:
    """The file of this name that belongs to the same run: in its folder, or in one below that has no metrics of its own."""
    places = (metrics.parent, *(path for path in sorted(metrics.parent.glob("*/")) if not any(path.glob("*.jsonl"))))
    return next((path for place in places if (path := place / name).is_file()), None)


def _first_of(folder: Path, *patterns: str) -> Path | None:
    """The first file that matches, in the folder or one below."""
    for pattern in patterns:
        for found in (*sorted(folder.glob(pattern)), *sorted(folder.glob(f"*/{pattern}"))):
            return found
    return None


def _name(place: Path) -> str:
    place = place.resolve()
    return place.name if place.is_dir() or place.stem != "metrics" else place.parent.name


def read_runs(places: Sequence[Path], names: Sequence[str] | None = None) -> list[RunData]:
    """Read several runs; equal names are told apart by the folders above them."""
    wanted: Sequence[str | None] = names if names is not None else [None] * len(places)
    runs = [read_run(place, name) for place, name in zip(places, wanted, strict=True)]
    taken = [run.name for run in runs]
    for run, place in zip(runs, places, strict=True):
        if taken.count(run.name) > 1:
            run.name = f"{place.resolve().parent.name}/{run.name}"
    return runs


def differing_settings(runs: Sequence[RunData]) -> dict[str, list[Any]]:
    """section.field -> value per run, for the settings in which the runs differ. Places of files are left out."""
    ignored = ("checkpoint.", "logging.", "data.data_cache_path")
    flat = [
        {
            f"{section}.{key}": value
            for section, fields in run.config.items()
            if isinstance(fields, dict)
            for key, value in fields.items()
        }
        for run in runs
    ]
    names = dict.fromkeys(name for settings in flat for name in settings if not name.startswith(ignored))
    rows = {name: [settings.get(name) for settings in flat] for name in names}
    return {name: values for name, values in rows.items() if any(value != values[0] for value in values)}


def pick(runs: Sequence[RunData], curve: Callable[[RunData], list[Point]]) -> list[tuple[int, list[Point]]]:
    """(number of the run, curve) of the runs that have this curve."""
    return [(number, points) for number, run in enumerate(runs) if (points := curve(run))]
