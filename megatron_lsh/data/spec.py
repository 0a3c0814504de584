"""What --split and --data-path mean."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from itertools import pairwise

from megatron_lsh.errors import ConfigError

DEFAULT_SPLIT = "969,30,1"
SPLITS = ("train", "valid", "test")


def parse_split(text: str) -> tuple[Fraction, Fraction, Fraction]:
    """Shares of train, valid and test, adding up to 1, from e.g. ``969,30,1`` or ``0.9,0.1``.

    Raises:
        ConfigError: if the text is not one to three numbers that are not negative, or all are zero.
    """
    try:
        shares = [Fraction(part.strip()) for part in re.split("[,/]", text)]
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(_split_message(text)) from error
    if len(shares) > len(SPLITS) or min(shares) < 0 or not sum(shares):
        raise ConfigError(_split_message(text))
    shares += [Fraction(0)] * (len(SPLITS) - len(shares))
    train, valid, test = (share / sum(shares) for share in shares)
    return train, valid, test


def _split_message(text: str) -> str:
    return (
        f"data.split ({text}) must be one to three numbers, none negative and not all zero: write e.g. "
        f"--split {DEFAULT_SPLIT}"
    )


def split_documents(num_documents: int, shares: tuple[Fraction, Fraction, Fraction]) -> list[tuple[int, int]]:
    """Consecutive (start, stop) ranges of documents, one per split; bounds are rounded half up."""
    bounds, total = [0], Fraction(0)
    for share in shares:
        total += share
        bounds.append(math.floor(total * num_documents + Fraction(1, 2)))
    return list(pairwise(bounds))


def parse_data_path(words: list[str], flag: str) -> tuple[list[str], list[str] | None]:
    """(prefixes, weights as written) from ``PREFIX ...`` (weights None) or ``W1 PREFIX1 W2 PREFIX2 ...``.

    Raises:
        ConfigError: if weights and prefixes do not alternate, a weight is not positive, or a prefix appears twice.
    """
    numbers = [_is_number(word) for word in words]
    weights: list[str] | None = None
    prefixes = list(words)
    if any(numbers):
        if len(words) % 2 or not all(numbers[::2]) or any(numbers[1::2]):
            raise ConfigError(
                f"{flag} ({' '.join(words)}) must be PREFIX ... or W1 PREFIX1 W2 PREFIX2 ...: put one weight "
                "before each prefix"
            )
        weights, prefixes = words[::2], words[1::2]
        wrong = [weight for weight in weights if not (math.isfinite(float(weight)) and float(weight) > 0)]
        if wrong:
            raise ConfigError(f"{flag}: weight {wrong[0]} must be positive: leave the corpus out to give it none")
    twice = sorted({prefix for prefix in prefixes if prefixes.count(prefix) > 1})
    if twice:
        raise ConfigError(f"{flag}: {twice[0]} appears more than once: name it once, with the sum of the weights")
    return prefixes, weights


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
