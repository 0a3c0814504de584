"""A metrics file that was damaged by whatever: a run goes on with every whole record of before; readers skip the rest."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from megatron_lsh.errors import DataError
from megatron_lsh.observing.plot import plot_losses
from megatron_lsh.observing.report.page import render
from megatron_lsh.observing.report.runs import read_run
from megatron_lsh.observing.writers import JsonlFile, read_jsonl
from tests.fuzzing import SEED, cases, damaged, mutated


def record(iteration: int) -> dict[str, Any]:
    figures = {
        "lm_loss": 4.0 / iteration,
        "consumed_samples": 8 * iteration,
        "iteration_time_ms": 3.5,
        "alltoall_bytes": 9,
    }
    layers = {"moe_layers": [1, 2], "lsh_residual_energy_per_layer": [0.5, 0.25], "lsh_compression_rate": 0.2}
    return {"iteration": iteration} | figures | layers | {"validation_loss": 5.0}


def case(rng: random.Random) -> bytes:
    """The content of a file: records of iterations 1 to 8, some of them odd or damaged, then perhaps the whole."""
    lines = [json.dumps(record(iteration)).encode() + b"\n" for iteration in range(1, 9)]
    for _ in range(rng.choice((0, 1, 3))):
        place = rng.randrange(len(lines))
        odd = json.dumps(mutated(record(place + 1), rng)).encode() + b"\n"
        lines[place] = odd if rng.random() < 0.5 else damaged(lines[place], rng)
    content = b"".join(lines)
    return content if rng.random() < 0.7 else damaged(content, rng)


def whole(content: bytes, until: int) -> list[dict[str, Any]]:
    """What a plain reader finds: objects, one a line, of iterations up to `until`, as far as they say which they are."""
    found = []
    for line in content.split(b"\n"):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            iteration = value.get("iteration", 0)
            number = isinstance(iteration, int | float) and not isinstance(iteration, bool)
            if not number or iteration <= until:
                found.append(value)
    return found


def test_fuzz_metrics_files(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for number in range(cases(300)):
        rng = random.Random(f"metrics {SEED} {number}")
        content = case(rng)
        path.write_bytes(content)
        until = rng.randrange(1, 9)
        file = JsonlFile(path, until)
        file.write(record(until + 1))
        file.close()
        expected = whole(content, until)
        found = read_jsonl(path)
        assert repr(found) == repr([*expected, record(until + 1)]), f"case {number}, FUZZ_SEED={SEED}"


def test_fuzz_the_report_of_a_run(tmp_path: Path) -> None:
    metrics, config = tmp_path / "metrics.jsonl", tmp_path / "config.json"
    for number in range(cases(60)):
        rng = random.Random(f"report {SEED} {number}")
        metrics.write_bytes(case(rng))
        text = json.dumps(mutated({"version": 1, "config": {"model": {"seq_length": 8}}}, rng)).encode()
        config.write_bytes(text if rng.random() < 0.5 else damaged(text, rng))
        try:
            page = render([read_run(tmp_path)], "a run")
            assert page.startswith("<!doctype html>") or page.startswith("<!DOCTYPE html>")
        except DataError as error:
            assert str(metrics) in str(error) or str(config) in str(error), f"case {number}, FUZZ_SEED={SEED}"


def test_fuzz_the_plot_of_a_run(tmp_path: Path) -> None:
    """At the end of a run, where a plot that cannot be drawn is told and no error: any exception, but no crash or hang."""
    metrics, drawn = tmp_path / "metrics.jsonl", 0
    for number in range(min(cases(2), 40)):  # a plot takes half a second
        metrics.write_bytes(case(random.Random(f"plot {SEED} {number}")))
        try:
            drawn += plot_losses(metrics).stat().st_size > 1000
        except ValueError as error:
            assert str(metrics) in str(error), f"case {number}, FUZZ_SEED={SEED}"
    assert drawn
