"""Writing one checkpoint: every rank its shards and hashes, rank 0 the rest, the manifest last."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

import megatron_lsh
from megatron_lsh.checkpoint import folders
from megatron_lsh.checkpoint.agreement import Ranks
from megatron_lsh.checkpoint.manifest import FileEntry, Manifest, hash_file, sync_folder, write_manifest
from megatron_lsh.checkpoint.metadata import METADATA, incomplete
from megatron_lsh.checkpoint.saved import CONFIG, STATE
from megatron_lsh.checkpoint.state import TrainingState
from megatron_lsh.checkpoint.tensors import (
    SnapshotPlanner,
    local_tensors,
    model_tensors,
    optimizer_tensors,
    parameter_names,
)
from megatron_lsh.errors import CheckpointError


@dataclass
class Snapshot:
    """Everything one save writes, detached from the running training if `copied`.

    Attributes:
        tensors: the live tensors, of which only shapes and placements are read.
        local: this rank's shard of each, the values to write.
        rng: this rank's random state, serialised.
        state, config: content of state.json and config.json.
        files: further files, name -> content.
    """

    iteration: int
    tensors: dict[str, Tensor]
    local: dict[str, Tensor]
    rng: bytes | None
    state: bytes
    config: bytes
    layout: dict[str, Any]
    has_optimizer: bool
    files: Mapping[str, bytes]


def rng_file(rank: int) -> str:
    return f"rng_{rank:05d}.pt"


def take_snapshot(
    state: TrainingState, layout: dict[str, Any], *, save_optim: bool, save_rng: bool, copy: bool
) -> Snapshot:
    """Collect what is to be written. No communication. Raises for state that cannot be saved."""
    tensors = model_tensors(state.model)
    common: dict[str, Any] = {
        "progress": state.progress,
        "extra": state.extra,
        "padded_rows": state.padded_rows,
        "schedule": None,
        "optimizer": None,
        "layout": layout,
    }
    if save_optim and state.optimizer is not None:
        moments, common["optimizer"] = optimizer_tensors(state.optimizer, parameter_names(state.model))
        tensors.update(moments)
    if save_optim and state.schedule is not None:
        common["schedule"] = state.schedule.state_dict()
    return Snapshot(
        iteration=state.iteration,
        tensors=tensors,
        local=local_tensors(tensors, copy),
        rng=_serialise_rng(state.rng) if save_rng and state.rng is not None else None,
        state=_to_json(common, "progress, extra and the schedule's state"),
        config=_to_json(state.config, "config"),
        layout=layout,
        has_optimizer=common["optimizer"] is not None,
        files=state.files,
    )


def _to_json(value: Any, what: str) -> bytes:
    try:
        return (json.dumps(value, indent=1) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{what} must consist of numbers, strings, lists and dicts: {error}") from None


def _serialise_rng(rng: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(rng, buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=True)  # what cannot be loaded safely must fail now, not at the resume
    return buffer.getvalue()


def write_checkpoint(root: Path, snapshot: Snapshot, ranks: Ranks, track: bool = True) -> tuple[Path, Manifest]:
    """Write `snapshot` to ``ROOT/iter_N`` and, with `track`, move the tracker file. Collective. Returns folder and manifest.

    Raises the same CheckpointError on all ranks; then nothing of this checkpoint is left behind, and earlier ones and
    the tracker file are as before.
    """
    what = f"checkpoint of iteration {snapshot.iteration} could not be saved in {root}"
    try:
        snapshot = _with_other_stages(what, snapshot, ranks)
        folder = ranks.coordinator(what, lambda: _start(root, snapshot.iteration))
        ranks.each(what, lambda: _write_tensors(folder, snapshot, ranks))
        entries = ranks.collect(what, lambda: _write_own_files(folder, snapshot, ranks))
        files = [entry for per_rank in entries for entry in per_rank]
        return ranks.coordinator(what, lambda: _finish(root, folder, snapshot, files, track))
    except CheckpointError as error:
        raise CheckpointError(_clean_up(root, snapshot.iteration, ranks, str(error))) from None


def _with_other_stages(what: str, snapshot: Snapshot, ranks: Ranks) -> Snapshot:
    """The snapshot with what all pipeline stages say in state.json: each knows its own parameters only. Collective if there
    are several."""
    stages, world = snapshot.layout["pp"], snapshot.layout["world_size"]
    if stages == 1:
        return snapshot
    speaks = ranks.rank % (world // stages) == 0
    first, *others = [
        json.loads(part) for part in ranks.collect(what, lambda: snapshot.state if speaks else None) if part is not None
    ]
    for part in others:
        first["padded_rows"] |= part["padded_rows"]
        for name, value in part["extra"].items():
            if isinstance(value, dict):
                first["extra"][name] = {**(first["extra"][name] or {}), **value}
        if first["optimizer"] is not None:
            first["optimizer"]["groups"] += part["optimizer"]["groups"]
            first["optimizer"]["scalars"] |= part["optimizer"]["scalars"]
    return replace(snapshot, state=_to_json(first, "the state of the stages"))


def _start(root: Path, iteration: int) -> Path:
    folders.remove_leftovers(
        root
    )  # what cannot be removed is in nobody's way but in that of a save of the same iteration
    return folders.start_folder(root, iteration)


def _write_tensors(folder: Path, snapshot: Snapshot, ranks: Ranks) -> None:
    with warnings.catch_warnings():
        if ranks.group is None:  # DCP warns that there is no process group, which is the point of an offline context
            warnings.simplefilter("ignore")
        dcp.save(
            dict(snapshot.tensors),
            storage_writer=dcp.FileSystemWriter(folder, sync_files=True),
            planner=SnapshotPlanner(snapshot.local),
            process_group=ranks.group,
            no_dist=ranks.group is None,
        )


def _write_own_files(folder: Path, snapshot: Snapshot, ranks: Ranks) -> list[FileEntry]:
    """Write this rank's remaining files and hash all that this rank wrote."""
    files: dict[str, bytes] = {}
    if snapshot.rng is not None:
        files[rng_file(ranks.rank)] = snapshot.rng
    if ranks.is_coordinator:
        files[STATE] = snapshot.state
        files[CONFIG] = snapshot.config
        files |= snapshot.files
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        with open(folder / name, "xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    mine = sorted(path for path in folder.iterdir() if path.name.startswith(f"__{ranks.rank}_"))
    if ranks.is_coordinator:
        mine.append(folder / METADATA)
    for subfolder in {(folder / name).parent for name in files} - {folder}:
        sync_folder(subfolder)
    return [hash_file(path, folder) for path in mine + [folder / name for name in files]]


def _finish(root: Path, folder: Path, snapshot: Snapshot, files: list[FileEntry], track: bool) -> tuple[Path, Manifest]:
    for entry in files:
        if not (folder / entry.name).exists():
            raise CheckpointError(
                f"{folder / entry.name} was written by another rank but rank 0 does not see it: "
                "--save must be a folder that all nodes share"
            )
    manifest = Manifest(
        iteration=snapshot.iteration,
        files=tuple(sorted(files, key=lambda entry: entry.name)),
        layout=snapshot.layout,
        config_sha256=hashlib.sha256(snapshot.config).hexdigest(),
        torch_version=str(torch.__version__),
        package_version=megatron_lsh.__version__,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        has_optimizer=snapshot.has_optimizer,
        has_rng=snapshot.rng is not None,
    )
    if missing := incomplete(folder, manifest):
        raise CheckpointError(f"{missing}: something else removes files from --save while they are written")
    sync_folder(folder)  # all files have names that survive a crash before the manifest vouches for them
    write_manifest(folder, manifest)
    return folders.commit(root, snapshot.iteration, track), manifest


def _clean_up(root: Path, iteration: int, ranks: Ranks, message: str) -> str:
    """Remove the partial folder. Returns the message with what the user should know."""

    def remove() -> str:
        partial = folders.incomplete_folder(root, iteration)
        free = _free_bytes(root)  # before the removal: that is what made the save fail
        try:
            folders.remove(partial)
        except OSError as error:
            return f"; its partial folder {partial} could not be removed: {error}"
        tracker = folders.read_tracker(root)
        kept = ""
        if tracker is not None and tracker.iteration is not None:
            kept = f"the last good checkpoint is still iteration {tracker.iteration}"
        hint = f"{free / 2**20:.1f} MiB are free in the save folder" if free is not None else ""
        return "".join(f"; {part}" for part in (hint, kept) if part)

    try:
        return message + ranks.coordinator("clean-up after a failed save", remove)
    except CheckpointError as error:
        return f"{message}; {error}"


def _free_bytes(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def append_progress(root: Path, snapshot: Snapshot, manifest: Manifest, seconds: float) -> None:
    """One line of SAVE/progress.txt (--log-progress), with Megatron's fields. Raises OSError."""
    job = os.environ.get("SLURM_JOB_ID", "")
    samples = json.loads(snapshot.state)["progress"].get("consumed_samples", "")
    fields = (
        time.strftime("%Y-%m-%d %H:%M:%S"),
        f"Job ID: {job}",
        f"# GPUs: {snapshot.layout['world_size']}",
        "Saved checkpoint",
        f"Iteration: {snapshot.iteration}",
        f"Samples: {samples}",
        f"Size: {manifest.total_bytes} bytes",
        f"Time: {seconds:.2f} s",
    )
    with open(root / "progress.txt", "a") as stream:
        stream.write("\t".join(fields) + "\n")


def layout_of(context: Any) -> dict[str, Any]:
    """The part of a ParallelContext that decides whether another run is cut the same way. Plain JSON."""
    return asdict(context.layout) | {
        "dp": context.layout.dp,
        "edp": context.layout.edp,
        "sequence_parallel": context.sequence_parallel,
        "shard_optimizer": context.shard_optimizer,
    }
