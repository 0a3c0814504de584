"""What the loop tells: how an iteration went, and where the run is.

With the model, the optimizer, the schedule and the generators the latter is all that is needed to continue a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class StepResult:
    """What one iteration found; the same on every rank."""

    loss: float
    """lm loss: mean over the loss tokens of the global batch"""
    grad_norm: float
    """global norm before clipping"""
    skipped: bool
    """the loss or a gradient was not finite somewhere, and no rank changed anything"""
    stop: bool
    """some rank asked to stop at this iteration's end"""
    further: Mapping[str, float] = field(default_factory=dict)
    """losses that are minimized beside the lm loss, by name; means as that is"""
    loss_scale: float = 1.0
    """what the loss was multiplied by"""
    overflow: bool = False
    """skipped for gradients alone, which may be finite with the lower loss scale that follows"""


_OF_THE_PROCESS = ("started_at", "skipped_before")


@dataclass
class TrainState:
    """Counters, the same on every rank. The sums of the current log interval let a resumed run write the same log line."""

    iteration: int = 0
    """complete iterations, skipped ones included"""
    consumed_samples: int = 0
    """sequences read from the training data; the data order is a function of it"""
    skipped_iterations: int = 0
    """iterations without an update, over the whole run"""
    consecutive_nan_iterations: int = 0
    interval_loss: float = 0.0
    """sum of the loss over the iterations of the log interval that were not skipped"""
    interval_further: dict[str, float] = field(default_factory=dict)
    """the same of the losses beside it, by name"""
    interval_steps: int = 0
    interval_skipped: int = 0
    scheduled_samples: int = 0
    """sequences of the iterations that were not skipped: where the learning-rate schedule is, even without its own state"""
    evaluation_due: bool = False
    """whether the validation that follows this iteration is yet to be made, because the run was told to stop here"""
    started_at: int = 0
    """the iteration at which this process began, with so many skipped ones before"""
    skipped_before: int = 0

    @property
    def doubtful(self) -> bool:
        """Whether the model may be spoilt: its last step was the last one that could be done."""
        return self.consecutive_nan_iterations > 0

    @property
    def unchanged(self) -> bool:
        """Whether this process has trained, and every step was skipped."""
        done = self.iteration - self.started_at
        return 0 < done == self.skipped_iterations - self.skipped_before

    def start(self) -> None:
        """A process begins here."""
        self.started_at, self.skipped_before = self.iteration, self.skipped_iterations

    def advance(self, result: StepResult, samples: int) -> None:
        """Count one iteration over `samples` sequences."""
        self.iteration += 1
        self.consumed_samples += samples
        if result.skipped:
            self.skipped_iterations += 1
            self.consecutive_nan_iterations += not result.overflow
            self.interval_skipped += 1
        else:
            self.consecutive_nan_iterations = 0
            self.scheduled_samples += samples
            self.interval_loss += result.loss
            for name, loss in result.further.items():
                self.interval_further[name] = self.interval_further.get(name, 0.0) + loss
            self.interval_steps += 1

    def start_interval(self) -> None:
        """Begin a new log interval."""
        self.interval_loss, self.interval_steps, self.interval_skipped = 0.0, 0, 0
        self.interval_further = {}

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name not in _OF_THE_PROCESS}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> TrainState:
        """Unknown entries (of a newer version) are ignored, missing ones start at their default."""
        known = {field.name for field in fields(cls)}
        loaded = cls(**{name: value for name, value in state.items() if name in known})
        if "scheduled_samples" not in state:
            skipped = loaded.skipped_iterations * loaded.consumed_samples // max(loaded.iteration, 1)
            loaded.scheduled_samples = loaded.consumed_samples - skipped
        return loaded
