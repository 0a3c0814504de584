"""Exceptions for mistakes a user can make, what they quote, and how a command line tool ends with one.

Each message gives the value, the rule and the fix.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import NoReturn


class MegatronLSHError(Exception):
    """Base of every error this framework raises on purpose."""


class ConfigError(MegatronLSHError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(MegatronLSHError, ValueError):
    """A data file or tokenizer that is missing, damaged, or does not fit the model."""


class CheckpointError(MegatronLSHError, RuntimeError):
    """A checkpoint that is missing, damaged, or of another model."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint of which something cannot be read as it was written; an earlier one may do."""


def first_line(error: BaseException) -> str:
    """What another package's error says, to be quoted in one of the above: its first line, or else its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def reason(error: MegatronLSHError | OSError) -> str:
    """What to tell the user. An OSError is a loop of links, a missing permission, a full disk, wherever it was met."""
    if isinstance(error, MegatronLSHError):
        return str(error)
    what = "a file" if error.filename is None else repr(str(error.filename)[:80])
    return f"{what} cannot be used: {error.strerror or first_line(error)}: give another path, or change that"


def exit_status(work: Callable[[], None], interrupted: str = "nothing was written") -> int:
    """Do the work of a tool and return its exit status: 0, 1 after an error, 130 if stopped.

    SIGTERM takes the same way out as Ctrl-C, so that temporary files are removed; `interrupted` says what is left then.
    """

    def stop(signum: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, stop)
    try:
        work()
    except (MegatronLSHError, OSError) as error:
        print(f"error: {reason(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: {interrupted}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, former)
    return 0
