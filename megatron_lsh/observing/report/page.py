"""The page: a table of runs, losses on four axes, what a step consists of, what compression did, settings that differ."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from html import escape

from megatron_lsh.observing.report.charts import Point, Series, line_chart, short, stacked_bars
from megatron_lsh.observing.report.labels import further_gauges, label_of
from megatron_lsh.observing.report.merges_page import section as merges_section
from megatron_lsh.observing.report.runs import REST, STEP_PARTS, RunData, differing_settings, pick
from megatron_lsh.observing.report.style import document

NONE = "\N{EN DASH}"
AXES = {"steps": "iterations", "tokens": "tokens", "seconds": "seconds of training", "bytes": "bytes sent, all ranks"}
OVER_TIME = (
    "lsh_compression_rate",
    "lsh_residual_energy",
    "lsh_restored_error",
    "alltoall_share",
    "expert_load_max_over_mean",
    "tokens_per_second",
    "images_per_second",
    "validation_top1",
    "validation_top5",
    "validation_accuracy",
)
BY_LAYER = (
    "lsh_compression_rate",
    "lsh_residual_energy",
    "lsh_restored_error",
    "alltoall_bytes",
    "alltoall_time_ms",
    "lsh_time_ms",
    "experts_time_ms",
    "load_max_over_mean",
)


def render(runs: Sequence[RunData], title: str, note: str = "") -> str:
    """The whole page as one HTML text that needs no other file. The others are compared with the first run."""
    further = further_gauges(runs)
    layers = [_by_layer(runs, key, label_of(key)) for key in (*BY_LAYER, *further)]
    over_time = [_over_time(runs, key, label_of(key)) for key in (*OVER_TIME, *further)]
    sections = [
        f"<h1>{escape(title)}</h1><p>{escape(note)}</p>",
        f'<div class="panel">{_overview(runs)}</div>',
        _section(
            "Loss",
            "Validation loss (dots; where there is none, only training) over training loss (faint), against four measures "
            "of cost. The beginning of the curves is cut off.",
            _key(runs) + _grid([_losses(runs, axis, label) for axis, label in AXES.items()]),
        ),
        _section(
            "Where a step's time goes",
            "Medians over the last three quarters of the log intervals, means over the ranks. The all-to-all includes "
            "waiting for slower ranks; experts, compress and restore include their backward passes.",
            _breakdown(runs),
        ),
        _section(
            "During training",
            "How much was sent, how alike the merged rows were (0: equal), and what that did to the experts' outputs on "
            "probed batches.",
            _key(runs) + _grid(over_time),
        ),
        _section("By layer", "Medians over the last three quarters of the log intervals.", _key(runs) + _grid(layers)),
        merges_section([(run.name, run.merges) for run in runs if run.merges]),
        _section("Settings that differ", "All others are equal, where they were found.", _settings(runs)),
    ]
    body = "".join(section for section in sections if section)
    return document(title, body + _footer())


def _section(title: str, text: str, content: str) -> str:
    """Nothing if there is nothing to show."""
    if "<svg" not in content and "<table" not in content:
        return ""
    return f"<section><h2>{escape(title)}</h2><p>{escape(text)}</p>{content}</section>"


def _grid(charts: Sequence[str]) -> str:
    return '<div class="grid2">' + "".join(f'<div class="panel">{chart}</div>' for chart in charts if chart) + "</div>"


def _key(runs: Sequence[RunData]) -> str:
    names = "".join(f'<span><span class="chip c{i % 8}"></span>{escape(run.name)}</span>' for i, run in enumerate(runs))
    return f'<div class="key">{names}</div>'


def _overview(runs: Sequence[RunData]) -> str:
    columns: list[tuple[str, Callable[[RunData], float | None], Callable[[float], str], int]] = [
        # heading, value, how to print it, which way is better (0: neither)
        ("iterations", lambda run: run.last("iteration"), lambda v: f"{v:.0f}", 0),
        ("training loss", lambda run: _tail_mean(run.curve("lm_loss")), lambda v: f"{v:.4f}", -1),
        ("validation loss", lambda run: run.last("validation_loss"), lambda v: f"{v:.4f}", -1),
        ("… evaluated exactly", lambda run: run.last("validation_loss_exact"), lambda v: f"{v:.4f}", -1),
        ("top-1", lambda run: run.last("validation_top1"), lambda v: f"{v:.1%}", 1),
        ("top-1, exactly", lambda run: run.last("validation_top1_exact"), lambda v: f"{v:.1%}", 1),
        ("top-5", lambda run: run.last("validation_top5"), lambda v: f"{v:.1%}", 1),
        ("accuracy", lambda run: run.last("validation_accuracy"), lambda v: f"{v:.1%}", 1),
        ("ms / step", lambda run: run.steady("iteration_time_ms"), short, -1),
        ("all-to-all, share", lambda run: run.steady("alltoall_share"), lambda v: f"{v:.1%}", 0),
        ("bytes / step", lambda run: run.steady("alltoall_bytes"), short, -1),
        ("rows sent", lambda run: run.steady("lsh_compression_rate"), lambda v: f"{v:.1%}", 0),
        ("residual energy", lambda run: run.steady("lsh_residual_energy"), lambda v: f"{v:.3f}", 0),
    ]
    values = {heading: [get(run) for run in runs] for heading, get, _, _ in columns}
    shown = [column for column in columns if any(value is not None for value in values[column[0]])]
    head = "<th>run</th>" + "".join(f"<th>{escape(heading)}</th>" for heading, *_ in shown)
    rows = []
    for number, run in enumerate(runs):
        cells = [f'<td><span class="chip c{number % 8}"></span>{escape(run.name)}</td>']
        for heading, _, words, better in shown:
            cells.append(_cell(values[heading], number, words, better))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _cell(column: Sequence[float | None], number: int, words: Callable[[float], str], better: int) -> str:
    value, first = column[number], column[0]
    if value is None:
        return f'<td class="change">{NONE}</td>'
    known = [other for other in column if other is not None]
    best = better != 0 and min(known) != max(known) and value == min(known, key=lambda other: -better * other)
    change = ""
    if better and number and first:
        change = f"{value / first:.2f} x"
        if words(1.0) == "1.0000":  # a loss
            change = f"{value - first:+.4f}"
        elif words(1.0) == "100.0%":
            change = f"{100.0 * (value - first):+.1f}"
        change = f' <span class="change">{change}</span>'
    return f"<td{' class=best' if best else ''}>{words(value)}{change}</td>"


def _tail_mean(curve: list[Point]) -> float | None:
    """Single batches are noisy: the mean of the last tenth."""
    values = [y for _, y in curve[-max(len(curve) // 10, 1) :]]
    return statistics.mean(values) if values else None


def _losses(runs: Sequence[RunData], axis: str, label: str) -> str:
    series, shown = [], []
    for number, run in enumerate(runs):
        training, validation = run.curve("lm_loss", axis), run.curve("validation_loss", axis)
        if axis in ("bytes", "tokens") and not any(place for place, _ in (*training, *validation)):
            continue  # every rank holds all experts; pictures have no tokens
        if training:  # not of a run that has skipped everything so far
            series.append(Series(f"{run.name}, training", number, training, "faint" if validation else "line"))
        if validation:
            series.append(Series(f"{run.name}, validation", number, validation, "dots"))
        skip = len(training) // 12  # the first steep fall would flatten all that follows
        shown += [y for _, y in [*training[skip:], *validation]]
    if not series:
        return ""
    return line_chart(series, x_label=label, y_label="loss, nats", y_range=_close_up(shown))


def _close_up(values: Sequence[float]) -> Point:
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.1
    return low - margin, high + margin


def _breakdown(runs: Sequence[RunData]) -> str:
    bars = [(run.name, values) for run in runs if (values := run.breakdown())]
    if not bars:
        return ""
    parts = [*STEP_PARTS.values(), REST]
    present = [part for part in parts if any(part in values for _, values in bars)]
    chips = "".join(f'<span><span class="chip k{parts.index(part)}"></span>{escape(part)}</span>' for part in present)
    return f'<div class="panel"><div class="key">{chips}</div>{stacked_bars(bars, parts, "ms")}</div>'


def _over_time(runs: Sequence[RunData], key: str, label: str) -> str:
    curves = pick(runs, lambda run: run.curve(key))
    if not curves or all(y == 0.0 for _, points in curves for _, y in points):
        return ""
    series = [
        Series(runs[number].name, number, points, "dots" if len(points) < 12 else "line") for number, points in curves
    ]
    return line_chart(series, x_label="iterations", y_label=label)


def _by_layer(runs: Sequence[RunData], key: str, label: str) -> str:
    curves = pick(runs, lambda run: run.per_layer(key))
    if not curves or all(y == 0.0 for _, points in curves for _, y in points):
        return ""
    series = [Series(runs[number].name, number, points, "dots") for number, points in curves]
    return line_chart(series, x_label="layer", y_label=label, whole_x=True)


def _settings(runs: Sequence[RunData]) -> str:
    rows = differing_settings(runs)
    if not rows:
        return ""
    head = '<th class="text">setting</th>' + "".join(f'<th class="text">{escape(run.name)}</th>' for run in runs)
    lines = []
    for name, values in rows.items():
        cells = "".join(f'<td class="text">{NONE if value is None else escape(str(value))}</td>' for value in values)
        lines.append(f'<tr><td class="text">{escape(name)}</td>{cells}</tr>')
    return f'<div class="panel"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _footer() -> str:
    terms = {
        "rows sent": "centroids that travel per row, without LSH all of them",
        "residual energy": "Σ|x - c|² / Σ|x|²: what the centroids c miss of the rows x",
        "error of restored outputs": "Σ|y - y'|² / Σ|y'|² against the exact outputs y' on probed batches "
        "(--lsh-probe-interval)",
        "bytes": "payload of the all-to-alls to other ranks, both ways, forward and backward",
        "seconds of training": "without evaluations and checkpoints",
    }
    items = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in terms.items())
    return f"<footer><dl>{items}</dl></footer>"
