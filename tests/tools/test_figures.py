"""The figures of the documents explain themselves: what a panel shows is what its legend names."""

from __future__ import annotations

import importlib
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from benchmarks import common, figures
from benchmarks.common import ROOT


@pytest.mark.parametrize("script", figures.SCRIPTS)
def test_every_panel_names_the_series_that_it_shows(script: str) -> None:
    figure = importlib.import_module(f"benchmarks.{script}").drawn()
    assert figure.axes and figures.problems(figure) == []


def test_no_script_saves_a_figure_unchecked() -> None:
    def scripts(word: str) -> set[str]:
        return {path.stem for path in (ROOT / "benchmarks").glob("*.py") if word in path.read_text()}

    assert scripts(".savefig(") == {"figures"}
    assert scripts("figures.save(") == set(figures.SCRIPTS)
    drawn_by_hand = {"merges"}  # a part of a page that tools/see_merges.py writes
    kept = {path.stem for path in (ROOT / "docs" / "figures").glob("*.png")}
    assert kept - drawn_by_hand <= set(figures.SCRIPTS)


def two_panels(legends: tuple[bool, bool]) -> Any:
    figure, axes = figures.panels(2, 4, 2)
    for axis, names, legend in zip(axes, (("a", "b"), ("a",)), legends, strict=True):
        for place, name in enumerate(names):
            axis.errorbar([1, 2], [1, 2], [0.1, 0.2], color=f"C{place}", label=name)
        if legend:
            axis.legend()
    return figure


def test_a_legend_of_another_panel_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert figures.problems(two_panels((True, True))) == []
    unnamed = figures.problems(two_panels((False, True)))
    assert ["no legend names the series 'a'" in unnamed[0], "'b'" in unnamed[1], len(unnamed)] == [True, True, 2]
    figure = two_panels((True, False))
    figure.legend(*figure.axes[0].get_legend_handles_labels())
    assert figures.problems(figure) == ["panel 2 (): the legend names 'b', of which there is no series"]
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="unclear does not explain itself: panel 1"):
        figures.save(two_panels((False, True)), "unclear")
    assert figures.save(two_panels((True, True)), "clear").exists()


def test_series_that_look_alike_are_found_out() -> None:
    figure, (axis,) = figures.panels(1, 4, 2)
    axis.plot([1, 2], color="C0", label="a")
    axis.plot([2, 1], color="C0", label="b")
    axis.legend()
    axis.plot([2, 2], color="C1", marker="o", label="c")
    axis.errorbar([1], [1], [0.1], color="C1", marker="o", linestyle="--", label="d")  # of one point no line is seen
    axis.legend()
    assert figures.problems(figure) == ["panel 1 (): 'b' looks like 'a'", "panel 1 (): 'd' looks like 'c'"]


def test_intervals_are_those_of_student() -> None:
    """Against the distribution's density, integrated: within the interval lie 95% of it."""
    assert common.interval([0.3]) is None
    for seeds in (2, 3, 5, 10, 16):
        values = [0.1 * number**2 for number in range(seeds)]
        ends = common.interval(values)
        assert ends is not None
        error = statistics.stdev(values) / seeds**0.5
        quantile, degrees = (ends[1] - statistics.mean(values)) / error, seeds - 1
        assert ends[0] == pytest.approx(2 * statistics.mean(values) - ends[1])
        # With x = tan(u) the tails are no longer than the middle, and (1 + x²/n)^-(n+1)/2 dx is bounded.
        steps, edge = 20_000, math.atan(quantile)

        def mass(until: float, degrees: int = degrees, steps: int = steps) -> float:
            places = [(place + 0.5) * until / steps for place in range(steps)]
            return sum((1 + math.tan(u) ** 2 / degrees) ** (-(degrees + 1) / 2) / math.cos(u) ** 2 for u in places) * (
                until / steps
            )

        assert mass(edge) / mass(math.pi / 2) == pytest.approx(0.95, abs=2e-4)
    assert common.mean_and_interval([0.0, 0.1]) == "+0.050 (-0.585 to +0.685)"
