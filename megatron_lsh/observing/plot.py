"""The loss curve of a run as a PNG, drawn from its metrics file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_lsh.observing.writers import MOST, is_number, iter_jsonl


def plot_losses(metrics: str | Path, png: str | Path | None = None, title: str | None = None) -> Path:
    """Draw training and validation loss over iterations and, if there were any, what LSH sent and lost.

    Args:
        metrics: a file written by --metrics-jsonl.
        png: where to write (default: beside it, with the ending .png).

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the file has no losses.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = _curves(metrics, ("lm_loss", "validation_loss", "lsh_compression_rate", "lsh_residual_energy"))
    training, validation, rate, energy = curves
    if not training[0]:
        raise ValueError(f"{metrics} holds no lm_loss: nothing to plot")
    figure = Figure(figsize=(8, 6 if rate[0] else 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        2 if rate[0] else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 1][: 2 if rate[0] else 1]
    )
    losses = axes[0, 0]
    losses.plot(*training, label="training", linewidth=1.0)
    if validation[0]:
        losses.plot(*validation, label="validation", marker="o", markersize=3.0)
    losses.set_ylabel("lm loss")
    losses.set_title(title or Path(metrics).stem)
    losses.legend()
    losses.grid(alpha=0.3)
    if rate[0]:
        lsh = axes[1, 0]
        lsh.plot(*rate, label="share of rows sent", linewidth=1.0)
        lsh.plot(*energy, label="residual energy", linewidth=1.0)
        lsh.set_ylim(bottom=0.0)
        lsh.legend()
        lsh.grid(alpha=0.3)
    axes[-1, 0].set_xlabel("iteration")
    path = Path(png) if png is not None else Path(metrics).with_suffix(".png")
    figure.savefig(path, dpi=120)
    return path


def _curves(metrics: str | Path, keys: Sequence[str]) -> list[tuple[list[int], list[float]]]:
    """(iterations, values) of each of `keys`. Reads record by record: those of many layers would fill the memory."""
    curves: list[tuple[list[int], list[float]]] = [([], []) for _ in keys]
    for record in iter_jsonl(metrics):
        for key, (iterations, values) in zip(keys, curves, strict=True):
            if all(is_number(record.get(name)) and abs(record[name]) < MOST for name in ("iteration", key)):
                iterations.append(record["iteration"])
                values.append(record[key])
    return curves
