"""Finding the newest valid checkpoint and reading it into a model, under any layout."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from megatron_lsh.checkpoint import folders
from megatron_lsh.checkpoint.agreement import Ranks, describe
from megatron_lsh.checkpoint.compare import (
    different_function,
    different_optimizer,
    different_settings,
    different_tensors,
    fresh_keys,
    padded_keys,
    resizes,
    short_names,
    started_at_zero,
    summary,
    unused_keys,
    zero_if_absent,
)
from megatron_lsh.checkpoint.manifest import MANIFEST, Manifest, ManifestError, check_file, read_manifest, share
from megatron_lsh.checkpoint.metadata import Reader, incomplete
from megatron_lsh.checkpoint.renames import RENAMED, Renamed
from megatron_lsh.checkpoint.saved import CONFIG, STATE, SavedState, read_config, read_state
from megatron_lsh.checkpoint.soundness import not_finite
from megatron_lsh.checkpoint.state import LoadResult, Resize, TrainingState
from megatron_lsh.checkpoint.tensors import (
    PaddedLoadPlanner,
    allocate_optimizer,
    fill,
    local_tensors,
    model_tensors,
    parameter_names,
    restore_optimizer,
)
from megatron_lsh.checkpoint.writer import rng_file
from megatron_lsh.errors import CheckpointError, DamagedCheckpoint, MegatronLSHError

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Found:
    """A verified checkpoint."""

    folder: Path
    manifest: Manifest


@dataclass(frozen=True)
class LoadOptions:
    """What to restore besides the weights, and whether settings may differ that make another model of the same weights."""

    optimizer: bool
    rng: bool
    weights_only: bool
    new_function: bool
    renamed: Renamed = RENAMED


def find_checkpoint(
    root: Path, step: int | None, ranks: Ranks, notify: Notify, unreadable: Mapping[Path, str] = MappingProxyType({})
) -> Found | None:
    """The checkpoint of iteration `step`, or the newest valid one; verified, the hashing shared among all ranks.

    Collective; all ranks get the same answer. None if there is no checkpoint in `root`. Raises CheckpointError if there
    are some but none is valid, or if `step` is missing or damaged.

    Args:
        unreadable: folders that were found valid before, but could not be read, and why: these are passed over.
    """
    candidates, tracker = ranks.coordinator(f"{root} could not be listed", lambda: _list(root, step))
    if tracker is not None and tracker.problem is not None:
        notify(f"WARNING: {tracker.problem}; looking for the newest valid checkpoint")
    damage: list[str] = []
    if tracker is not None and tracker.iteration is not None and tracker.iteration not in dict(candidates):
        damage.append(f"{root / folders.TRACKER} says iteration {tracker.iteration}, which is not there")
        notify(f"WARNING: {damage[0]}")
    for _, folder in candidates:
        if folder in unreadable:
            manifest, problem = None, unreadable[folder]
        else:
            manifest, problem = ranks.coordinator(f"{folder} could not be read", partial(_read, folder))
        if manifest is not None:
            problem = _verify(folder, manifest, ranks)
            if problem == "":
                _announce(folder, manifest, tracker, damage, candidates, step, notify)
                return Found(folder, manifest)
        damage.append(problem)
        notify(f"WARNING: checkpoint {folder} is not usable: {problem}")
    if step is not None:
        raise CheckpointError(
            f"--ckpt-step {step}: "
            + (summary(damage) if damage else f"{root} has no checkpoint of this iteration")
            + f"; there are iterations {ranks.coordinator('listing', lambda: _iterations(root))}"
        )
    if tracker is not None or damage:
        raise CheckpointError(
            f"{root} has no valid checkpoint: {summary(damage) or folders.TRACKER + ' names none'}. "
            "Point --load elsewhere, or remove this folder to start afresh"
        )
    return None


def _list(root: Path, step: int | None) -> tuple[list[tuple[int, Path]], folders.Tracker | None]:
    if root.exists() and not root.is_dir():
        raise CheckpointError("it is not a folder")
    if (root / MANIFEST).exists():
        raise CheckpointError(f"it is one checkpoint; give the folder above it, {root.parent}, and --ckpt-step")
    if step is not None:
        return [item for item in folders.list_folders(root) if item[0] == step], None
    tracker = folders.read_tracker(root)
    return folders.candidates(root, tracker), tracker


def _iterations(root: Path) -> list[int]:
    return sorted({iteration for iteration, _ in folders.list_folders(root)})


def _read(folder: Path) -> tuple[Manifest | None, str]:
    try:
        return read_manifest(folder), ""
    except ManifestError as error:
        return None, str(error)


def _verify(folder: Path, manifest: Manifest, ranks: Ranks) -> str:
    """What the ranks find wrong, each in its share of the files; empty if nothing. Collective."""

    def check() -> list[str]:
        mine = share(manifest.files, ranks.rank, ranks.size)
        return [problem for entry in mine if (problem := check_file(folder, entry)) is not None]

    per_rank = ranks.collect(f"{folder} could not be verified", check)
    problems = [problem for found in per_rank for problem in found]
    return summary(problems) or ranks.coordinator(
        f"{folder} could not be verified", lambda: incomplete(folder, manifest)
    )


def _announce(
    folder: Path,
    manifest: Manifest,
    tracker: folders.Tracker | None,
    damage: list[str],
    candidates: list[tuple[int, Path]],
    step: int | None,
    notify: Notify,
) -> None:
    if damage:
        notify(f"WARNING: falling back to iteration {manifest.iteration} ({folder}), the newest valid checkpoint")
    newer = sorted({iteration for iteration, _ in candidates if iteration > manifest.iteration})
    if step is None and not damage and newer:
        notify(
            f"WARNING: {folder.parent} also has newer iterations {newer}, but {folders.TRACKER} says "
            f"{manifest.iteration}, which is loaded; --ckpt-step {newer[-1]} loads the newest"
        )
    if step is None and tracker is None:
        notify(f"WARNING: {folder.parent / folders.TRACKER} is missing; loading the newest valid checkpoint, {folder}")


@dataclass
class _Plan:
    """What one rank reads: the tensors to fill, which of them are padded differently, and the JSON parts."""

    reader: Reader
    model: dict[str, Tensor]
    zero: dict[str, Tensor]
    """what the model has and older checkpoints have not, and that starts at zero"""
    optimizer: dict[str, Tensor]
    padded: set[str]
    saved: SavedState
    config: dict[str, Any]
    notices: list[str]
    resized: dict[str, tuple[Tensor, Resize]]
    """what the checkpoint has in another shape: room for it, and what makes the model's tensor of it"""
    heads: str
    """what is said about the heads that were exchanged and the tables that were resized; empty if none was"""


