"""``--profile``: a torch.profiler trace of a few iterations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from megatron_lsh.config.config import Config
from megatron_lsh.parallel.context import ParallelContext


class Profiling:
    """Traces iterations --profile-step-start up to --profile-step-end (exclusive, from 0) on the chosen ranks.

    The trace, for chrome://tracing or Perfetto, goes to the TensorBoard folder, else to --save, else here.
    """

    def __init__(self, cfg: Config, ctx: ParallelContext) -> None:
        self._wanted = cfg.logging.profile and ctx.rank in cfg.logging.profile_ranks
        self._first, self._end = cfg.logging.profile_step_start, cfg.logging.profile_step_end
        folder = cfg.logging.tensorboard_dir or cfg.checkpoint.save or "."
        self._path = Path(folder) / f"trace_rank{ctx.rank}_iterations{self._first}-{self._end}.json"
        self._activities = [ProfilerActivity.CPU]
        if ctx.device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        self._profile: Any = None

    def __enter__(self) -> Profiling:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def before(self, iteration: int) -> None:
        """`iteration`: how many are complete."""
        if self._wanted and self._profile is None and self._first <= iteration < self._end:
            self._profile = profile(activities=self._activities)
            self._profile.start()

    def after(self, iteration: int) -> None:
        """`iteration`: how many are complete now."""
        if self._profile is not None and iteration >= self._end:
            self.close()

    def close(self) -> None:
        """Write the trace, if one is being taken."""
        if self._profile is None:
            return
        self._profile.stop()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(self._path))
            print(f"> profiler trace written to {self._path}", flush=True)
        except (OSError, RuntimeError) as error:
            print(
                f"WARNING: the profiler trace {self._path} could not be written ({error}): the run goes on", flush=True
            )
        self._profile, self._wanted = None, False
