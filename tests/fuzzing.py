"""How many cases fuzzers try, and what they do to bytes and values. ``FUZZ_CASES=3000 pytest tests -k fuzz`` tries many."""

from __future__ import annotations

import os
import random
from typing import Any

SEED = int(os.environ.get("FUZZ_SEED", "0"))
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, float("inf"), float("nan"), 1e308),
    *("", "x", "0", "../x", "/etc/passwd", "a\0b", "é", "\ud800", "x" * 10_000, "true", "null", "nan"),
    *([], {}, [[]], [None], {"": None}, [1, 2, 3], {"a": 1}, [{}], {"params": [1], "options": {}}),
)
"""what JSON can hold where something else was expected"""


def cases(usual: int) -> int:
    """How many cases to try: `usual`, or FUZZ_CASES."""
    return int(os.environ.get("FUZZ_CASES", usual))


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The bytes of a file as a broken disk or a broken copy would leave them; perhaps unchanged."""
    position = rng.randrange(len(content)) if content else 0
    match rng.randrange(7):
        case 0:
            flipped = bytearray(content)
            for _ in range(rng.choice((1, 1, 1, 8))):
                if flipped:
                    flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
            return bytes(flipped)
        case 1:
            return content[:position]
        case 2:
            return content + rng.randbytes(rng.choice((1, 100)))
        case 3:
            return b""
        case 4:
            return rng.randbytes(rng.choice((1, 100, len(content))))
        case 5:
            length = rng.choice((1, 16, 4096))
            return content[:position] + bytes(min(length, len(content) - position)) + content[position + length :]
        case _:
            length = rng.choice((1, 16, 512))
            return content[:position] + content[position + length :]


def mutated(value: Any, rng: random.Random) -> Any:
    """A JSON value of which one part, however deep, is replaced by an odd one, is missing, or is there twice."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        if rng.random() < 0.15:
            return {name: item for name, item in value.items() if name != key}
        if rng.random() < 0.1:
            return value | {rng.choice(("", "x", key + " ")): value[key]}
        return value | {key: mutated(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        place = rng.randrange(len(value))
        if rng.random() < 0.15:
            return [*value[:place], *value[place + 1 :]]
        if rng.random() < 0.1:
            return [*value, value[place]]
        return [*value[:place], mutated(value[place], rng), *value[place + 1 :]]
    return rng.choice(ODD_VALUES)
