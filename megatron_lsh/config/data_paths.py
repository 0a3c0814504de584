"""What --split and the flags that end in data-path mean, and what is wrong with them."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import TYPE_CHECKING

from megatron_lsh.config.settings import named
from megatron_lsh.errors import ConfigError

if TYPE_CHECKING:
    from megatron_lsh.config.data import DataConfig

DEFAULT_SPLIT = "969,30,1"
SPLITS = ("train", "valid", "test")


def data_problems(data: DataConfig) -> list[str]:
    """One line (field, value, rule, fix) for all that is wrong with where the samples come from."""
    problems = []
    per_split = [f"{name}_data_path" for name in SPLITS if getattr(data, f"{name}_data_path")]
    for name in per_split:
        if data.data_path:
            problems.append(
                f"{_named(data, name)} must not be given with {_named(data, 'data_path')}: drop one of them"
            )
        if data.split is not None:
            problems.append(
                f"{_named(data, 'split')} must not be given with {_named(data, name)}, which splits by itself: drop --split"
            )
    given = ["data_path", *per_split] if data.data_path else per_split
    for name in given:
        if data.mock_data:
            problems.append(
                f"{_named(data, name)} must not be given with {_named(data, 'mock_data')}: drop one of them"
            )
        try:
            parse_data_path(getattr(data, name), name)
        except ConfigError as error:
            problems.append(str(error))
    if data.split is not None:
        try:
            parse_split(data.split)
        except ConfigError as error:
            problems.append(str(error))
    return problems


def _named(data: DataConfig, name: str) -> str:
    return named(f"data.{name}", getattr(data, name))


def parse_split(text: str) -> tuple[Fraction, Fraction, Fraction]:
    """Shares of train, valid and test, adding up to 1, from e.g. ``969,30,1`` or ``0.9,0.1``.

    Raises:
        ConfigError: if the text is not one to three numbers that are not negative, or all are zero.
    """
    try:
        shares = [_exactly(part) for part in re.split("[,/]", text)]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= len(SPLITS) or min(shares) < 0 or not sum(shares):
        raise ConfigError(
            f"{named('data.split', text)} must be up to three shares that are not all 0, such as {DEFAULT_SPLIT}: change "
            "--split"
        )
    shares += [Fraction(0)] * (len(SPLITS) - len(shares))
    train, valid, test = (share / sum(shares) for share in shares)
    return train, valid, test


def parse_data_path(words: list[str], name: str = "data_path") -> tuple[list[str], list[Fraction] | None]:
    """(prefixes, weights) from ``PREFIX ...`` (weights None) or ``W1 PREFIX1 W2 PREFIX2 ...``; `name` of the setting.

    Raises:
        ConfigError: if weights and prefixes do not alternate, a weight is not positive, or a prefix appears twice.
    """
    what, flag = named(f"data.{name}", " ".join(words)), "--" + name.replace("_", "-")
    numbers = [is_number(word) for word in words]
    weights: list[Fraction] | None = None
    prefixes = list(words)
    if any(numbers):
        if len(words) % 2 or not all(numbers[::2]) or any(numbers[1::2]):
            raise ConfigError(
                f"{what} must be PREFIX ... or W1 PREFIX1 W2 PREFIX2 ..., one weight before each prefix: change {flag}"
            )
        prefixes = words[1::2]
        try:
            weights = [_exactly(weight) for weight in words[::2]]
        except ValueError:
            weights = [Fraction(0)]
        if min(weights) <= 0:
            raise ConfigError(f"{what} must have positive weights: change {flag}, and leave out what has none")
    twice = sorted({prefix for prefix in prefixes if prefixes.count(prefix) > 1})
    if twice:
        raise ConfigError(f"{what} must name {twice[0]} once: give it the sum of its weights in {flag}")
    return prefixes, weights


def is_number(word: str) -> bool:
    """Whether a word of a data path is a weight."""
    try:
        float(word)
    except ValueError:
        return False
    return True


def _exactly(word: str) -> Fraction:
    """The number as written. Raises ValueError for what is none, or not finite."""
    near = float(word)
    if not math.isfinite(near):
        raise ValueError(f"{word} is not finite")
    return Fraction(word) if near else Fraction(0)  # not of 1e-999999999, which has as many digits
