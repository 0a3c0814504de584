"""``state.json`` and ``config.json`` of a checkpoint, read back and checked before anybody relies on them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lsh.checkpoint.renames import RENAMED, Renamed, rename_keys, rename_optimizer
from megatron_lsh.config.serialize import is_saved_config
from megatron_lsh.errors import DamagedCheckpoint

STATE = "state.json"
CONFIG = "config.json"


@dataclass(frozen=True)
class SavedState:
    """Content of ``state.json``, with parameters under their present names; see ``TrainingState`` for the parts.

    Attributes:
        schedule: None if it was not saved.
        optimizer: the plain part of its state (`megatron_lsh.checkpoint.tensors.optimizer_tensors`); None if not saved.
        layout: of the run that wrote it.
    """

    progress: dict[str, Any]
    extra: dict[str, Any]
    padded_rows: dict[str, int]
    schedule: dict[str, Any] | None
    optimizer: dict[str, Any] | None
    layout: dict[str, Any]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises DamagedCheckpoint."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise DamagedCheckpoint(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of the run: section -> name -> value. Raises DamagedCheckpoint."""
    config = sections(read_json(folder / CONFIG))
    for name, section in config.items():
        if not isinstance(section, dict):
            raise DamagedCheckpoint(f"{folder / CONFIG}: {name} ({section!r:.40}) must be an object")
    return config


def sections(config: dict[str, Any]) -> dict[str, Any]:
    """Those of a saved configuration; older checkpoints hold nothing else."""
    return config["config"] if is_saved_config(config) else config  # type: ignore[no-any-return]


def read_state(folder: Path, renamed: Renamed = RENAMED) -> SavedState:
    """Raises DamagedCheckpoint."""
    path = folder / STATE
    values = read_json(path)
    for name in ("progress", "extra", "padded_rows", "layout"):
        _require(isinstance(values.get(name), dict), path, name, values.get(name), "an object")
    for name in ("schedule", "optimizer"):
        value = values.setdefault(name, None)
        _require(value is None or isinstance(value, dict), path, name, value, "an object or null")
    iteration = values["progress"].get("iteration")
    _require(type(iteration) is int and iteration >= 0, path, "progress.iteration", iteration, "a number of iterations")
    for name, rows in values["padded_rows"].items():
        _require(type(rows) is int and rows >= 0, path, f"padded_rows of {name}", rows, "a number of rows")
    if values["optimizer"] is not None:
        _check_optimizer(path, values["optimizer"])
        values["optimizer"] = rename_optimizer(values["optimizer"], renamed)
    return SavedState(
        progress=values["progress"],
        extra=values["extra"],
        padded_rows=rename_keys(values["padded_rows"], renamed),
        schedule=values["schedule"],
        optimizer=values["optimizer"],
        layout=values["layout"],
    )


def _check_optimizer(path: Path, saved: dict[str, Any]) -> None:
    groups, scalars = saved.get("groups"), saved.get("scalars")
    fits = isinstance(groups, list) and all(
        isinstance(group, dict)
        and isinstance(group.get("options"), dict)
        and isinstance(group.get("params"), list)
        and all(isinstance(name, str) for name in group["params"])
        for group in groups
    )
    _require(fits, path, "optimizer.groups", groups, "a list of groups with options and names of parameters")
    fits = isinstance(scalars, dict) and all(isinstance(value, dict) for value in scalars.values())
    _require(fits, path, "optimizer.scalars", scalars, "an object of objects")


def _require(fits: bool, path: Path, name: str, value: Any, rule: str) -> None:
    if not fits:
        raise DamagedCheckpoint(f"{path}: {name} ({value!r:.40}) must be {rule}")
