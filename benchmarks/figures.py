"""Figures of the documents: drawn without a screen, and saved only if every panel explains itself.

    python -m benchmarks.figures            # draw all of them again, from the results that are there

Each script of `SCRIPTS` has a function `drawn() -> figure`, made of its recorded results.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT

#: What has a figure of its name in docs/figures/.
SCRIPTS = ("quality", "rivals", "families", "readme_model", "timeline", "node_ways", "gradient_error")


def panels(columns: int, width: float, height: float, rows: int = 1, **options: Any) -> tuple[Any, list[Any]]:
    """A figure of so many inches, and its panels row by row. Options are those of ``subplots``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def legend_below(axis: Any, columns: int = 1) -> None:
    """Where it hides nothing."""
    if axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=columns, frameon=False)


def problems(figure: Any) -> list[str]:
    """What a reader could not make out: a series that no legend of its panel names, a name without a series, two series
    of one panel that look alike, a legend beside a single panel that names another's series.

    A series is what was drawn with a label. A legend of the whole figure stands for one in each panel if all panels have
    the same series.
    """
    axes = [axis for axis in figure.axes if axis.has_data()]
    everywhere = [_names(legend) for legend in figure.legends]
    found = []
    for number, axis in enumerate(axes, 1):
        where = f"panel {number} ({axis.get_title() or axis.get_xlabel()})"
        handles, labels = axis.get_legend_handles_labels()
        own = axis.get_legend()
        named = _names(own) if own is not None else [name for names in everywhere for name in names]
        found += [f"{where}: no legend names the series {label!r}" for label in labels if label not in named]
        found += [
            f"{where}: the legend names {name!r}, of which there is no series" for name in named if name not in labels
        ]
        looks: dict[Any, str] = {}
        for handle, label in zip(handles, labels, strict=True):
            look = _look(handle)
            if looks.setdefault(look, label) != label:
                found.append(f"{where}: {label!r} looks like {looks[look]!r}")
    return found


def save(figure: Any, name: str) -> Path:
    """Write a picture to docs/figures/. Raises ValueError if a panel does not explain itself (:func:`problems`)."""
    figure.tight_layout()
    if found := problems(figure):
        raise ValueError(f"{name} does not explain itself: " + "; ".join(found))
    path = ROOT / "docs" / "figures" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _names(legend: Any) -> list[str]:
    return [text.get_text() for text in legend.get_texts()]


def _look(handle: Any) -> Any:
    """Colour and marker of a line or of the line among error bars; without a marker, its colour and style."""
    line = handle[0] if isinstance(handle, tuple) else handle
    color, style, marker = (
        str(getattr(line, f"get_{part}", lambda: None)()) for part in ("color", "linestyle", "marker")
    )
    return color, style if marker in ("None", "") else marker


def main() -> None:
    for name in SCRIPTS:
        print(f"wrote {save(importlib.import_module(f'benchmarks.{name}').drawn(), name).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