def load_checkpoint(
    found: Found, state: TrainingState, layout: dict[str, Any], options: LoadOptions, ranks: Ranks, notify: Notify
) -> LoadResult:
    """Read a verified checkpoint into `state`, in place. Collective.

    Raises CheckpointError, the same on all ranks; a DamagedCheckpoint if an earlier checkpoint may do.
    """
    what = f"checkpoint {found.folder} could not be loaded"
    elsewhere = _of_other_stages(what, state, layout, ranks)
    plan = ranks.each(what, lambda: _prepare(found, state, options, elsewhere))
    ranks.each(what, lambda: _read_tensors(plan, ranks))
    ranks.each(what, lambda: _restore(found, state, plan, options))
    rng = ranks.each(what, lambda: _read_rng(found, plan.saved.layout, layout, options, ranks.rank))
    absent = ranks.collect(what, lambda: rng is None)
    same_layout = all(plan.saved.layout.get(key, 1) == layout[key] for key in ("world_size", "tp", "ep", "pp", "cp"))
    if not same_layout and not options.weights_only:
        plan.notices.append(
            f"the checkpoint was saved by another layout ({_layout_text(plan.saved.layout)}) than this one "
            f"({_layout_text(layout)}): the run goes on, but not to the last bit as it would have"
        )
    if options.rng and any(absent):
        seeded = [rank for rank, missing in enumerate(absent) if missing]
        plan.notices.append(f"the checkpoint has no random states that fit ranks {seeded}: these are seeded anew")
    for notice in plan.notices:
        notify(f"WARNING: {notice}")
    if plan.heads:
        notify(plan.heads)
    return LoadResult(
        folder=found.folder,
        iteration=0 if options.weights_only else found.manifest.iteration,
        progress={} if options.weights_only else plan.saved.progress,
        config=plan.config,
        extra=plan.saved.extra,
        rng=rng,
        weights_only=options.weights_only,
        optimizer_loaded=bool(plan.optimizer),
        same_layout=same_layout,
        notices=tuple(plan.notices),
    )


