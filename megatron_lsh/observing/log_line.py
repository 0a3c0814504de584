"""The lines that Megatron-LM users' scripts parse: one per log interval, one per evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime


@dataclass(frozen=True)
class LogLine:
    """The figures of one log interval; losses are means over its iterations that were not skipped."""

    iteration: int
    train_iters: int
    consumed_samples: int
    iteration_time_ms: float
    learning_rate: float
    global_batch_size: int
    losses: Mapping[str, float] = field(default_factory=dict)
    grad_norm: float | None = None
    params_norm: float | None = None
    skipped: int = 0
    nan: int = 0
    loss_scale: float = 1.0
    tflops: float | None = None
    time: datetime = field(default_factory=datetime.now)

    def __str__(self) -> str:
        fields = [
            f" [{self.time:%Y-%m-%d %H:%M:%S}] iteration {self.iteration:8d}/{self.train_iters:8d}",
            f"consumed samples: {self.consumed_samples:12d}",
            f"elapsed time per iteration (ms): {self.iteration_time_ms:.1f}",
        ]
        if self.tflops is not None:
            fields.append(f"throughput per GPU (TFLOP/s/GPU): {self.tflops:.1f}")
        fields.append(f"learning rate: {self.learning_rate:.6E}")
        fields.append(f"global batch size: {self.global_batch_size:5d}")
        # Like Megatron, a loss that is zero (absent) has no field.
        fields += [f"{name}: {value:.6E}" for name, value in self.losses.items() if value > 0.0]
        fields.append(f"loss scale: {self.loss_scale:.1f}")
        if self.grad_norm is not None:
            fields.append(f"grad norm: {self.grad_norm:.3f}")
        if self.params_norm is not None:
            fields.append(f"params norm: {self.params_norm:.3f}")
        fields.append(f"number of skipped iterations: {self.skipped:3d}")
        fields.append(f"number of nan iterations: {self.nan:3d} |")
        return " | ".join(fields)


def perplexity(loss: float) -> float:
    """exp(loss), capped at exp(20) as Megatron does."""
    return math.exp(min(20.0, loss))


def figures_text(figures: Mapping[str, float]) -> str:
    """``loss: 4.123456E-01 | accuracy: 0.8812 | macro f1: 0.8790``"""
    return " | ".join(
        f"{name.replace('_', ' ')}: {value:.6E}" if name == "loss" else f"{name.replace('_', ' ')}: {value:.4f}"
        for name, value in figures.items()
    )


def accuracy_line(name: str, figures: Mapping[str, float]) -> str | None:
    """``validation top-1: 97.3%, top-5: 99.9%`` of shares of 1; None where there are none."""
    tops = [(top, figures[f"top{top}"]) for top in (1, 5) if f"top{top}" in figures]
    return f"{name} " + ", ".join(f"top-{top}: {share:.1%}" for top, share in tops) if tops else None


def evaluation_line(where: str, loss: float) -> str:
    """Megatron's three lines for an evaluation; ``where`` is such as ``iteration 100 on validation set``."""
    text = f" validation loss at {where} | lm loss value: {loss:.6E} | lm loss PPL: {perplexity(loss):.6E} | "
    rule = "-" * (len(text) + 1)
    return f"{rule}\n{text}\n{rule}"
