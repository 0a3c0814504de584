"""Draws docs/figures/node_ways.png: both ways of a row over two nodes, as megatron_lsh/moe/nodes.py has them.

python -m benchmarks.node_ways
"""

from __future__ import annotations

from typing import Any

from benchmarks import figures
from benchmarks.common import ROOT

BLUE, ORANGE, GREY = "#1f5fa8", "#c8621b", "#666666"
PLACES = {(n, g): (0.5 + 6.2 * n, 2.9 - 2.0 * g) for n in range(2) for g in range(2)}
WIDTH, HEIGHT = 2.3, 1.0


def _ranks(axis: Any, title: str, inside: dict[tuple[int, int], str]) -> None:
    from matplotlib.patches import Rectangle

    for node, name in enumerate("nm"):
        corner = (0.2 + 6.2 * node, 0.5)
        axis.add_patch(Rectangle(corner, WIDTH + 0.6, 4.0, facecolor="#f3f3ef", edgecolor=GREY, linewidth=0.8))
        axis.text(corner[0] + 0.1, 4.58, f"node {name}", fontsize=9, color=GREY)
    for (node, local), (x, y) in PLACES.items():
        axis.add_patch(Rectangle((x, y), WIDTH, HEIGHT, facecolor="white", edgecolor="black", linewidth=0.9))
        label = f"rank ({'nm'[node]},{local})\n{inside[node, local]}"
        axis.text(x + WIDTH / 2, y + HEIGHT / 2, label, ha="center", va="center", fontsize=7.5)
    axis.set(xlim=(0, 9.6), ylim=(0.2, 5.3), aspect="equal")
    axis.set_title(title, fontsize=10, loc="left")
    axis.axis("off")


def _arrow(axis: Any, start: tuple[float, float], end: tuple[float, float], color: str, *, heavy: float) -> None:
    axis.annotate(
        "", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": heavy, "shrinkA": 0, "shrinkB": 0}
    )


def _ways(axis: Any, *, gathers_first: bool) -> None:
    """The hop inside a node comes before the network, or after it."""
    node = 0 if gathers_first else 1
    (x0, y0), (x1, y1) = PLACES[node, 0], PLACES[node, 1]
    for shift, (low, high) in ((0.75, (y1 + HEIGHT, y0)), (1.55, (y0, y1 + HEIGHT))):
        _arrow(axis, (x0 + shift, low), (x0 + shift, high), BLUE, heavy=1.6)
    for local in range(2):
        x, y = PLACES[0, local]
        _arrow(axis, (x + WIDTH, y + 0.5), (PLACES[1, local][0], y + 0.5), ORANGE, heavy=1.6)
    axis.text(x1 + WIDTH / 2, (y0 + y1 + HEIGHT) / 2, "all rows", ha="center", va="center", fontsize=7.5, color=BLUE)


def drawn() -> Any:
    """The figure: it shows the ways of rows, and no measurement."""
    figure, axes = figures.panels(2, 12, 3.9)
    sends = "all rows of node n for\n(m,{}): clusters them"
    _ranks(
        axes[0],
        "LSH at node scope: inside the node, then the network",
        {(0, g): sends.format(g) for g in range(2)} | {(1, g): f"experts {2 * g} {2 * g + 1}" for g in range(2)},
    )
    _ways(axes[0], gathers_first=True)
    axes[0].text(4.85, 3.52, "one row per cluster", ha="center", fontsize=8, color=ORANGE)
    axes[0].text(
        4.85, 3.12, "outputs come back,\nevery row is restored", ha="center", va="top", fontsize=7.5, color=GREY
    )
    _ranks(
        axes[1],
        "De-duplicated exact: the network, then inside the node",
        {(0, g): "its own tokens" for g in range(2)}
        | {(1, g): f"experts {2 * g} {2 * g + 1};\nshares tokens out" for g in range(2)},
    )
    _ways(axes[1], gathers_first=False)
    axes[1].text(4.85, 3.52, "one row per (token, node)", ha="center", fontsize=8, color=ORANGE)
    axes[1].text(
        4.85, 3.12, "one weighted sum per\n(token, node) back", ha="center", va="top", fontsize=7.5, color=GREY
    )
    return figure


def main() -> None:
    print(f"wrote {figures.save(drawn(), 'node_ways').relative_to(ROOT)}")


if __name__ == "__main__":
    main()
