"""Learning rate and weight decay as functions of the samples trained on.

The formulas are Megatron-LM's (its ``OptimizerParamScheduler``), so a command line copied from there gives the same
curve: everything is counted in samples, warm-up is linear, and the value after ``n`` samples is used for the iteration
that starts at sample ``n``. The schedule has a counter of its own: an iteration that is skipped for a non-finite
gradient consumes data but does not move it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch.optim import Optimizer

from megatron_lsh.config.training import OptimizerConfig, TrainingConfig
from megatron_lsh.errors import ConfigError


@dataclass(frozen=True)
class ScheduleShape:
    """Everything that fixes the two curves; all lengths are in samples. Saved with every checkpoint."""

    max_lr: float
    min_lr: float
    warmup_init_lr: float
    warmup_samples: float
    decay_samples: int
    decay_style: str
    wsd_decay_samples: int
    wsd_decay_style: str
    start_weight_decay: float
    end_weight_decay: float
    weight_decay_style: str
    weight_decay_samples: int
    decoupled_lr: float | None = None
    decoupled_min_lr: float | None = None

    def plain(self) -> ScheduleShape:
        """The same curves, with zero for what has no influence on them, so that it cannot differ from a checkpoint's."""
        unused: dict[str, Any] = {}
        if self.decay_style == "constant":
            unused |= {"min_lr": 0.0, "decay_samples": 0}
        if self.decay_style != "WSD":
            unused |= {"wsd_decay_samples": 0, "wsd_decay_style": ""}
        if self.decoupled_lr is None or self.decay_style == "constant":
            unused["decoupled_min_lr"] = None
        if self.weight_decay_style == "constant":
            unused |= {"start_weight_decay": self.end_weight_decay, "weight_decay_samples": 0}
        if self.warmup_samples == 0:
            unused["warmup_init_lr"] = 0.0
        return replace(self, **unused)

    def of_vocabulary(self) -> ScheduleShape:
        """The same for the word embeddings and the output layer."""
        if self.decoupled_lr is None:
            return self
        least = self.min_lr if self.decoupled_min_lr is None else self.decoupled_min_lr
        return replace(self, max_lr=self.decoupled_lr, min_lr=least)

    def learning_rate(self, samples: int) -> float:
        """The learning rate after ``samples`` samples."""
        if self.warmup_samples > 0 and samples <= self.warmup_samples:
            share = samples / self.warmup_samples
            return self.warmup_init_lr + (self.max_lr - self.warmup_init_lr) * share
        if self.decay_style == "constant":
            return self.max_lr
        if samples > self.decay_samples:
            return self.min_lr
        if self.decay_style == "inverse-square-root":
            return max(self.min_lr, self.max_lr * math.sqrt(max(self.warmup_samples, 1) / max(samples, 1)))
        if self.decay_style == "WSD":
            share = self._wsd_share(samples)
        else:
            done = (samples - self.warmup_samples) / (self.decay_samples - self.warmup_samples)
            share = _falling(self.decay_style, done)
        return self.min_lr + share * (self.max_lr - self.min_lr)

    def _wsd_share(self, samples: int) -> float:
        """Warm-up, stable, decay: 1 until the last ``wsd_decay_samples`` samples, which fall to 0."""
        anneal_start = self.decay_samples - self.wsd_decay_samples
        if samples <= anneal_start:
            return 1.0
        return _falling(self.wsd_decay_style, (samples - anneal_start) / self.wsd_decay_samples)

    def weight_decay(self, samples: int) -> float:
        """The weight decay after ``samples`` samples."""
        if self.weight_decay_style == "constant" or samples > self.weight_decay_samples:
            return self.end_weight_decay
        share = samples / self.weight_decay_samples
        if self.weight_decay_style == "cosine":
            share = 0.5 * (math.cos(math.pi * (1.0 - share)) + 1.0)
        return self.start_weight_decay + share * (self.end_weight_decay - self.start_weight_decay)


def _falling(style: str, done: float) -> float:
    """The share of (max - min) that is left when ``done`` (0 to 1) of a decay has passed."""
    if style == "linear":
        return 1.0 - done
    if style == "cosine":
        return 0.5 * (math.cos(math.pi * done) + 1.0)
    if style == "exponential":
        return 2.0 * 0.5**done - 1.0
    if style == "minus_sqrt":
        return 1.0 - math.sqrt(done)
    raise ValueError(f"unknown decay style {style!r}")


