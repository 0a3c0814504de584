"""Flags of the tools: one argparse type for each rule, so that every tool refuses the same values in the same words.

Settings of a run are declared in dataclasses (``flag.py``); a tool has a few flags of its own and argparse.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from megatron_lsh.config.flag import Bounds
from megatron_lsh.config.settings import shown, to_float, to_int, to_str
from megatron_lsh.errors import ConfigError

Number = TypeVar("Number", int, float)


class ToolParser(argparse.ArgumentParser):
    """An argparse parser to whose flags the types below belong: a value that breaks its rule is a ConfigError."""

    def error(self, message: str) -> NoReturn:
        broken = re.fullmatch(r"argument (\S+): (\(.*\) must .*)", message)
        if broken:
            raise ConfigError(f"{broken[1].split('/')[0]} {broken[2]}")
        super().error(message)


def integer(at_least: int | None = None, at_most: int | None = None) -> Callable[[str], int]:
    """A whole number of 64 bits within bounds."""
    return _number(to_int, Bounds(at_least=at_least, at_most=at_most))


def real(
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Callable[[str], float]:
    """A finite number within bounds."""
    return _number(to_float, Bounds(at_least, above, at_most, below))


def a_text(word: str) -> str:
    """Any text that can be printed and given to the operating system."""
    try:
        return to_str(word)
    except ValueError as error:
        raise _broken(word, str(error)) from None


def a_name(word: str) -> str:
    """The name of something: a text that is not empty. An empty path would be the current folder."""
    if not word.strip():
        raise argparse.ArgumentTypeError(
            f"({shown(repr(word))}) must not be empty: give a name (. is the current folder)"
        )
    return a_text(word)


def a_path(word: str) -> Path:
    """An `a_name` of a file or a folder."""
    return Path(a_name(word))


def _number(convert: Callable[[str], Number], bounds: Bounds) -> Callable[[str], Number]:
    def number(word: str) -> Number:
        try:
            value = convert(word)
        except ValueError as error:
            raise _broken(word, str(error)) from None
        if not bounds.contain(value):
            raise _broken(word, f"must be {bounds}")
        return value

    return number


def _broken(word: str, rule: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"({shown(word) or repr('')}) {rule}: change it")


def check_place(flag: str, *paths: Path) -> None:
    """That files can be written, before anything is worked out for them; without a trace. Raises ConfigError."""
    try:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path.parent).close()
            if path.exists():
                path.open("r+b").close()
    except OSError as error:
        raise ConfigError(f"{flag} ({paths[0]}) must be a file that can be written: {error}; change it") from None
