"""``flag()``: a dataclass field that is also a command-line flag.

Every setting of the framework is one field of one dataclass in this folder. The command line, ``--help``, the YAML
loader, the checks of single values, the saved ``config.json`` and ``docs/flags.md`` are all derived from these fields,
so a setting is declared exactly once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any


def flag(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    off: str | None = None,
    parse: Callable[[Any], Any] | None = None,
    aliases: Sequence[str] = (),
) -> Any:
    """Declare a configuration field. Its flag is ``--`` + the field's name with dashes; its type is the annotation.

    Args:
        default: value when the flag is absent. Lists are copied per instance.
        help: one sentence for ``--help``. Starts with a verb or noun, ends without a full stop. With ``off`` it is a noun,
            because "Turn off" is put before it.
        choices: the admissible values, if they can be listed.
        at_least, above, at_most, below: bounds of a number (>=, >, <=, <). None (absent) is always admissible.
        off: for a boolean that is on by default, the Megatron flag that turns it off, e.g. ``"--disable-bias-linear"``.
        parse: makes the value from what the user wrote (a string, or whatever YAML holds) before the type is checked.
        aliases: further spellings of the flag (with their dashes).
    """
    metadata = {
        "help": help,
        "choices": tuple(choices) if choices is not None else None,
        "bounds": Bounds(at_least, above, at_most, below),
        "off": off,
        "parse": parse,
        "aliases": tuple(aliases),
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Interval in which a number must lie; None leaves a side open."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def contain(self, number: float) -> bool:
        return not (
            (self.at_least is not None and number < self.at_least)
            or (self.above is not None and number <= self.above)
            or (self.at_most is not None and number > self.at_most)
            or (self.below is not None and number >= self.below)
        )

    @property
    def closed_above(self) -> bool:
        return self.at_most is not None or self.below is not None

    def __str__(self) -> str:
        """``at least 0 and below 1``; empty when nothing is bounded."""
        sides = [(f.name.replace("_", " "), getattr(self, f.name)) for f in dataclasses.fields(self)]
        return " and ".join(f"{side} {limit:g}" for side, limit in sides if limit is not None)
