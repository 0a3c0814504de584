"""What is kept for the day when a run hangs or runs out of memory: torch's flight recorder, and its history of allocations.

Both are off unless a path is given, and neither ends a run.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from megatron_lsh.config.logging import LoggingConfig
from megatron_lsh.parallel.context import ParallelContext

PREFIX = "rank_"
"""of the recorder's files: rank_0, rank_1, ...; torch.distributed.flight_recorder.fr_trace reads them with --prefix rank_"""
HISTORY = 100_000
"""allocations that are remembered"""


def arm_flight_recorder(cfg: LoggingConfig, environ: MutableMapping[str, str]) -> None:
    """Have torch remember the last collectives of this rank. Before the process groups; variables that are set hold."""
    if cfg.flight_recorder_dump_path is None:
        return
    Path(cfg.flight_recorder_dump_path).mkdir(parents=True, exist_ok=True)
    environ.setdefault("TORCH_FR_BUFFER_SIZE", str(cfg.flight_recorder_trace_buffer_size))
    # NCCL's own watchdog writes there as well when a collective takes longer than the time-out, before it ends the process.
    environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        environ.setdefault(name, str(Path(cfg.flight_recorder_dump_path) / PREFIX))


def dump_flight_recorder(cfg: LoggingConfig, rank: int) -> str | None:
    """Write what this rank's recorder holds; says where, or why not, or None without --flight-recorder-dump-path."""
    if cfg.flight_recorder_dump_path is None:
        return None
    path = Path(cfg.flight_recorder_dump_path) / f"{PREFIX}{rank}"
    try:
        from torch._C import _distributed_c10d as c10d

        path.write_bytes(c10d._dump_fr_trace())  # type: ignore[attr-defined]
    except (AttributeError, OSError, RuntimeError) as error:
        return f"WARNING: the flight recorder could not be written to {path} ({error})"
    return f"the last collectives of rank {rank}: {path}"


class MemoryHistory:
    """--memory-snapshot-path: who allocated what on this rank's GPU, written when memory runs out, and at the end."""

    def __init__(self, cfg: LoggingConfig, ctx: ParallelContext) -> None:
        self._path = None
        wanted = cfg.record_memory_history or cfg.memory_snapshot_path is not None
        if wanted and ctx.device.type == "cuda":
            path = Path(cfg.memory_snapshot_path or "snapshot.pickle")
            self._path = path.with_name(f"{path.stem}_rank{ctx.rank}{path.suffix or '.pickle'}")

    def __enter__(self) -> MemoryHistory:
        if self._path is not None:
            torch.cuda.memory._record_memory_history(max_entries=HISTORY)
            torch._C._cuda_attach_out_of_memory_observer(self._out_of_memory)  # type: ignore[attr-defined]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._path is not None:
            self._write()
            torch.cuda.memory._record_memory_history(enabled=None)

    def _out_of_memory(self, *_: Any) -> None:
        self._write()

    def _write(self) -> None:
        try:
            assert self._path is not None
            self._path.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(self._path))
        except (OSError, RuntimeError) as error:
            print(f"WARNING: the memory snapshot {self._path} could not be written ({error})", flush=True)
