"""Which evaluation was the best, when to stop waiting for a better one, and keeping the weights of the best."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron_lsh.checkpoint import CheckpointManager, SaveLock, Standing, TrainingState
from megatron_lsh.config.checkpoint import CheckpointConfig
from megatron_lsh.parallel.context import ParallelContext

BEST = "best"
"""folder below --save that holds the weights of the best evaluation, as a checkpoint of its own"""


@dataclass
class EarlyStopping:
    """Watches one figure of the validations; larger is better, and the first of equals is the best.

    Every rank has one and sees the same figures, so all decide alike. Its state is saved with every checkpoint.

    Attributes:
        figure: name of the figure.
        patience: evaluations in a row without a better one after which to stop; None never stops.
    """

    figure: str
    patience: int | None = None
    best: dict[str, float] = field(default_factory=dict)
    """figures of the best evaluation"""
    best_iteration: int | None = None
    best_epoch: float | None = None
    waited: int = 0

    def observe(self, iteration: int, figures: Mapping[str, float], epoch: float | None = None) -> bool:
        """Take note of a validation; returns whether it is the best so far. One that is not finite never is."""
        value = figures[self.figure]
        if not all(map(math.isfinite, figures.values())):
            self.waited += 1
            return False
        if self.best_iteration is None or value > self.best[self.figure]:
            self.best, self.best_iteration, self.best_epoch, self.waited = dict(figures), iteration, epoch, 0
            return True
        self.waited += 1
        return False

    @property
    def stopped(self) -> bool:
        """Whether to stop training."""
        return self.patience is not None and self.waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": self.best,
            "best_iteration": self.best_iteration,
            "best_epoch": self.best_epoch,
            "waited": self.waited,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the saved run was; `figure` and `patience` are the command line's."""
        if state["best_iteration"] is not None and self.figure not in state["best"]:
            return  # saved under another metric: does not apply
        self.best, self.best_iteration, self.waited = dict(state["best"]), state["best_iteration"], state["waited"]
        self.best_epoch = state.get("best_epoch")  # a checkpoint of before this was saved has none


class BestWeights:
    """Keeps the weights of the best evaluation in ``SAVE/best``, and nothing else there. All ranks call its methods."""

    def __init__(
        self, cfg: CheckpointConfig, ctx: ParallelContext, timeout: timedelta, lock: SaveLock | None = None
    ) -> None:
        """`cfg` has a --save folder, `lock` is of it. Collective: makes a process group, and tries out the folder."""
        self.folder = Path(str(cfg.save)) / BEST
        self._places = [self.folder] if cfg.load is None else [self.folder, Path(cfg.load) / BEST]
        self._manager = CheckpointManager(
            dataclasses.replace(
                cfg,
                save=str(self.folder),
                load=None,
                save_optim=False,
                save_rng=False,
                async_save=False,
                # Every iteration is a multiple of 1, none but 0 of this: of several checkpoints only the newest stays.
                save_retain_interval=1 << 62,
            ),
            ctx,
            timeout=timeout,
            lock=lock,
        )

    def save(self, state: TrainingState, standing: Standing) -> None:
        """Put these weights in the place of the earlier ones, which stay while steps are being skipped.

        Their validation speaks for them: they are never doubtful."""
        self._manager.save(state, Standing.FRESH if standing is Standing.DOUBTFUL else Standing.SOUND)

    def load(self, state: TrainingState, iteration: int) -> bool:
        """Fill the model with those of this iteration, here or beside --load; False if there are only others, or none."""
        whole = dataclasses.replace(state, fresh=(), renewed=(), unused=(), resized={})  # this run's own: all of it
        return any(self._manager.load_weights(place, iteration, whole) for place in self._places)
