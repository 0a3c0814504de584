"""The loss scale of --fp16: as large as gradients in fp16 stand, so that small ones do not vanish.

Megatron-LM's rules and flags (its ``grad_scaler.py``): start high; halve after ``hysteresis`` iterations with an overflow,
which are skipped, but never below the minimum; double after a window of iterations without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_lsh.config.parallel import PrecisionConfig

GROWTH, BACKOFF = 2.0, 0.5


@dataclass
class LossScale:
    """The scale and its counters, the same on every rank.

    Attributes:
        value: what the loss is multiplied by before backward.
        growing: iterations without an overflow since the scale last changed, or since the last overflow.
        patience: overflows that are still taken without halving.
    """

    value: float = 1.0
    minimum: float = 1.0
    window: int = 1000
    hysteresis: int = 2
    fixed: bool = True
    growing: int = 0
    patience: int = 0

    @classmethod
    def of(cls, precision: PrecisionConfig) -> LossScale:
        """As the flags say; without --fp16 always 1."""
        window, hysteresis = int(precision.loss_scale_window), precision.hysteresis
        if not precision.fp16:
            return cls()
        if precision.loss_scale is not None:
            return cls(precision.loss_scale, precision.loss_scale, window, hysteresis)
        start, least = precision.initial_loss_scale, precision.min_loss_scale
        return cls(start, least, window, hysteresis, fixed=False, patience=hysteresis)

    @staticmethod
    def follows(precision: Mapping[str, Any]) -> bool:
        """Whether a run of these saved settings had a scale that follows its gradients, which another can go on with."""
        return bool(precision.get("fp16")) and precision.get("loss_scale") is None

    @property
    def can_fall(self) -> bool:
        """Whether a gradient that is not finite may be due to the scale alone."""
        return not self.fixed and self.value > self.minimum

    def update(self, overflow: bool) -> None:
        """After an iteration: whether a gradient was not finite on any rank."""
        if self.fixed:
            return
        if overflow:
            self.growing = 0
            self.patience -= 1
            if self.patience <= 0:
                self.value = max(self.value * BACKOFF, self.minimum)
            return
        self.growing += 1
        if self.growing == self.window:
            self.growing, self.patience = 0, self.hysteresis
            self.value *= GROWTH

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "growing": self.growing, "patience": self.patience}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as saved; a fixed scale is that of the command line."""
        if not self.fixed:
            self.value, self.growing = float(state["value"]), int(state["growing"])
            self.patience = int(state["patience"])