def _of_other_stages(what: str, state: TrainingState, layout: dict[str, Any], ranks: Ranks) -> set[str]:
    """Keys of the model's tensors that other pipeline stages have, and this rank has not. Collective if there are any."""
    if layout["pp"] == 1:
        return set()
    own = set(model_tensors(state.model))
    return set().union(*ranks.collect(what, lambda: own)) - own


def _prepare(found: Found, state: TrainingState, options: LoadOptions, elsewhere: set[str]) -> _Plan:
    """Compare the checkpoint with the model before anything is read. No communication."""
    saved, config = read_state(found.folder, options.renamed), read_config(found.folder)
    iteration, listed = saved.progress["iteration"], found.manifest.iteration
    if iteration != listed:
        raise DamagedCheckpoint(f"{STATE} is of iteration {iteration}, and {MANIFEST} of iteration {listed}")
    reader = Reader(found.folder, options.renamed)
    metadata = reader.metadata
    if options.optimizer and state.optimizer is not None and saved.optimizer is None:
        raise CheckpointError("it holds no optimizer state; use --no-load-optim or --finetune to go on without")
    changed = different_optimizer(config, state.sections) if options.optimizer else []
    if options.rng and not found.manifest.has_rng:
        raise CheckpointError("it holds no random states; use --no-load-rng or --finetune to go on without")
    model = model_tensors(state.model)
    optimizer = {}
    if options.optimizer and state.optimizer is not None:
        optimizer = allocate_optimizer(state.optimizer, parameter_names(state.model), metadata)
    fresh, unused, resized = set[str](), set[str](), dict[str, tuple[Tensor, Resize]]()
    if options.new_function:
        fresh = fresh_keys(metadata, model, state.fresh, state.renewed)
        unused = unused_keys(metadata, model, state.unused) - elsewhere
        resized = resizes(metadata, model, state.resized)
    zero = zero_if_absent(metadata.state_dict_metadata, model) - fresh
    read = {key: tensor for key, tensor in model.items() if key not in fresh | zero}
    there = read | optimizer | {key: room for key, (room, _) in resized.items()}
    padded = padded_keys(metadata, there, state.padded_rows, saved.padded_rows)
    ignored = fresh | unused | elsewhere
    notices = _compare(metadata, there, padded, ignored, saved, config, state, options) + changed
    if zero:
        notices.append(started_at_zero(zero))
    zeros = {key: model[key] for key in zero}
    heads = _heads(fresh, set(metadata.state_dict_metadata), unused, set(resized))
    return _Plan(reader, read, zeros, optimizer, padded, saved, config, notices, resized, heads)


def _heads(fresh: set[str], stored: set[str], unused: set[str], resized: set[str]) -> str:
    absent, others = fresh - stored, fresh & stored
    parts = [f"not in the checkpoint, so they start afresh: {short_names(absent)}"] if absent else []
    parts += [f"for other classes in the checkpoint, so they start afresh: {short_names(others)}"] if others else []
    parts += [f"in the checkpoint only, and not used: {short_names(unused)}"] if unused else []
    parts += [f"of another size in the checkpoint, and resized: {short_names(resized)}"] if resized else []
    return ". ".join(parts)


