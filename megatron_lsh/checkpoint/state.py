"""What a checkpoint holds (`TrainingState`) and what loading one returns (`LoadResult`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron_lsh.checkpoint.saved import sections

Resize = Callable[[Tensor, torch.Size], Tensor]
"""(a tensor as saved, the shape that is wanted) -> that tensor in this shape"""


class Stateful(Protocol):
    """Anything with a plain, JSON-able state: the learning-rate schedule, for one."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


@dataclass
class TrainingState:
    """Everything needed to continue a run. `CheckpointManager.save` reads it, `CheckpointManager.load` fills it in place.

    Attributes:
        model: parameters and persistent buffers are saved; it may be ``fully_shard``-ed. Plain (non-DTensor) tensors must
            be equal on all ranks: one rank writes each.
        optimizer: its state is saved by parameter name, so it loads whatever the grouping or the layout.
        schedule: ``state_dict()`` must be plain JSON.
        progress: where the run is: ``{"iteration": int, "consumed_samples": int, ...}``. Plain JSON; needs ``iteration``.
        config: all settings, as ``config.to_saved`` gives them or their sections alone, compared when loading.
        rng: this rank's random state: tensors, numbers, strings and containers of them. Saved for each rank.
        extra: further plain JSON, the same on all ranks: LSH seed, fingerprint of the data, ...
        padded_rows: parameter name -> rows that carry meaning, for parameters whose dimension 0 is padded to a multiple
            that depends on the layout (the vocabulary). Only for these may dimension 0 differ when loading.
        files: name in the checkpoint -> content of small files to go along (the tokenizer's). Rank 0 writes them.
        fresh: beginnings of the names of parameters that keep their initial values where a checkpoint that is loaded for
            its weights only lacks them, or has them in another shape: the head of a new task.
        renewed: beginnings of the names of parameters that keep their initial values whatever such a checkpoint has: a head
            for other classes, of which there may be as many.
        unused: beginnings of the names of parameters that such a checkpoint may have in addition: the heads of its task.
        resized: end of the name of a parameter -> what makes it of the one that such a checkpoint has in another shape:
            tables that follow the size of the input.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None = None
    schedule: Stateful | None = None
    progress: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    rng: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    padded_rows: dict[str, int] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    fresh: tuple[str, ...] = ()
    renewed: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    resized: Mapping[str, Resize] = field(default_factory=dict)

    @property
    def iteration(self) -> int:
        return int(self.progress["iteration"])

    @property
    def sections(self) -> dict[str, Any]:
        """Those of `config`, as a checkpoint's are read back."""
        return sections(self.config)


@dataclass(frozen=True)
class LoadResult:
    """What was loaded, for the caller to act on. The model, optimizer and schedule are already filled in.

    Attributes:
        folder: the checkpoint that was loaded; not always the newest (see `notices`).
        iteration: iteration to continue from; 0 when only weights were loaded.
        progress: the saved ``progress``; empty when only weights were loaded.
        config: sections of the saved settings, always.
        extra: as saved, always.
        rng: this rank's saved random state, or None if there is none to restore (not asked for, not saved, or saved by a
            layout that does not have this rank): then seed the generators, from the seed and `iteration`.
        weights_only: True with --finetune and for --pretrained-checkpoint.
        optimizer_loaded: False with --no-load-optim, or if the checkpoint was saved before the first optimizer step.
        same_layout: whether world size, TP, EP, PP and CP are those of the checkpoint, as a bit-equal continuation needs.
        notices: everything unusual, already reported on rank 0.
    """

    folder: Path
    iteration: int
    progress: dict[str, Any]
    config: dict[str, Any]
    extra: dict[str, Any]
    rng: dict[str, Any] | None
    weights_only: bool
    optimizer_loaded: bool
    same_layout: bool
    notices: tuple[str, ...] = ()
