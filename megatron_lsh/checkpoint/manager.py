"""`CheckpointManager`: what the training loop uses to save and load."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_lsh.checkpoint import folders
from megatron_lsh.checkpoint.agreement import Ranks
from megatron_lsh.checkpoint.compare import short_names
from megatron_lsh.checkpoint.lock import SaveLock
from megatron_lsh.checkpoint.reader import LoadOptions, find_checkpoint, load_checkpoint
from megatron_lsh.checkpoint.soundness import Standing, newest, not_finite
from megatron_lsh.checkpoint.state import LoadResult, TrainingState
from megatron_lsh.checkpoint.tensors import model_tensors
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
        self._fresh: int | None = None  # the newest checkpoint, while no step has been done with its model
        if cfg.save is not None:
            self._try_save_folder(Path(cfg.save))

    def save(self, state: TrainingState, standing: Standing = Standing.SOUND) -> None:
        """Save a checkpoint of ``state.iteration``. Collective.

        `standing` says what may happen to earlier ones. A model or optimizer whose values are not all finite is not saved.
        With --async-save it returns once the state is copied to CPU memory; the training may go on and change it.
        Raises CheckpointError, the same on all ranks, if this save fails, or if the previous asynchronous one did (then
        nothing new is saved). Earlier checkpoints are intact in either case.
        """
        self.wait()
        if self._cfg.save is None:
            raise ValueError("save() needs a save folder: --save is not set")
        root = Path(self._cfg.save)
        start = time.monotonic()
        if standing is Standing.DOUBTFUL and self._is_there(root, state.iteration):
            return
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
        self._refuse_non_finite(snapshot.local, snapshot.iteration)
        self._fresh = snapshot.iteration if standing is Standing.FRESH else None
        if not self._cfg.async_save:
            self._write(root, snapshot, start, standing)
            return
        self._thread = threading.Thread(
            target=self._write_in_background, args=(root, snapshot, start, standing), name="checkpoint-writer"
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
                raise CheckpointError(
                    f"--pretrained-checkpoint {cfg.pretrained_checkpoint} has no checkpoint in it: give the --save folder "
                    "of a run or of a conversion"
                )
        if result is None and cfg.load is not None:
            if cfg.exit_on_missing_checkpoint:
                raise CheckpointError(
                    f"--load {cfg.load} has no checkpoint in it, and --exit-on-missing-checkpoint is set: give another "
                    "--load, or drop that flag"
                )
            self._notify(f"WARNING: --load {cfg.load} has no checkpoint in it: starting afresh")
        return result

    def load_weights(self, root: Path, iteration: int, state: TrainingState) -> bool:
        """Fill the model from the checkpoint of this iteration in `root`; False if there is none. Collective.

        Raises CheckpointError, the same on all ranks, if it is damaged or of another model.
        """
        self.wait()
        folder = folders.iteration_folder(root, iteration)
        if not self._ranks.coordinator(f"{folder} could not be looked at", folder.is_dir):
            return False
        return self._load_newest(root, iteration, state, weights_only=True) is not None

    def check_finite(self, model: nn.Module, iteration: int) -> None:
        """Raise CheckpointError, the same on all ranks, if a weight is not finite on any. Collective.

        `iteration`: after which the model is as it is.
        """
        self.wait()
        self._refuse_non_finite(model_tensors(model), iteration)

    def way_back(self, last_done: int | None = None) -> str:
        """One sentence: which checkpoint is the newest of a finite model. Collective.

        `last_done`: the iteration of the last step that was not skipped; one that was saved there may be spoilt.
        """
        self.wait()
        roots = [Path(root) for root in (self._cfg.save, self._cfg.load) if root is not None]
        found = self._ranks.coordinator(
            "checkpoints could not be listed", lambda: next((pair for root in roots if (pair := newest(root))), [])
        )
        if not found:
            return "there is no checkpoint to go back to"
        (iteration, folder), *older = found
        said = f"the newest checkpoint with finite weights is {folder}, which a plain --load {folder.parent} takes"
        if iteration == last_done and older:
            said += f" (should its steps be skipped as well, --ckpt-step {older[0][0]} loads the one before)"
        return said

    def worked(self) -> None:
        """A step was done with the model of the newest checkpoint: now older ones may go. Local; every rank calls it."""
        if self._fresh is None or (self._thread is not None and self._thread.is_alive()):
            return
        iteration, self._fresh = self._fresh, None
        if self._failure is not None:
            return  # its save failed, so a folder of its name is of an earlier attempt
        if self._ranks.is_coordinator and self._cfg.save is not None:
            self._tidy(Path(self._cfg.save), iteration)

    def _tidy(self, root: Path, iteration: int) -> None:
        try:
            if not folders.iteration_folder(root, iteration).exists():
                return  # loaded from another folder, or its save failed
            removed, problems = folders.tidy(root, iteration, self._cfg.save_retain_interval)
        except OSError as error:  # on this rank alone; and the checkpoint is safe
            self._notify(f"WARNING: older checkpoints in {root} could not be looked at: {error}")
            return
        for path in removed:
            self._notify(f"removed checkpoint {path}")
        for problem in problems:
            self._notify(f"WARNING: an older checkpoint could not be removed: {problem}")

    def _refuse_non_finite(self, tensors: Mapping[str, Tensor], iteration: int) -> None:
        what = "the weights could not be looked at"
        per_rank = self._ranks.collect(what, lambda: not_finite(tensors))
        for rank, names in enumerate(per_rank):
            if names:
                raise CheckpointError(
                    f"the model is not finite after iteration {iteration}: {short_names(set(names))} on rank {rank}. No "
                    f"further step can mend it, so nothing is saved and nothing removed; {self.way_back()}. Resume with a "
                    "lower --lr, a longer warm-up or a smaller --clip-grad"
                )

    def _is_there(self, root: Path, iteration: int) -> bool:
        """Whether a checkpoint of this iteration exists, which is then told."""
        folder = folders.iteration_folder(root, iteration)
        there = self._ranks.coordinator(f"{folder} could not be looked at", lambda: os.path.lexists(folder))
        if there:
            self._notify(f"WARNING: {folder} is kept as it is: the last steps were skipped")
        return there

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
            # Beside one that was read from its .old folder lies a damaged one of the same iteration: nothing may go.
            self._fresh = None if no_more or result.folder.suffix == ".old" else result.iteration
            kind = "weights of checkpoint" if no_more else "checkpoint"
            self._notify(f"loaded {kind} {found.folder} in {time.monotonic() - start:.2f} s")
            return result

    def _write_in_background(self, root: Path, snapshot: Snapshot, start: float, standing: Standing) -> None:
        try:
            if self._device.type == "cuda":  # a new thread starts on GPU 0, and DCP asks for its stream
                torch.cuda.set_device(self._device)
            self._write(root, snapshot, start, standing)
        except CheckpointError as error:
            self._failure = error
        except Exception as error:  # a peer died: torch's own exception, which must not be lost with the thread
            self._failure = CheckpointError(f"asynchronous save of iteration {snapshot.iteration} failed: {error}")

    def _write(self, root: Path, snapshot: Snapshot, start: float, standing: Standing) -> None:
        lock = self._lock
        what = f"checkpoint of iteration {snapshot.iteration} could not be saved in {root}"
        self._ranks.coordinator(what, lambda: lock.confirm() if lock is not None else None)
        folder, manifest = write_checkpoint(root, snapshot, self._ranks, track=standing is not Standing.DOUBTFUL)
        seconds = time.monotonic() - start
        size = f"{manifest.total_bytes / 1e6:.1f} MB"
        self._notify(f"saved checkpoint of iteration {snapshot.iteration} in {folder}: {size} in {seconds:.2f} s")
        if not self._ranks.is_coordinator:
            return
        if standing is Standing.DOUBTFUL:
            self._notify(
                "WARNING: steps are being skipped, so the model may be spoilt: "
                f"{folders.TRACKER} does not name this checkpoint; --ckpt-step {snapshot.iteration} loads it"
            )
        # The checkpoint is safe: no reason to end the training, nor for one of these two to stop the other.
        try:
            if self._log_progress:
                append_progress(root, snapshot, manifest, seconds)
        except OSError as error:
            self._notify(f"WARNING: {root / 'progress.txt'} could not be written: {error}")
        if standing is Standing.SOUND:
            self._tidy(root, snapshot.iteration)

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