def _compare(
    metadata: Metadata,
    tensors: dict[str, Tensor],
    padded: set[str],
    ignored: set[str],
    saved: SavedState,
    config: dict[str, Any],
    state: TrainingState,
    options: LoadOptions,
) -> list[str]:
    """Raise CheckpointError if the checkpoint is of another model. Returns notices about smaller differences."""
    settings = different_settings(config, state.sections)
    rows = [
        f"{name} has {old} meaningful rows (vocabulary) in the checkpoint and {state.padded_rows[name]} now"
        for name, old in saved.padded_rows.items()
        if state.padded_rows.get(name, old) != old
    ]
    problems = different_tensors(metadata, tensors, padded, ignored)
    forbidden = [] if options.new_function else different_function(config, state.sections)
    if problems or rows or forbidden:
        details = summary(forbidden or settings), summary(rows), summary(problems)
        raise CheckpointError(
            "it is of another model: "
            + "; ".join(text for text in details if text)
            + f". Use the settings of its {CONFIG}, or another folder"
        )
    notices = list(settings)
    if padded:
        notices.append(f"padding rows differ (the vocabulary is padded for the layout): {summary(sorted(padded))}")
    return notices


def _read_tensors(plan: _Plan, ranks: Ranks) -> None:
    with warnings.catch_warnings():
        if ranks.group is None:  # DCP warns that there is no process group, which is the point of an offline context
            warnings.simplefilter("ignore")
        try:
            dcp.load(
                {**plan.model, **plan.optimizer, **{key: room for key, (room, _) in plan.resized.items()}},
                storage_reader=plan.reader,
                planner=PaddedLoadPlanner(plan.padded),
                process_group=ranks.group,
                no_dist=ranks.group is None,
            )
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except (Exception, CheckpointException) as error:
            raise DamagedCheckpoint(f"its tensors cannot be read: {describe(error, ranks.rank)}") from error
    for tensor in local_tensors(plan.zero, copy=False).values():
        tensor.zero_()
    for key, (saved, resize) in plan.resized.items():
        fill(plan.model[key], resize(saved, plan.model[key].shape))
    if bad := not_finite(plan.model | plan.optimizer):  # saved before such a model was refused
        raise DamagedCheckpoint(f"its model is not finite: {short_names(set(bad))}")


def _restore(found: Found, state: TrainingState, plan: _Plan, options: LoadOptions) -> None:
    """Hand the optimizer and the schedule what was read. Weights are already in place."""
    if not options.optimizer:
        return
    saved, path = plan.saved, found.folder / STATE
    if state.optimizer is not None and saved.optimizer is not None:
        names = parameter_names(state.model)
        with _taken_from(f"{path}: optimizer"):
            plan.notices += restore_optimizer(state.optimizer, names, plan.optimizer, saved.optimizer)
    if state.schedule is not None and saved.schedule is not None:
        with _taken_from(f"{path}: schedule"):
            state.schedule.load_state_dict(saved.schedule)


@contextmanager
def _taken_from(place: str) -> Iterator[None]:
    """What a saved value makes go wrong here is damage, unless our own error says otherwise."""
    try:
        yield
    except MegatronLSHError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise DamagedCheckpoint(f"{place} cannot be taken over: {type(error).__name__}: {error}") from error


def _read_rng(
    found: Found, saved: dict[str, Any], layout: dict[str, Any], options: LoadOptions, rank: int
) -> dict[str, Any] | None:
    """This rank's random state; None if the checkpoint has none that fits.

    Which ranks draw together depends on TP, sequence parallelism, PP and CP, so the states are of use only where these are
    unchanged.
    """
    path = found.folder / rng_file(rank)
    fits = all(saved.get(key, 1) == layout[key] for key in ("tp", "sequence_parallel", "pp", "cp"))
    if not options.rng or not fits or path.name not in {entry.name for entry in found.manifest.files}:
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for what is not one of its files
        raise DamagedCheckpoint(f"{path} cannot be read: {type(error).__name__}: {error}") from None
    if not isinstance(state, dict):
        raise DamagedCheckpoint(f"{path} must hold a table of random states, not a {type(state).__name__}")
    return state


def _layout_text(layout: dict[str, Any]) -> str:
    sizes = {key: layout.get(key, 1) for key in ("world_size", "tp", "ep", "dp", "pp", "cp")}
    return ", ".join(f"{key}={size}" for key, size in sizes.items() if size != 1 or key not in ("pp", "cp"))