def schedule_shape(cfg: OptimizerConfig, training: TrainingConfig) -> ScheduleShape:
    """Translate flags into samples, as Megatron does: iterations count as iterations x global batch size.

    Raises:
        ConfigError: no learning rate, warm-up as long as the decay, or WSD without a decay length.
    """
    if cfg.lr is None:
        raise ConfigError("--lr is missing: training needs a peak learning rate, e.g. --lr 3e-4")
    batch = training.global_batch_size or 1
    if training.train_samples is not None:
        decay = cfg.lr_decay_samples or training.train_samples
        warmup: float = cfg.lr_warmup_samples
        wsd = cfg.lr_wsd_decay_samples
        total = training.train_samples
    else:
        train_iters = training.train_iters or 0
        decay = (cfg.lr_decay_iters or train_iters) * batch
        warmup = cfg.lr_warmup_iters * batch
        wsd = None if cfg.lr_wsd_decay_iters is None else cfg.lr_wsd_decay_iters * batch
        total = train_iters * batch
    if cfg.lr_warmup_fraction is not None:
        warmup = cfg.lr_warmup_fraction * decay
    if warmup > 0 and warmup >= decay:
        raise ConfigError(
            f"learning-rate warm-up ({warmup:g} samples) must be shorter than the decay ({decay} samples): "
            "lower --lr-warmup-iters, --lr-warmup-samples or --lr-warmup-fraction, or raise --lr-decay-iters"
        )
    if cfg.lr_decay_style == "WSD" and not wsd:
        raise ConfigError("--lr-decay-style WSD needs the length of its final decay: give --lr-wsd-decay-iters")
    shape = ScheduleShape(
        max_lr=cfg.lr,
        min_lr=cfg.min_lr,
        warmup_init_lr=cfg.lr_warmup_init,
        warmup_samples=warmup,
        decay_samples=decay,
        decay_style=cfg.lr_decay_style,
        wsd_decay_samples=wsd or 0,
        wsd_decay_style=cfg.lr_wsd_decay_style,
        start_weight_decay=cfg.weight_decay if cfg.start_weight_decay is None else cfg.start_weight_decay,
        end_weight_decay=cfg.weight_decay if cfg.end_weight_decay is None else cfg.end_weight_decay,
        weight_decay_style=cfg.weight_decay_incr_style,
        weight_decay_samples=total,
        decoupled_lr=cfg.decoupled_lr,
        decoupled_min_lr=cfg.decoupled_min_lr,
    )
    return shape.plain()


class Schedule:
    """Sets learning rate and weight decay of an optimizer's groups. A checkpointable (stateful) object.

    A parameter group with ``"decay": False`` keeps weight decay 0.
    """

    def __init__(
        self, optimizer: Optimizer, shape: ScheduleShape, *, override: bool = False, use_checkpoint: bool = False
    ) -> None:
        self.optimizer = optimizer
        self.shape = shape
        self.override = override
        self.use_checkpoint = use_checkpoint
        self.samples = 0
        self.step(0)

    @property
    def learning_rate(self) -> float:
        return self.shape.learning_rate(self.samples)

    @property
    def weight_decay(self) -> float:
        return self.shape.weight_decay(self.samples)

    def step(self, samples: int) -> None:
        """Advance by ``samples`` samples and write the new values into the optimizer's groups."""
        self.samples += samples
        for group in self.optimizer.param_groups:
            shape = self.shape.of_vocabulary() if group.get("vocabulary", False) else self.shape
            group["lr"] = shape.learning_rate(self.samples)
            group["weight_decay"] = self.weight_decay if group.get("decay", True) else 0.0

    def move_to(self, samples: int) -> None:
        """Go on after ``samples`` samples of the curve, as a run without the optimizer's state does (--no-load-optim)."""
        self.samples = samples
        self.step(0)

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples, **asdict(self.shape)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the saved sample.

        A curve that differs from the command line's is an error unless ``--override-opt_param-scheduler`` (the command
        line wins) or ``--use-checkpoint-opt_param-scheduler`` (the checkpoint wins) is given.
        """
        names = [name for name in asdict(self.shape) if name in state or not name.startswith("decoupled")]
        # Checkpoints of before have no decoupled rate, and not zero for everything that has no influence.
        saved = ScheduleShape(**{name: state[name] for name in names}).plain()
        if saved != self.shape and not self.override:
            if not self.use_checkpoint:
                raise ConfigError(_differences(saved, self.shape))
            self.shape = saved
        self.move_to(int(state["samples"]))


def _differences(saved: ScheduleShape, wanted: ScheduleShape) -> str:
    new = asdict(wanted)
    lines = [
        f"{name}: {old} in the checkpoint, {new[name]} here" for name, old in asdict(saved).items() if old != new[name]
    ]
    return (
        f"the learning-rate schedule differs from the checkpoint's ({'; '.join(lines)}; lengths in samples): give "
        "--override-opt_param-scheduler to follow the command line or --use-checkpoint-opt_param-scheduler to follow "
        "the checkpoint"
    )
