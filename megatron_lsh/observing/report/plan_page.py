"""The planner's page: the best candidates as a table and as bars, and how step time follows bandwidth and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from megatron_lsh.observing.report.charts import NUM_COLOURS, Point, Series, line_chart, stacked_bars
from megatron_lsh.observing.report.style import document

PLAN_STYLE = """
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 12.5px/1.6 ui-monospace, "DejaVu Sans Mono", monospace;
  margin: 0; }
.model { display: inline-block; border: 1px solid var(--c1); color: var(--c1); border-radius: 5px; padding: 0 7px;
  font-size: 12px; font-weight: 650; }
td.text { white-space: normal; min-width: 15em; }
"""


@dataclass(frozen=True)
class Curves:
    """A chart: one curve per name, over a logarithmic axis."""

    title: str
    text: str
    x_label: str
    y_label: str
    curves: Mapping[str, Sequence[Point]]


@dataclass(frozen=True)
class PlanPage:
    """What the page shows, in words and numbers.

    Attributes:
        notes: paragraphs under the title. The first one says that this is a model.
        header, rows: of the table of candidates; the last two columns are words.
        bars: by candidate, milliseconds by part.
        changes: lines on where the choice changes.
        command: what starts the first candidate.
    """

    title: str
    notes: Sequence[str]
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    bars: Sequence[tuple[str, Mapping[str, float]]]
    parts: Sequence[str]
    charts: Sequence[Curves]
    changes: Sequence[str]
    command: str


def render(page: PlanPage) -> str:
    """The whole page as one HTML text that needs no other file, script or network."""
    notes = "".join(f"<p>{escape(note)}</p>" for note in page.notes)
    body = f'<h1>{escape(page.title)} <span class="model">model, not measured</span></h1>{notes}'
    body += _section(
        "The fastest", "Time per step within memory. Bytes and FLOPs are those that training counts.", _table(page)
    )
    body += _section("Where their time goes", "", _bars(page))
    body += (
        '<div class="grid2">'
        + "".join(f"<div>{_section(chart.title, chart.text, _chart(chart))}</div>" for chart in page.charts)
        + "</div>"
    )
    if page.changes:
        body += _section(
            "Where the choice changes", "", f'<div class="panel"><pre>{escape(chr(10).join(page.changes))}</pre></div>'
        )
    body += _section("Command of the first one", "", f'<div class="panel"><pre>{escape(page.command)}</pre></div>')
    return document(page.title, body, PLAN_STYLE)


def _section(title: str, text: str, content: str) -> str:
    paragraph = f"<p>{escape(text)}</p>" if text else ""
    return f"<section><h2>{escape(title)}</h2>{paragraph}{content}</section>"


def _table(page: PlanPage) -> str:
    words = len(page.header) - 2
    head = "".join(
        f"<th{' class=text' if n >= words else ''}>{escape(name)}</th>" for n, name in enumerate(page.header)
    )
    lines = []
    for row in page.rows:
        cells = "".join(f"<td{' class=text' if n >= words else ''}>{escape(cell)}</td>" for n, cell in enumerate(row))
        lines.append(f"<tr>{cells}</tr>")
    return f'<div class="panel"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _bars(page: PlanPage) -> str:
    present = [part for part in page.parts if any(values.get(part, 0.0) > 0.0 for _, values in page.bars)]
    chips = "".join(
        f'<span><span class="chip k{page.parts.index(part)}"></span>{escape(part)}</span>' for part in present
    )
    return f'<div class="panel"><div class="key">{chips}</div>{stacked_bars(page.bars, page.parts, "ms")}</div>'


def _chart(chart: Curves) -> str:
    key = "".join(
        f'<span><span class="chip c{number % NUM_COLOURS}"></span>{escape(name)}</span>'
        for number, name in enumerate(chart.curves)
    )
    series = [Series(name, number, points, "dots" if len(points) < 20 else "line")
              for number, (name, points) in enumerate(chart.curves.items())]  # fmt: skip
    drawn = line_chart(series, x_label=chart.x_label, y_label=chart.y_label, unit="ms", log_x=True)
    return f'<div class="panel"><div class="key">{key}</div>{drawn}</div>'
