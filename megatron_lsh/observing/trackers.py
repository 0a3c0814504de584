"""Who else is told the figures of a run: TensorBoard, Weights & Biases, and the writers of other packages.

A writer is two methods, called on the rank that reports, with the names that TensorBoard shows. What it raises is told once
and ends nothing: a tracker only observes.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from megatron_lsh.config.logging import LoggingConfig
from megatron_lsh.errors import ConfigError
from megatron_lsh.observing.writers import open_tensorboard

GROUP = "megatron_lsh.writers"
"""entry points of other packages: name -> factory, (RunFacts) -> Writer"""
FINISH_S = 60.0
"""how long the end of a run waits for figures that are still on their way to Weights & Biases"""


class Writer(Protocol):
    """Where figures go, beside the log and the JSON lines."""

    def points(self, iteration: int, values: Mapping[str, float], *, flush: bool = False) -> None:
        """Figures of one iteration, by name; the same iteration may come again with others. `flush`: write them now."""

    def close(self) -> None:
        """The run has ended in order."""


@dataclass(frozen=True)
class RunFacts:
    """What a writer may want to know of a run when it opens."""

    logging: LoggingConfig
    iteration: int = 0
    """iterations already complete; 0 for a fresh run"""
    save: str | None = None
    """--save: a folder that a resumed run finds again"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """every setting, by section, as JSON has it"""
    warn: Callable[[str], None] = print
    trains: bool = True
    """False: it only evaluates, and nothing that the training wrote may go"""


class Steady:
    """A writer whose failures end no run: they are told once."""

    def __init__(self, name: str, writer: Writer, warn: Callable[[str], None]) -> None:
        self._name, self._writer, self._warn, self._told = name, writer, warn, False

    def points(self, iteration: int, values: Mapping[str, float], *, flush: bool = False) -> None:
        self._try(lambda: self._writer.points(iteration, values, flush=flush))

    def close(self) -> None:
        self._try(self._writer.close)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # of somebody else's code, so anything
            if not self._told:
                self._told = True
                self._warn(
                    f"WARNING: {self._name} failed ({_short(error)}): the training goes on, and figures are missing there"
                )


class WandbRun:
    """One run of Weights & Biases, which a resumed training continues.

    Its id is kept in the folder of its files. Steps are iterations: what an earlier attempt wrote beyond the checkpoint
    stays, and a resumed run, which computes the same, writes on behind it.
    """

    def __init__(self, facts: RunFacts) -> None:
        import wandb

        cfg = facts.logging
        folder = Path(cfg.wandb_save_dir or Path(facts.save or ".") / "wandb")
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=cfg.wandb_project,
            entity=cfg.wandb_entity,
            name=cfg.wandb_exp_name,
            dir=str(folder),
            id=_run_id(folder / "run-id.txt", facts.iteration),
            resume="allow",
            config=dict(facts.settings),
            # Its capture of the standard output would stand between the log and whoever reads it.
            settings=wandb.Settings(console="off", finish_timeout=FINISH_S),
        )

    def points(self, iteration: int, values: Mapping[str, float], *, flush: bool = False) -> None:
        self._run.log(dict(values), step=iteration)

    def close(self) -> None:
        self._run.finish()


def _run_id(path: Path, iteration: int) -> str:
    """The id kept in the file if the run goes on, else a new one, which is kept."""
    kept = path.read_text().strip() if iteration > 0 and path.is_file() else ""
    if not kept.isalnum():
        kept = secrets.token_hex(8)
        path.write_text(kept + "\n")
    return kept


def refuse_missing_writers(cfg: LoggingConfig) -> None:
    """Raises ConfigError for a writer whose package is not installed; imports none of them."""
    if cfg.wandb_project is not None and find_spec("wandb") is None:
        raise ConfigError(
            f"--wandb-project ({cfg.wandb_project}) needs the package wandb: pip install 'megatron-lsh[wandb]', or drop it"
        )
    known = _plugins(cfg)
    for name in cfg.metrics_writers:
        if name not in known:
            raise ConfigError(
                f"--metrics-writers ({name}) must be among the entry points {GROUP} of installed packages "
                f"({', '.join(sorted(known)) or 'none is there'}): install the package, or drop the name"
            )


def _plugins(cfg: LoggingConfig) -> dict[str, EntryPoint]:
    """Writers of other packages by name; none where none is asked for: looking reads a file of every installed package."""
    return {point.name: point for point in entry_points(group=GROUP)} if cfg.metrics_writers else {}


def open_writers(facts: RunFacts) -> list[Writer]:
    """All that the settings name. One that cannot be reached is told of, and left out.

    Raises:
        ConfigError: a package is missing, or --tensorboard-dir cannot be written.
    """
    cfg = facts.logging
    refuse_missing_writers(cfg)
    board = open_tensorboard(cfg, facts.iteration if facts.trains else 0, facts.warn)
    writers: list[Writer] = [] if board is None else [board]
    factories: dict[str, Callable[[], Callable[[RunFacts], Writer]]] = {}
    if cfg.wandb_project is not None:
        factories["--wandb-project"] = lambda: WandbRun
    for name, point in _plugins(cfg).items():
        if name in cfg.metrics_writers:
            factories[f"--metrics-writers {name}"] = point.load
    for name, load in factories.items():
        try:
            writers.append(Steady(name, load()(facts), facts.warn))
        except Exception as error:  # no network, a wrong key, ...
            facts.warn(f"WARNING: {name} could not be opened ({_short(error)}): the training goes on without it")
    return writers


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
