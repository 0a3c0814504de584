"""Charts as inline SVG: lines over an axis, and stacked bars. Colours and fonts come from the page's style sheet."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

#: CSS classes c0, c1, ... colour the series; the page defines as many.
NUM_COLOURS = 8
MAX_POINTS = 300


@dataclass(frozen=True)
class Series:
    """One curve. `style`: "line", "dots" (marks joined by a thin line) or "faint"."""

    name: str
    colour: int
    points: Sequence[Point]
    style: str = "line"


@dataclass(frozen=True)
class Axes:
    """From data to pixels of a chart. With `log`, y0 and y1 are exponents of ten; with `log_x`, x0 and x1."""

    x0: float
    x1: float
    y0: float
    y1: float
    width: int = 460
    height: int = 250
    log: bool = False
    log_x: bool = False
    left: int = 62
    right: int = 14
    top: int = 12
    bottom: int = 40

    def x(self, value: float) -> float:
        value = math.log10(max(value, 1e-300)) if self.log_x else value
        return self.left + (value - self.x0) / ((self.x1 - self.x0) or 1.0) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        value = math.log10(max(value, 1e-300)) if self.log else value
        return (
            self.height
            - self.bottom
            - (value - self.y0) / ((self.y1 - self.y0) or 1.0) * (self.height - self.top - self.bottom)
        )


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    y_range: Point | None = None,
    unit: str = "",
    whole_x: bool = False,
    log_x: bool = False,
) -> str:
    """An SVG with all series over one pair of axes.

    Args:
        y_range: by default all values, with a margin, on a logarithmic axis if they differ by a factor of 100 or more.
            What lies outside is cut off.
        unit: of the values, for the tooltips.
        whole_x: x are whole numbers such as layers: one tick each, with a margin beside the outermost.
        log_x: x are positive, on a logarithmic axis.
    """
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    # What falls over orders of magnitude is read on a logarithmic axis.
    log = y_range is None and min(ys) > 0.0 and max(ys) > 100.0 * min(ys)
    low, high = padded(math.log10(min(ys)), math.log10(max(ys))) if log else y_range or padded(min(ys), max(ys))
    margin = 0.4 if whole_x else 0.0
    ends = min(xs) - margin, max(xs) + margin
    first, last = (math.log10(ends[0]), math.log10(ends[1])) if log_x else ends
    axes = Axes(first, last, low, high, log=log, log_x=log_x)
    clip = f"clip{zlib.crc32(repr((x_label, y_label, ys[:50])).encode())}"
    x_ticks = sorted({round(x) for x in xs}) if whole_x else log_ticks(*ends) if log_x else ticks(*ends)
    inner = axes.width - axes.left - axes.right, axes.height - axes.top - axes.bottom
    parts = [
        f'<svg viewBox="0 0 {axes.width} {axes.height}" role="img" '
        f'aria-label="{escape(y_label)} over {escape(x_label)}">',
        f'<clipPath id="{clip}"><rect x="{axes.left - 4}" y="{axes.top - 4}" width="{inner[0] + 8}" '
        f'height="{inner[1] + 8}"/></clipPath>',
        *_frame(axes, x_ticks if len(x_ticks) <= 16 else x_ticks[:: math.ceil(len(x_ticks) / 16)], x_label, y_label),
        f'<g clip-path="url(#{clip})">',
        *(_curve(s, axes, unit) for s in series),
        "</g></svg>",
    ]
    return "".join(parts)


def stacked_bars(bars: Sequence[tuple[str, Mapping[str, float]]], parts: Sequence[str], unit: str) -> str:
    """One horizontal bar per (label, part -> value); `parts` in order take the classes p0, p1, ..."""
    width, left, right, row = 960, 170, 90, 40
    height = len(bars) * row + 34
    longest = max(sum(values.values()) for _, values in bars) or 1.0
    scale = (width - left - right) / longest
    out = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="parts of a step">']
    for tick in ticks(0.0, longest):
        x = left + tick * scale
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - 28}"/>')
        out.append(f'<text class="tick" x="{x:.1f}" y="{height - 12}" text-anchor="middle">{short(tick)}</text>')
    for number, (label, values) in enumerate(bars):
        y, x, total = 6 + number * row, float(left), sum(values.values())
        out.append(
            f'<text class="name" x="{left - 10}" y="{y + 19}" text-anchor="end">{escape(_cut(label, 22))}</text>'
        )
        for index, part in enumerate(parts):
            value = values.get(part, 0.0)
            if value <= 0.0:
                continue
            share = value / total
            hint = f"{label}: {part} {short(value)} {unit}, {share:.1%} of the step"
            shape = f'x="{x:.1f}" y="{y}" width="{max(value * scale - 1, 0.6):.1f}" height="{row - 12}"'
            out.append(f'<rect class="p{index}" {shape} rx="2"><title>{escape(hint)}</title></rect>')
            if value * scale > 44:
                out.append(f'<text class="inside" x="{x + value * scale / 2:.1f}" y="{y + 19}">{share:.0%}</text>')
            x += value * scale
        out.append(f'<text class="total" x="{x + 8:.1f}" y="{y + 19}">{short(total)} {unit}</text>')
    out.append(f'<text class="tick" x="{width - right + 20}" y="{height - 12}">{unit}</text></svg>')
    return "".join(out)


def _frame(axes: Axes, x_ticks: Sequence[float], x_label: str, y_label: str) -> list[str]:
    bottom, right = axes.height - axes.bottom, axes.width - axes.right
    parts = []
    y_ticks = [10.0**n for n in ticks(axes.y0, axes.y1) if n == round(n)] if axes.log else ticks(axes.y0, axes.y1)
    for tick, words in zip(y_ticks, tick_words(y_ticks), strict=True):
        y = axes.y(tick)
        parts.append(f'<line class="grid" x1="{axes.left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{axes.left - 8}" y="{y + 3.5:.1f}" text-anchor="end">{words}</text>')
    for tick in x_ticks:
        x = axes.x(tick)
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{short(tick)}</text>')
    parts.append(f'<line class="axis" x1="{axes.left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    middle = (axes.left + right) / 2
    parts.append(
        f'<text class="label" x="{middle:.0f}" y="{axes.height - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    middle = (axes.top + bottom) / 2
    turned = f'text-anchor="middle" transform="rotate(-90 12 {middle:.0f})"'
    parts.append(f'<text class="label" x="12" y="{middle:.0f}" {turned}>{escape(y_label)}</text>')
    return parts


def _curve(series: Series, axes: Axes, unit: str) -> str:
    colour = f"c{series.colour % NUM_COLOURS}"
    points = thinned(series.points) if series.style != "dots" else series.points
    places = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in points)
    style = {"line": "line", "faint": "line faint", "dots": "line thin"}[series.style]
    out = [f'<polyline class="{style} {colour}" points="{places}"><title>{escape(series.name)}</title></polyline>']
    if series.style == "dots" or len(points) == 1:
        for x, y in points:
            hint = f"{series.name}: {short(y)}{unit and ' ' + unit} at {short(x)}"
            place = f'cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}"'
            out.append(f'<circle class="dot {colour}" {place} r="3.2"><title>{escape(hint)}</title></circle>')
    return "".join(out)


def thinned(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """At most `most` points: means over equal stretches."""
    if len(points) <= most:
        return list(points)
    groups = [points[i * len(points) // most : (i + 1) * len(points) // most] for i in range(most)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def padded(low: float, high: float) -> Point:
    """A range with a margin, so wide that a change of a few per cent looks like one. From zero where values come near it."""
    if 0.0 <= low <= 0.5 * high:
        return 0.0, 1.06 * high or 1.0
    margin = max(0.06 * (high - low), 0.1 * abs(high)) or 1.0
    return low - margin, high + margin


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within [low, high]."""
    if not high > low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / about))
    step = next(step * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (step * factor) <= about)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{n * step:.12g}") for n in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, most: int = 9) -> list[float]:
    """1, 2, 5, 10, ... within [low, high]; powers of ten alone where that makes too many."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [factor * 10.0**n for n in exponents for factor in (1, 2, 5) if low <= factor * 10.0**n <= high]
    return every if len(every) <= most else [10.0**n for n in exponents if low <= 10.0**n <= high]


def tick_words(values: Sequence[float]) -> list[str]:
    """Labels of ticks, with as many figures as it takes to tell them apart."""
    words = [short(value) for value in values]
    figures = 4
    while len(set(words)) < len(words) and figures < 10:
        words = [f"{value:.{figures}g}" for value in values]
        figures += 1
    return words


def short(value: float) -> str:
    """``1.5k``, ``2.35``, ``0.042``: three figures at most."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")  # 999,700 is 1M
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(rounded) >= limit:
            return f"{rounded / (1e3 if letter == 'k' else limit):.3g}{letter}"
    if abs(value) >= 100:
        return f"{value:.0f}"
    if abs(value) < 1e-3:
        figures, exponent = f"{value:.2e}".split("e")
        return f"{float(figures):g}e{int(exponent)}"
    return f"{value:.3g}"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
