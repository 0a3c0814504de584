"""`CheckpointManager`: what the training loop uses to save and load."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch

from megatron_lsh.checkpoint import folders
from megatron_lsh.checkpoint.agreement import Ranks
from megatron_lsh.checkpoint.lock import SaveLock
from megatron_lsh.checkpoint.reader import LoadOptions, find_checkpoint, load_checkpoint
from megatron_lsh.checkpoint.state import LoadResult, TrainingState
from megatron_lsh.checkpoint.writer import Snapshot, append_progress, layout_of, take_snapshot, write_checkpoint
from megatron_lsh.config.checkpoint import CheckpointConfig
from megatron_lsh.errors import CheckpointError, DamagedCheckpoint
from megatron_lsh.parallel.context import ParallelContext


class CheckpointManager:
    """Saves and loads checkpoints as `cfg` says. All ranks make one and call its methods in the same order.

    Args:
        timeout: of the group on which ranks agree; a rank that writes slower than this fails the save.
        lock: rank 0's right to save in --save, if it has it already; else the manager takes it.
        log_progress: append one line per checkpoint to SAVE/progress.txt.
        notify: called on rank 0 with one line of text for the user, for an asynchronous save from its thread.

    Making it creates a process group (collective) and, with --save, takes and tries out the save folder: one that another
    run uses, that cannot be written, or that not all nodes share, is a CheckpointError before the training starts and not
    after hours. Loading needs no right to save.
    """

    def __init__(
        self,
        cfg: CheckpointConfig,
        ctx: ParallelContext,
        *,
        timeout: timedelta = timedelta(minutes=10),
        lock: SaveLock | None = None,
        log_progress: bool = False,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        self._cfg = cfg
        self._layout = layout_of(ctx)
        self._device = ctx.device
        self._ranks = Ranks(ctx, timeout)
        self._log_progress = log_progress
        self._say = notify or _print
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None
        self._lock = lock
        if cfg.save is not None:
            self._try_save_folder(Path(cfg.save))

    def save(self, state: TrainingState) -> None:
        """Save a checkpoint of ``state.iteration``. Collective.

        With --async-save it returns once the state is copied to CPU memory; the training may go on and change it.
        Raises CheckpointError, the same on all ranks, if this save fails, or if the previous asynchronous one did (then
        nothing new is saved). Earlier checkpoints are intact in either case.
        """
        self.wait()
        if self._cfg.save is None:
            raise ValueError("save() needs a save folder: --save is not set")
        root = Path(self._cfg.save)
        start = time.monotonic()
        snapshot = self._ranks.each(
            "the training state could not be collected for a checkpoint",
            lambda: take_snapshot(
                state,
                self._layout,
                save_optim=self._cfg.save_optim,
                save_rng=self._cfg.save_rng,
                copy=self._cfg.async_save,
            ),
        )
        if not self._cfg.async_save:
            self._write(root, snapshot, start)
            return
        self._thread = threading.Thread(
            target=self._write_in_background, args=(root, snapshot, start), name="checkpoint-writer"
        )
        self._thread.start()

    def wait(self) -> None:
        """Finish a running asynchronous save. Raises its CheckpointError, once. Call it before the program ends."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def load(self, state: TrainingState) -> LoadResult | None:
        """Fill `state` from --load, or from --pretrained-checkpoint if --load has no checkpoint. Collective.

        A converted checkpoint (``release``) has weights only, and needs no --finetune to be loaded without the rest.
        None if there is nothing to load. The caller applies the result's `progress`, `rng` and `extra`.
        Raises CheckpointError, the same on all ranks: a checkpoint of another model, no valid checkpoint where there
        should be one, optimizer or random states that are asked for but were not saved, and a missing checkpoint with
        --exit-on-missing-checkpoint.
        """
        self.wait()
        cfg = self._cfg
        result = None
        if cfg.load is not None:
            result = self._load_newest(Path(cfg.load), cfg.ckpt_step, state, weights_only=cfg.finetune)
        if result is None and cfg.pretrained_checkpoint is not None:
            result = self._load_newest(Path(cfg.pretrained_checkpoint), None, state, weights_only=True)
            if result is None:
                raise CheckpointError(f"--pretrained-checkpoint {cfg.pretrained_checkpoint} has no checkpoint in it")
        if result is None and cfg.load is not None:
            if cfg.exit_on_missing_checkpoint:
                raise CheckpointError(
                    f"--load {cfg.load} has no checkpoint in it, and --exit-on-missing-checkpoint is set"
                )
            self._notify(f"WARNING: --load {cfg.load} has no checkpoint in it: starting afresh")
        return result

    def _load_newest(self, root: Path, step: int | None, state: TrainingState, weights_only: bool) -> LoadResult | None:
        """Load the newest checkpoint that can be read to its end; None if there is none at all."""
        unreadable: dict[Path, str] = {}
        while True:
            found = find_checkpoint(root, step, self._ranks, self._notify, unreadable)
            if found is None:
                return None
            start = time.monotonic()
            no_more = weights_only or found.folder.name == folders.RELEASE
            options = LoadOptions(
                optimizer=self._cfg.load_optim and not no_more,
                rng=self._cfg.load_rng and not no_more,
                weights_only=no_more,
                new_function=weights_only,
            )
            try:
                result = load_checkpoint(found, state, self._layout, options, self._ranks, self._notify)
            except DamagedCheckpoint as error:  # the same on all ranks
                unreadable[found.folder] = str(error)
                continue
            kind = "weights of checkpoint" if no_more else "checkpoint"
            self._notify(f"loaded {kind} {found.folder} in {time.monotonic() - start:.2f} s")
            return result

    def _write_in_background(self, root: Path, snapshot: Snapshot, start: float) -> None:
        try:
            if self._device.type == "cuda":  # a new thread starts on GPU 0, and DCP asks for its stream
                torch.cuda.set_device(self._device)
            self._write(root, snapshot, start)
        except CheckpointError as error:
            self._failure = error
        except Exception as error:  # a peer died: torch's own exception, which must not be lost with the thread
            self._failure = CheckpointError(f"asynchronous save of iteration {snapshot.iteration} failed: {error}")

    def _write(self, root: Path, snapshot: Snapshot, start: float) -> None:
        lock = self._lock
        what = f"checkpoint of iteration {snapshot.iteration} could not be saved in {root}"
        self._ranks.coordinator(what, lambda: lock.confirm() if lock is not None else None)
        folder, manifest = write_checkpoint(root, snapshot, self._ranks)
        seconds = time.monotonic() - start
        size = f"{manifest.total_bytes / 1e6:.1f} MB"
        self._notify(f"saved checkpoint of iteration {snapshot.iteration} in {folder}: {size} in {seconds:.2f} s")
        if not self._ranks.is_coordinator:
            return
        # The checkpoint is safe: no reason to end the training, nor for one of these two to stop the other.
        try:
            if self._log_progress:
                append_progress(root, snapshot, manifest, seconds)
        except OSError as error:
            self._notify(f"WARNING: {root / 'progress.txt'} could not be written: {error}")
        removed, problems = folders.tidy(root, snapshot.iteration, self._cfg.save_retain_interval)
        for path in removed:
            self._notify(f"removed checkpoint {path}")
        for problem in problems:
            self._notify(f"WARNING: an older checkpoint could not be removed: {problem}")

    def _try_save_folder(self, root: Path) -> None:
        what = f"--save {root} cannot be used"
        probe = root / f".write_test_{time.time_ns()}"

        def create() -> tuple[Path, list[str]]:
            self._lock = self._lock or SaveLock(root)
            root.mkdir(parents=True, exist_ok=True)
            problems = folders.remove_leftovers(root)
            probe.write_bytes(b"x")
            return probe, problems

        def look() -> None:
            if not shared.exists():
                raise CheckpointError(
                    f"rank {self._ranks.rank} does not see {shared}, which rank 0 wrote: use a folder that all nodes share"
                )

        shared, problems = self._ranks.coordinator(what, create)
        for problem in problems:
            self._notify(f"WARNING: what a save left behind that did not finish could not be removed: {problem}")
        try:
            self._ranks.each(what, look)
        finally:
            if self._ranks.is_coordinator:
                shared.unlink(missing_ok=True)

    def _notify(self, text: str) -> None:
        if self._ranks.is_coordinator:
            self._say(text)


def _print(text: str) -> None:
    print(text, flush=True)
