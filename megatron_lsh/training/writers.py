"""Files that metrics go to: one JSONL file and TensorBoard events, both kept one consistent curve across resumes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megatron_lsh.config.run import LoggingConfig
from megatron_lsh.errors import ConfigError


class JsonlFile:
    """Appends one JSON object per line; every line is on its way to the disk before `write` returns.

    Opening prepares the file. A run that continues at iteration N drops what an earlier attempt wrote beyond N (and a last
    line cut short by a crash). A run that starts afresh moves a file that is already there aside.
    """

    def __init__(self, path: str | Path, iteration: int) -> None:
        """`iteration`: iterations already complete. Raises ConfigError if the file cannot be written."""
        self.path = Path(path)
        self.notice: str | None = None
        """what happened to an older file, for the user; None if there was none"""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and self.path.stat().st_size > 0:
                self.notice = self._truncate(iteration) if iteration > 0 else self._set_aside()
            self._file = open(self.path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - open as long as the run
        except OSError as error:
            raise ConfigError(f"--metrics-jsonl ({self.path}) must be a file that can be written: {error}") from error

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, allow_nan=False) + "\n")

    def close(self) -> None:
        self._file.close()

    def _set_aside(self) -> str:
        number = 1
        while (old := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        self.path.rename(old)
        return f"{self.path} belonged to an earlier run: moved to {old.name}"

    def _truncate(self, iteration: int) -> str | None:
        kept = [record for record in read_jsonl(self.path) if record.get("iteration", 0) <= iteration]
        lines = self.path.read_text(encoding="utf-8", errors="replace").count("\n")
        temporary = self.path.with_name(self.path.name + ".new")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(temporary, self.path)
        dropped = lines - len(kept)
        if dropped <= 0:
            return None
        return f"{self.path} cut back to iteration {iteration}: {dropped} later lines dropped, they will be written again"


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """All complete objects of a JSONL file; damaged lines (a crash cuts the last one short) are left out."""
    records = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict):
                records.append(record)
    return records


def open_tensorboard(cfg: LoggingConfig, iteration: int) -> Any:
    """A SummaryWriter that hides points of an earlier attempt beyond `iteration`, or None without --tensorboard-dir.

    Raises:
        ConfigError: the package is missing or the folder cannot be written.
    """
    if cfg.tensorboard_dir is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter

        purge = iteration + 1 if iteration else None
        return SummaryWriter(cfg.tensorboard_dir, max_queue=cfg.tensorboard_queue_size, purge_step=purge)
    except ImportError as error:
        raise ConfigError(f"--tensorboard-dir needs the package tensorboard: pip install tensorboard ({error})") from error
    except OSError as error:
        raise ConfigError(f"--tensorboard-dir ({cfg.tensorboard_dir}) must be a writable folder: {error}") from error
