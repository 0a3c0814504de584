"""Gauges: the figures that a MoE layer reports once per log interval.

Whoever measures a figure declares it here once, next to the code that measures it: its name, its unit, how the sums of all
ranks become one number, and what it means. The JSON lines, TensorBoard's tags, the report page and the table of
docs/instruments.md follow from the declaration. A dispatcher of another package declares its own in the same way.

While a layer runs it adds to named *sums* (``LayerPass.add``); a gauge says which sums it is made of, and how:

    summed("a")           sum over ranks and micro-batches, per iteration
    averaged("a", "b")    the same for a + b, divided by the ranks: what one rank spent
    busiest("a")          of the rank with the largest sum, per iteration
    busiest_over_mean("a")  that over the mean of the ranks
    per_micro_batch("a")  mean over micro-batches and data-parallel ranks
    ratio("a", "b")       sum of a over sum of b; there is none where b is zero
    of_load(f)            f of the rows per expert
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reduced:
    """The sums of one layer over all ranks since the last report.

    Attributes:
        sums: by name, over ranks. What no rank added to is missing.
        largest: by name, of the rank with the most.
        load_E: fp64, rows per expert over all ranks, before compression.
        iterations, ranks, micro_batches: what to divide by; micro-batches of all data-parallel ranks.
    """

    sums: Mapping[str, float]
    largest: Mapping[str, float]
    load_E: Tensor
    iterations: int
    ranks: int
    micro_batches: int


@dataclass(frozen=True)
class Combine:
    """How sums become a figure.

    Attributes:
        sums: the sums that are read.
        figure: of the reduced sums; None where there is nothing to say.
        needs_largest: whether the busiest rank's sums are read too.
    """

    sums: tuple[str, ...]
    figure: Callable[[Reduced], float | None] = field(compare=False)
    needs_largest: bool = False


def summed(*sums: str) -> Combine:
    """Over ranks and micro-batches, per iteration."""
    return Combine(sums, lambda found: _total(found, sums) / found.iterations)


def averaged(*sums: str) -> Combine:
    """What one rank spent per iteration."""
    return Combine(sums, lambda found: _total(found, sums) / found.iterations / found.ranks)


def busiest(name: str) -> Combine:
    """The largest rank's sum, per iteration."""
    return Combine((name,), lambda found: found.largest.get(name, 0.0) / found.iterations, needs_largest=True)


def busiest_over_mean(name: str) -> Combine:
    """The largest rank's sum over the mean of the ranks; 1 is perfect balance."""

    def figure(found: Reduced) -> float | None:
        mean = found.sums.get(name, 0.0) / found.ranks
        return found.largest.get(name, 0.0) / mean if mean > 0 else None

    return Combine((name,), figure, needs_largest=True)


def per_micro_batch(name: str) -> Combine:
    """Mean over the micro-batches of all data-parallel ranks; tensor-parallel ranks add shares of one micro-batch."""
    return Combine((name,), lambda found: found.sums.get(name, 0.0) / found.micro_batches)


def ratio(over: str, under: str) -> Combine:
    """Sum over sum, over all ranks and micro-batches."""

    def figure(found: Reduced) -> float | None:
        below = found.sums.get(under, 0.0)
        return found.sums.get(over, 0.0) / below if below > 0 else None

    return Combine((over, under), figure)


def of_load(figure: Callable[[Tensor], Tensor], per_iteration: bool = False) -> Combine:
    """Of the rows per expert, fp64 [E]; divided by the iterations if asked to."""
    return Combine((), lambda found: figure(found.load_E).item() / (found.iterations if per_iteration else 1))


def _total(found: Reduced, sums: tuple[str, ...]) -> float:
    return sum(found.sums.get(name, 0.0) for name in sums)


@dataclass(frozen=True)
class Gauge:
    """One figure per layer and log interval.

    Attributes:
        name: key of the JSON lines: ``name`` for the model, ``name_per_layer`` for its layers.
        unit: bytes, ms, share, rows, loss; "" for a bare number.
        label: a few words, for plots.
        combine: how the ranks' sums become a layer's figure; made by the functions above.
        meaning: a sentence, for docs/instruments.md.
        layers: how the layers' figures become the model's: "sum", "mean", or None where there is none.
        model_name: the model's figure, if it is not called like the layers'.
        optional: the figure exists only where some rank added to its sums; without this it is zero then.
    """

    name: str
    unit: str
    label: str
    combine: Combine
    meaning: str = ""
    layers: str | None = "sum"
    model_name: str | None = None
    optional: bool = False

    def figure(self, found: Reduced) -> float | None:
        """This layer's figure."""
        if self.optional and not any(name in found.sums for name in self.combine.sums):
            return None
        return self.combine.figure(found)


def max_over_mean(load_E: Tensor) -> Tensor:
    """Rows of the fullest expert over the mean; 1 is perfect balance."""
    return load_E.max() / load_E.mean().clamp(min=1e-12)


def quantile(share: float) -> Callable[[Tensor], Tensor]:
    """The percentile of the rows per expert."""
    return lambda load_E: torch.quantile(load_E, share)


def gauge_table(gauges: Iterable[Gauge]) -> str:
    """The table of docs/instruments.md (Markdown); ``python -m megatron_lsh.moe.instruments`` writes it there."""
    lines = ["| key | unit | over the layers | meaning |", "|---|---|---|---|"]
    for gauge in gauges:
        over = {"sum": "sum", "mean": "mean", None: "per layer only"}[gauge.layers]
        per_layer = "" if gauge.model_name is None else f" (per layer `{gauge.name}_per_layer`)"
        name = gauge.model_name or (gauge.name if gauge.layers else f"{gauge.name}_per_layer")
        lines.append(f"| `{name}`{per_layer} | {gauge.unit or '-'} | {over} | {gauge.meaning} |")
    return "\n".join(lines)
