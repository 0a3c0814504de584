"""Orderly ends: signals, a launcher that dies, time limits, and errors that one rank meets and all ranks must hear of."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TypeVar

import torch.distributed as dist

from megatron_lsh.config.training import TrainingConfig
from megatron_lsh.errors import MegatronLSHError, reason
from megatron_lsh.observing.writers import SteadyStream
from megatron_lsh.parallel.launcher import adopt

Result = TypeVar("Result")

PATIENCE_S = 10.0


class Launcher:
    """The torchrun that started this rank, perhaps through a wrapper script. Without one there is nobody to lose."""

    def __init__(self) -> None:
        self._torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        self._parent = os.getppid()
        # torchrun makes what it starts the leader of a session: this process, or the wrapper script whose parent to watch.
        self._wrapper = os.getsid(0) if hasattr(os, "getsid") else 0
        self._above = process_state(self._wrapper)[1]

    @property
    def gone(self) -> bool:
        """Whether it has died and left its ranks behind. They would train on, beside those of the next start."""
        if not self._torchrun:
            return False
        return os.getppid() != self._parent or process_state(self._wrapper)[1] not in (None, self._above)


def process_state(pid: int) -> tuple[str, int | None]:
    """(state, parent) of a process as Linux tells them; ("", None) elsewhere, and for one that is not there."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[1])
    except (OSError, IndexError, ValueError):
        return "", None


class StopRequest:
    """Notices on this rank what ends a run early: a signal, the death of torchrun, the end of --exit-duration-in-mins.

    A signal only sets a flag: `requested` enters the small all-reduce that every iteration does anyway, so all ranks learn
    of it together and stop at the same iteration boundary, where they save and exit with status 0. Use as a context
    manager, in the main thread; the former handlers come back at the end. A signal that the process was started to ignore
    (nohup: SIGHUP) stays ignored, unless --exit-signal names it.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self, cfg: TrainingConfig, started: float | None = None) -> None:
        """`started`: time.monotonic() when the run began, the base of the time limit (default: now)."""
        started = time.monotonic() if started is None else started
        minutes = cfg.exit_duration_in_mins
        self._deadline = None if minutes is None else started + 60.0 * minutes
        self.launcher = Launcher()
        self._asked_for = None if cfg.exit_signal is None else signal.Signals[cfg.exit_signal]
        self._received: int | None = None
        self._former: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in {*self.SIGNALS, *([] if self._asked_for is None else [self._asked_for])}:
            if signal.getsignal(number) is not signal.SIG_IGN or number == self._asked_for:
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            if handler is not None:  # None: it was not Python's
                signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        # No way out by repeating it: torchrun passes on the Ctrl-C that the terminal already sent to every rank.
        self._received = number

    @property
    def requested(self) -> bool:
        """Whether this rank wants to stop."""
        late = self._deadline is not None and time.monotonic() >= self._deadline
        return self._received is not None or late or self.launcher.gone

    @property
    def reason(self) -> str:
        if self._received is not None:
            return f"received {signal.Signals(self._received).name}"
        if self.launcher.gone:
            return "torchrun is gone"
        if self.requested:
            return "reached --exit-duration-in-mins"
        return "another rank asked to stop"


def launch(prepare: Callable[[], Result], run: Callable[[Result], object]) -> int:
    """``run(prepare())`` for an entry script; returns the exit status. Mistakes of users are told without tracebacks.

    From here on a log that cannot be written (a full disk, a pipe whose reader is gone) does not end the process.

    An error that every rank knows is reported once: one in `prepare`, which needs no process group, by the first rank of
    each node; one that went through `together` by the rank that met it. Other errors tell which rank they are from.
    Exceptions that are not MegatronLSHError are bugs, or accidents of the machine, and pass with their traceback; in
    `prepare` a file that cannot be used is told, too.
    """
    _keep_streams()
    try:
        adopt(os.environ)
        prepared = prepare()
    except (MegatronLSHError, OSError) as error:
        if int(os.environ.get("LOCAL_RANK", "0")) > 0:
            # torchrun ends all ranks as soon as one exits: leave the first one the time to speak.
            time.sleep(PATIENCE_S)
        tell(reason(error))
        return 1
    try:
        run(prepared)
    except MegatronLSHError as error:
        rank, reporter = int(os.environ.get("RANK", "0")), getattr(error, "reported_by", None)
        if reporter is None:
            tell(f"[rank {rank}] {error}")
            return 1
        if reporter == rank:
            tell(str(error))
        if dist.is_initialized():
            dist.barrier()  # all ranks are here; none exits before the message is out
            dist.destroy_process_group()
        return 1
    return 0


def _keep_streams() -> None:
    if not isinstance(sys.stderr, SteadyStream):
        sys.stderr = SteadyStream(sys.stderr, lambda _: None)  # type: ignore[assignment]
    if not isinstance(sys.stdout, SteadyStream):
        sys.stdout = SteadyStream(sys.stdout, _warn)  # type: ignore[assignment]


def _warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def tell(message: str) -> None:
    """Tell the user why this rank ends, on standard error and where torchrun looks for the reason."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:  # torchrun closes with a table of failed ranks; this puts the reason where it looks for a traceback
        details = {"py_callstack": f"error: {message}", "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": details}}), encoding="utf-8")
