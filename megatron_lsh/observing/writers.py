"""Files that metrics go to: one JSONL file and TensorBoard events, both kept one consistent curve across resumes.

They only observe. What cannot be opened is an error before the training starts; a disk that fills up later is told once,
and the training goes on.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from megatron_lsh.config.logging import LoggingConfig
from megatron_lsh.errors import ConfigError

MOST = 1e100
"""beyond this a number in a metrics file is none that a run found"""
FLUSH_S = 120.0
"""after which TensorBoard's points are written even if there are few of them"""


class SteadyStream:
    """Standard output or error whose reader or disk may vanish: what cannot be written is lost, told once, and no error."""

    def __init__(self, stream: TextIO, warn: Callable[[str], None]) -> None:
        self._stream, self._warn, self._lost = stream, warn, False

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (OSError, ValueError) as error:  # ValueError: it was closed
            if not self._lost:
                self._lost = True
                self._warn(f"WARNING: the log cannot be written ({error}): the run goes on without it")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)  # fileno, encoding, isatty, buffer, ...


class AppendedFile:
    """A file that whole records are appended to. One that does not fit on the disk is cut off again and told once."""

    def __init__(self, path: Path, flag: str, warn: Callable[[str], None] = print) -> None:
        """`flag`: the setting that named the file. Raises OSError if it cannot be opened."""
        self._path, self._flag, self._warn = path, flag, warn
        self._told = False
        self._file: BinaryIO | None = open(path, "ab", buffering=0)  # noqa: SIM115 - open as long as the run

    def append(self, record: bytes) -> bool:
        """Whether `record` was written; it is on its way to the disk then."""
        if self._file is None:
            return False
        try:
            self._follow_name()
            end = self._file.seek(0, os.SEEK_END) if self._file.seekable() else None
            try:
                self._write(record)
            except OSError:
                if end is not None:
                    with contextlib.suppress(OSError):
                        self._file.truncate(end)
                raise
        except OSError as error:
            if not self._told:
                self._told = True
                self._warn(
                    f"WARNING: {self._flag}: {self._path} cannot be written ({error}): the training goes on, and what "
                    "cannot be written is missing from it"
                )
            return False
        return True

    def _follow_name(self) -> None:
        """Begin the file anew where somebody moved or deleted it: what goes to a file without a name, nobody reads."""
        assert self._file is not None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno())):
                return
        begun = open(self._path, "ab", buffering=0)  # noqa: SIM115 - open as long as the run
        self._file.close()
        self._file = begun

    def _write(self, record: bytes) -> None:
        view = memoryview(record)
        while view:  # a disk that is nearly full takes a part
            view = view[self._file.write(view) :]  # type: ignore[union-attr]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class JsonlFile:
    """Appends one JSON object per line; every line is on its way to the disk before `write` returns.

    Opening prepares the file. A run that continues at iteration N drops what an earlier attempt wrote beyond N (and a last
    line cut short by a crash). A run that starts afresh moves a file that is already there aside. One that only evaluates
    (`iteration` None) adds to what is there.
    """

    def __init__(self, path: str | Path, iteration: int | None, warn: Callable[[str], None] = print) -> None:
        """`iteration`: iterations already complete. Raises ConfigError if the file cannot be opened."""
        self.path = Path(path)
        self.notice: str | None = None
        """what happened to an older file, for the user; None if there was none"""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if iteration is not None and self.path.exists() and self.path.stat().st_size > 0:
                self.notice = self._cut_back(iteration) if iteration > 0 else self._set_aside()
            self._file = AppendedFile(self.path, "--metrics-jsonl", warn)
        except OSError as error:
            raise ConfigError(
                f"--metrics-jsonl ({self.path}) must be a file that can be written ({error}): change it"
            ) from error

    def write(self, record: dict[str, Any]) -> None:
        self._file.append((json.dumps(record, allow_nan=False) + "\n").encode())

    def close(self) -> None:
        self._file.close()

    def _set_aside(self) -> str:
        number = 1
        while (old := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        self.path.rename(old)
        return f"{self.path} belonged to an earlier run: moved to {old.name}"

    def _cut_back(self, iteration: int) -> str | None:
        """Drop the lines of later iterations and those behind them that are damaged; line by line, the file may be large."""
        end = position = dropped = late = 0  # `end`: of the lines to keep before the first one to drop
        with open(self.path, "rb") as lines:
            for line in lines:
                kept = _belongs(line, iteration, after_a_later_one=dropped > 0)
                position += len(line)
                dropped += not kept
                late += kept and dropped > 0
                end = position if dropped == 0 else end
        if late:  # never of our making: a file that was put together by hand
            self._copy_lines(iteration)
        elif dropped:
            os.truncate(self.path, end)  # takes no space, which a disk that made the run fail may not have
        if not dropped:
            return None
        return (
            f"{self.path} cut back to iteration {iteration}: {dropped} later lines dropped, they will be written again"
        )

    def _copy_lines(self, iteration: int) -> None:
        temporary = self.path.with_name(self.path.name + ".new")
        later = False
        with open(self.path, "rb") as lines, open(temporary, "wb") as copy:
            for line in lines:
                kept = _belongs(line, iteration, after_a_later_one=later)
                later = later or not kept
                if kept:
                    copy.write(line)
        os.replace(temporary, self.path)


def _belongs(line: bytes, iteration: int, after_a_later_one: bool) -> bool:
    """Whether a line of a metrics file stays in a run that continues after `iteration`. Readers skip damaged lines."""
    record = _parse(line)
    if record is None:
        return line.endswith(b"\n") and not after_a_later_one
    found = record.get("iteration", 0)
    return not is_number(found) or found <= iteration


def _parse(line: str | bytes) -> dict[str, Any] | None:
    """The object that a line holds; None if it is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # ValueError: no JSON, no UTF-8, or a number of too many digits
        return None
    return record if isinstance(record, dict) else None


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def iter_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, one by one; damaged lines (a crash cuts the last one short) are left out."""
    with open(path, "rb") as lines:
        for line in lines:
            record = _parse(line)
            if record is not None:
                yield record


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """All of `iter_jsonl`."""
    return list(iter_jsonl(path))


class Board:
    """Scalars for TensorBoard, in an event file of their own; hides points of an earlier attempt beyond where the run is.

    torch's SummaryWriter writes from a thread, whose failure ends the run at some later point and leaves half a record,
    behind which TensorBoard reads no further. The records themselves are made by the tensorboard package.
    """

    def __init__(self, cfg: LoggingConfig, iteration: int, warn: Callable[[str], None] = print) -> None:
        """`iteration`: iterations already complete. Raises ImportError without tensorboard, OSError for a bad folder."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._record_writer = Event, Summary, RecordWriter
        folder = Path(str(cfg.tensorboard_dir))
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        number = 0
        while (path := folder / f"{name}.{number}").exists():
            number += 1
        self._file = AppendedFile(path, "--tensorboard-dir", warn)
        self._size = cfg.tensorboard_queue_size
        self._head = [Event(wall_time=time.time(), file_version="brain.Event:2")]
        self._points: list[Any] = []
        if iteration:
            started = SessionLog(status=SessionLog.START)
            self._head.append(Event(wall_time=time.time(), step=iteration + 1, session_log=started))
        self.flush()

    def points(self, iteration: int, values: Mapping[str, float], *, flush: bool = False) -> None:
        """Note points; every --tensorboard-queue-size of them are written together."""
        for tag, value in values.items():
            summary = self._summary(value=[self._summary.Value(tag=tag, simple_value=value)])
            self._points.append(self._event(wall_time=time.time(), step=iteration, summary=summary))
        if flush or len(self._points) >= self._size or time.monotonic() - self._flushed > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write what was noted."""
        events, self._points, self._flushed = self._points, [], time.monotonic()
        records = io.BytesIO()
        for event in [*self._head, *events]:
            self._record_writer(records).write(event.SerializeToString())
        if self._file.append(records.getvalue()):
            self._head = []

    def close(self) -> None:
        self.flush()
        self._file.close()


def open_tensorboard(cfg: LoggingConfig, iteration: int, warn: Callable[[str], None] = print) -> Board | None:
    """Where points go, or None without --tensorboard-dir.

    Raises:
        ConfigError: the package is missing or the folder cannot be written.
    """
    if cfg.tensorboard_dir is None:
        return None
    if "://" in cfg.tensorboard_dir:
        raise ConfigError(f"--tensorboard-dir ({cfg.tensorboard_dir}) must be a folder: give the path of a mounted one")
    try:
        return Board(cfg, iteration, warn)
    except ImportError as error:
        raise ConfigError(
            f"--tensorboard-dir needs the package tensorboard: pip install tensorboard ({error})"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"--tensorboard-dir ({cfg.tensorboard_dir}) must be a writable folder ({error}): change it"
        ) from error
