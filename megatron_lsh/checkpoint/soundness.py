"""Whether a model is worth keeping: finite values only, and steps that are not being skipped."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path

import torch
from torch import Tensor

from megatron_lsh.checkpoint import folders
from megatron_lsh.checkpoint.inspection import inspect_folder
from megatron_lsh.checkpoint.tensors import local_tensors


class Standing(Enum):
    """What a save may do to the checkpoints that are there."""

    SOUND = "sound"
    """this is the one to resume from, and older ones are removed as --save-retain-interval says"""
    FRESH = "fresh"
    """this is the one to resume from, but nothing has shown yet that its model trains on: older ones stay until
    `CheckpointManager.worked`. An update that overflows can leave finite weights, of 1e30, and even finite losses"""
    DOUBTFUL = "doubtful"
    """steps are being skipped: nothing is removed or replaced, and a plain --load goes on taking the one before"""


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors of which this rank holds an infinite value or a NaN. No communication."""
    extremes = {}
    for name, tensor in local_tensors(tensors, copy=False).items():
        if tensor.is_floating_point() and tensor.numel():
            low, high = tensor.aminmax()  # NaN if there is one; needs no memory of the tensor's size, as isfinite does
            extremes[name] = torch.isfinite(low) & torch.isfinite(high)
    return [name for name, finite in extremes.items() if not finite]


def newest(root: Path) -> list[tuple[int, Path]]:
    """(iteration, folder) of what a plain --load of `root` would take and of what it would take without that one.

    At most two, fewer if there are no more that look whole (hashes are not compared). Models that are not finite are never
    saved, and doubtful ones are never tracked. Local.
    """
    tracker = folders.read_tracker(root)
    found: list[tuple[int, Path]] = []
    if tracker is None:
        return found
    for iteration, folder in folders.candidates(root, tracker):
        tracked = tracker.iteration is None or iteration <= tracker.iteration
        if len(found) < 2 and tracked and inspect_folder(folder, iteration, hashes=False).valid:
            found.append((iteration, folder))
    return found
