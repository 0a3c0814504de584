"""Which part of the rows is sent, by layer and by iteration: one object, :class:`Rates`, made of ``--lsh-target-rate``
and, where rates follow the residual energy, ``--lsh-target-energy`` and ``--lsh-least-rate``.

0.2                                 everywhere and always
[0.1]*2+[0.2]*18                    one rate per layer of the model, numbered through all its stacks
[0.1,0.3]                           one per stack (T5: encoder, decoder), if it has so many
0.1,0.2@1000,[0.2,0.3]@5000         from iteration 1000 on another, and from 5000 on by layer again

With a target energy these are the most that is sent, and where each layer begins: after an iteration its rate rises if its
residual energy was above the target, and falls if it was below. Energy falls roughly as exp(-5 rate) on the models of
docs/measurements.md, so a step of a quarter of the distance in logarithms neither overshoots nor follows single batches.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

_MOST = 10_000  # entries of a list; keeps [0.1]*10000000000 from eating the memory
_RULE = "must be above 0 and at most 1"
_GAIN, _MOST_STEP = 0.25, 0.1
"""of log(energy / target) that is added to log(rate), and at most how much of it in an iteration"""
_FORM = "must be a number, a list of one per layer such as [0.1]*2+[0.2]*10, or several of these as in 0.1,0.2@1000"


@dataclass(frozen=True)
class Rates:
    """What share of its rows a layer sends in an iteration.

    Attributes:
        phases: (first iteration, rates) in rising order, the first from 0 on; one rate, or one per layer of the model.
        energy: the residual energy that rates follow; None where they are as they stand.
        least: the lowest rate to which they fall then.
    """

    phases: tuple[tuple[int, tuple[float, ...]], ...]
    energy: float | None = None
    least: float = 0.0

    @staticmethod
    def of(value: Any) -> Rates:
        """From what the setting holds: a number, a list, or text of the form above.

        Raises:
            ValueError: with the rule that it breaks.
        """
        if isinstance(value, str):
            pairs = [_phase(text, first=number == 0) for number, text in enumerate(_split(value))]
        else:
            pairs = [(0, _list_of(value))]
        starts = [start for start, _ in pairs]
        if starts[:1] != [0] or starts != sorted(set(starts)):
            raise ValueError(
                "must begin at iteration 0, and each further rate at a later iteration than the one before"
            )
        for rate in (rate for _, rates in pairs for rate in rates):
            if not 0 < rate <= 1:
                raise ValueError(_RULE if len(pairs) == len(pairs[0][1]) == 1 else f"{_RULE}, which {rate:g} is not")
        return Rates(tuple(pairs))

    def following(self, energy: float | None, least: float) -> Rates:
        """The same as the most that is sent, where rates follow this residual energy (None: they do not)."""
        return self if energy is None else replace(self, energy=energy, least=least)

    def followed(self, layer: int, iteration: int, rate: float, energy: float | None) -> float:
        """The rate of a layer in this iteration, after one with that rate and residual energy (None: nobody knows)."""
        if self.energy is not None and energy is not None:
            step = _GAIN * math.log(max(energy, 1e-9) / self.energy)
            rate *= math.exp(min(max(step, -_MOST_STEP), _MOST_STEP))
        return min(max(rate, self.least), self.at(layer, iteration))

    def at(self, layer: int, iteration: int) -> float:
        """Of the layer with this number in the model, in this iteration (counted from 0); the most, if rates follow."""
        rates = next(rates for start, rates in reversed(self.phases) if start <= iteration)
        return rates[0] if len(rates) == 1 else rates[layer]

    def of_layer(self, layer: int) -> tuple[float, ...]:
        """All rates that a layer ever has, in their order; with those to which it may fall."""
        return tuple(self.at(layer, start) for start, _ in self.phases) + self._lowest()

    def span(self) -> tuple[float, float]:
        """The smallest and the largest."""
        every = [*(rate for _, rates in self.phases for rate in rates), *self._lowest()]
        return min(every), max(every)

    def times(self, factor: float) -> Rates:
        """All rates multiplied, none above 1."""
        phases = tuple((start, tuple(min(rate * factor, 1.0) for rate in rates)) for start, rates in self.phases)
        return replace(self, phases=phases)

    def by_layer(self, layers_of_stacks: Sequence[int]) -> Rates:
        """One rate per stack becomes one per layer.

        Args:
            layers_of_stacks: layers of each stack of the model, in the order in which they are numbered.

        Raises:
            ValueError: for a list that is neither one per layer nor one per stack.
        """
        layers, phases = sum(layers_of_stacks), []
        for start, rates in self.phases:
            if len(rates) == len(layers_of_stacks) > 1:
                rates = tuple(rate for rate, n in zip(rates, layers_of_stacks, strict=True) for _ in range(n))
            if len(rates) not in (1, layers):
                per_stack = f" or {len(layers_of_stacks)}, one per stack" if len(layers_of_stacks) > 1 else ""
                raise ValueError(
                    f"has a list of {len(rates)} and must have {layers}, one per layer of the model{per_stack}"
                )
            phases.append((start, rates))
        return replace(self, phases=tuple(phases))

    def _lowest(self) -> tuple[float, ...]:
        return () if self.energy is None else (self.least,)

    def __str__(self) -> str:
        """What :meth:`of` reads."""
        return ",".join(_list_text(rates) + (f"@{start}" if start else "") for start, rates in self.phases)


def rate_text(value: Any) -> Any:
    """Lists of a YAML file as text. Whether it says something sensible is for ``validate`` to find."""
    if not isinstance(value, list | tuple):
        return value
    try:
        return str(Rates.of(value))
    except ValueError:
        return str(value)


def _split(text: str) -> list[str]:
    """At the commas outside brackets."""
    return re.split(r",(?![^\[]*\])", re.sub(r"\s", "", text))


def _phase(text: str, *, first: bool) -> tuple[int, tuple[float, ...]]:
    rates, at, start = text.partition("@")
    if not at and not first:
        raise ValueError("must say from which iteration on a further rate holds, as in 0.1,0.2@1000")
    return _start(start) if at else 0, _sum(rates)


def _start(text: str) -> int:
    if not re.fullmatch(r"\d{1,15}", text):
        raise ValueError("must name an iteration, an integer, after @")
    return int(text)


def _sum(text: str) -> tuple[float, ...]:
    """A number, or a sum of lists and of multiples of lists."""
    if "[" not in text:
        return (_number(text),)
    rates: tuple[float, ...] = ()
    for term in re.split(r"\+(?![^\[]*\])", text.removeprefix("(").removesuffix(")")):
        found = re.fullmatch(r"(?:(\d{1,12})\*)?\[([^\[\]]*)\](?:\*(\d{1,12}))?", term)
        if found is None:
            raise ValueError(_FORM)
        before, inside, after = found.groups()
        entries = tuple(_number(entry) for entry in inside.split(","))
        times = int(before or 1) * int(after or 1)
        if times * len(entries) + len(rates) > _MOST:
            raise ValueError(f"must have at most {_MOST:,} entries")
        rates += entries * times
    if not rates:
        raise ValueError(_FORM)
    return rates


def _list_of(value: Any) -> tuple[float, ...]:
    if isinstance(value, list | tuple):
        if not 0 < len(value) <= _MOST:
            raise ValueError(f"must have between 1 and {_MOST:,} entries")
        return tuple(map(_number, value))
    return (_number(value),)


def _number(value: Any) -> float:
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
    except (ValueError, OverflowError):
        number = None
    if number is None:
        raise ValueError(_FORM)
    return number


def _list_text(rates: Sequence[float]) -> str:
    """``0.2``, or ``[0.1]*2+[0.2]*3``."""
    if len(rates) == 1:
        return repr(rates[0])
    runs: list[tuple[float, int]] = []
    for rate in rates:
        if runs and runs[-1][0] == rate:
            runs[-1] = rate, runs[-1][1] + 1
        else:
            runs.append((rate, 1))
    if all(n == 1 for _, n in runs):
        return f"[{','.join(map(repr, rates))}]"
    return "+".join(f"[{rate!r}]" + (f"*{n}" if n > 1 else "") for rate, n in runs)
