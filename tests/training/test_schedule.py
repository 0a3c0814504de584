from __future__ import annotations

import math

import pytest
import torch

from megatron_lsh.config import OptimizerConfig, TrainingConfig
from megatron_lsh.errors import ConfigError
from megatron_lsh.training.schedule import Schedule, ScheduleShape, schedule_shape


def shape(style: str = "linear", **settings: object) -> ScheduleShape:
    """100 iterations of 10 samples, the first 10 iterations warm up to 1.0, down to 0.1."""
    cfg = OptimizerConfig(lr=1.0, min_lr=0.1, lr_decay_style=style, lr_warmup_iters=10)
    for name, value in settings.items():
        setattr(cfg, name, value)
    return schedule_shape(cfg, TrainingConfig(train_iters=100, global_batch_size=10))


@pytest.mark.parametrize(
    ("style", "iteration", "expected"),
    [
        ("linear", 0, 0.0),
        ("linear", 5, 0.5),
        ("linear", 10, 1.0),
        ("linear", 55, 0.55),  # half of the decay: 0.1 + 0.9 / 2
        ("linear", 100, 0.1),
        ("linear", 101, 0.1),
        ("constant", 5, 0.5),
        ("constant", 1000, 1.0),
        ("cosine", 55, 0.55),
        ("cosine", 32.5, 0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5))),  # a quarter of the decay
        ("cosine", 100, 0.1),
        ("inverse-square-root", 40, 0.5),  # sqrt(10 / 40)
        ("inverse-square-root", 90, 1 / 3),
        ("inverse-square-root", 101, 0.1),
    ],
)
def test_learning_rate(style: str, iteration: float, expected: float) -> None:
    assert shape(style).learning_rate(round(iteration * 10)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("style", "half"),
    [
        ("linear", 0.55),
        ("cosine", 0.55),
        ("exponential", 0.1 + 0.9 * (math.sqrt(2) - 1)),
        ("minus_sqrt", 0.1 + 0.9 * (1 - math.sqrt(0.5))),
    ],
)
def test_wsd_is_flat_until_the_last_stretch(style: str, half: float) -> None:
    wsd = shape("WSD", lr_wsd_decay_iters=20, lr_wsd_decay_style=style)
    assert [wsd.learning_rate(n) for n in (50, 110, 800)] == [0.5, 1.0, 1.0]
    assert wsd.learning_rate(900) == pytest.approx(half, rel=1e-12)
    assert wsd.learning_rate(1000) == pytest.approx(0.1, rel=1e-12)


def test_warmup_from_a_floor_by_fraction_and_by_samples() -> None:
    assert shape(lr_warmup_init=0.2).learning_rate(50) == pytest.approx(0.6)
    by_fraction = shape(lr_warmup_iters=0, lr_warmup_fraction=0.05)
    assert by_fraction.warmup_samples == 50.0
    assert by_fraction.learning_rate(25) == 0.5
    cfg = OptimizerConfig(lr=1.0, lr_warmup_samples=30, lr_decay_style="linear")
    by_samples = schedule_shape(cfg, TrainingConfig(train_samples=130, train_iters=13, global_batch_size=10))
    assert by_samples.decay_samples == 130
    assert [by_samples.learning_rate(n) for n in (15, 30, 80, 130)] == [0.5, 1.0, 0.5, 0.0]


def test_weight_decay_moves_from_start_to_end() -> None:
    linear = shape(start_weight_decay=0.0, end_weight_decay=0.4, weight_decay_incr_style="linear")
    assert [linear.weight_decay(n) for n in (0, 250, 1000, 1001)] == pytest.approx([0.0, 0.1, 0.4, 0.4])
    cosine = shape(start_weight_decay=0.0, end_weight_decay=0.4, weight_decay_incr_style="cosine")
    assert [cosine.weight_decay(n) for n in (0, 500, 1000)] == pytest.approx([0.0, 0.2, 0.4])
    assert shape(weight_decay=0.03).weight_decay(7) == 0.03


def make(shape_: ScheduleShape, **kwargs: bool) -> Schedule:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    groups = [{"params": [parameters[0]], "decay": True}, {"params": [parameters[1]], "decay": False}]
    return Schedule(torch.optim.SGD(groups, lr=9.0), shape_, **kwargs)


def test_schedule_writes_into_the_groups() -> None:
    schedule = make(shape(weight_decay=0.03))
    schedule.step(50)
    decayed, plain = schedule.optimizer.param_groups
    assert (decayed["lr"], decayed["weight_decay"]) == (0.5, 0.03)
    assert (plain["lr"], plain["weight_decay"]) == (0.5, 0.0)


def test_resume_follows_the_saved_curve_or_says_why_not() -> None:
    saved = make(shape())
    saved.step(550)
    state = saved.state_dict()
    resumed = make(shape())
    resumed.load_state_dict(state)
    assert (resumed.samples, resumed.learning_rate) == (550, saved.learning_rate)
    assert resumed.optimizer.param_groups[0]["lr"] == saved.learning_rate

    with pytest.raises(ConfigError, match=r"min_lr: 0.1 in the checkpoint, 0.3 here.*--override-opt_param-scheduler"):
        make(shape(min_lr=0.3)).load_state_dict(state)
    override = make(shape(min_lr=0.3), override=True)
    override.load_state_dict(state)
    assert override.learning_rate == pytest.approx(0.65)
    use_checkpoint = make(shape(min_lr=0.3), use_checkpoint=True)
    use_checkpoint.load_state_dict(state)
    assert use_checkpoint.learning_rate == pytest.approx(0.55)


def test_what_has_no_influence_may_differ_from_the_checkpoint() -> None:
    wsd = {"lr_wsd_decay_iters": 30, "lr_wsd_decay_style": "cosine"}
    for style, unused in (("cosine", wsd), ("constant", {"min_lr": 0.5, "lr_decay_iters": 77, **wsd})):
        saved = make(shape(style)).state_dict()
        make(shape(style, **unused)).load_state_dict(saved)
        make(shape(style, **unused)).load_state_dict(
            saved | {"wsd_decay_style": "exponential"}
        )  # as older ones have it
    with pytest.raises(ConfigError, match="wsd_decay_samples"):
        make(shape("WSD", lr_wsd_decay_iters=30)).load_state_dict(
            make(shape("WSD", lr_wsd_decay_iters=20)).state_dict()
        )


def test_impossible_schedules_are_refused() -> None:
    with pytest.raises(ConfigError, match="--lr is missing"):
        shape(lr=None)
    with pytest.raises(ConfigError, match="warm-up"):
        shape(lr_warmup_iters=100)
    with pytest.raises(ConfigError, match="--lr-wsd-decay-iters"):
        shape("WSD")
