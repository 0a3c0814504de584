"""The loss scale of --fp16: Megatron-LM's rules, and runs that follow them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lsh.config import PrecisionConfig, validate
from megatron_lsh.config.training import OptimizerConfig
from megatron_lsh.errors import ConfigError
from megatron_lsh.families import GPT
from megatron_lsh.observing.writers import read_jsonl
from megatron_lsh.training.loss_scale import LossScale
from megatron_lsh.training.optimizer import build_optimizer
from megatron_lsh.training.schedule import Schedule, schedule_shape
from megatron_lsh.training.train import train
from tests.models.model_helpers import make_config, make_gpt
from tests.training.helpers import tiny_config


def scales(precision: PrecisionConfig, overflows: str) -> list[float]:
    """The scale after each iteration; ``!`` is one with an overflow, ``.`` one without."""
    scale, found = LossScale.of(precision), []
    for letter in overflows:
        scale.update(letter == "!")
        found.append(scale.value)
    return found


def test_rules_of_megatron() -> None:
    """The values of megatron-core's DynamicGradScaler with the same settings, by hand from its rules."""
    given = {"initial_loss_scale": 64.0, "min_loss_scale": 8.0, "loss_scale_window": 3, "hysteresis": 2}
    fp16 = PrecisionConfig(fp16=True, **given)  # type: ignore[arg-type]
    # Two overflows halve; further ones halve each, down to the minimum.
    assert scales(fp16, "!!!!!!") == [64, 32, 16, 8, 8, 8]
    # Iterations without one do not forgive, only a whole window does; an overflow starts the window anew.
    assert scales(fp16, "!..!...!!") == [64, 64, 64, 32, 32, 32, 64, 64, 32]
    assert scales(fp16, "......") == [64, 64, 128, 128, 128, 256]
    assert scales(PrecisionConfig(fp16=True, loss_scale=8.0), "!!..") == [8.0] * 4
    assert scales(PrecisionConfig(), "!!..") == scales(PrecisionConfig(bf16=True), "!!..") == [1.0] * 4


def test_state_goes_on(tmp_path: Path) -> None:
    fp16 = PrecisionConfig(fp16=True, initial_loss_scale=64.0, loss_scale_window=3)
    first, second = LossScale.of(fp16), LossScale.of(fp16)
    for overflow in (False, True, False, False):
        first.update(overflow)
    second.load_state_dict(first.state_dict())
    for overflow in (False, True, True):
        first.update(overflow)
        second.update(overflow)
    assert first == second and first.value == 64.0


def test_a_run_that_goes_on_in_fp16_starts_with_its_own_scale(tmp_path: Path) -> None:
    """A checkpoint of bf16, or of a fixed scale, has none that followed its gradients."""
    base = f"--save {tmp_path}/r --load {tmp_path}/r --metrics-jsonl {tmp_path}/m.jsonl --lr-decay-style constant "
    for iteration, words in ((1, "--bf16"), (2, "--fp16 --loss-scale 8"), (3, "--fp16 --initial-loss-scale 64")):
        train(tiny_config(f"{base} --train-iters {iteration} --log-interval 1 {words}"), GPT)
    train(tiny_config(f"{base} --train-iters 4 --log-interval 1 --fp16 --initial-loss-scale 2"), GPT)
    assert [r["loss_scale"] for r in read_jsonl(tmp_path / "m.jsonl") if "loss_scale" in r] == [1, 8, 64, 64]


def test_a_run_in_fp16(tmp_path: Path) -> None:
    """Overflows are skipped, lower the scale and do not count as lost; the losses are near those of fp32; a resumed run
    goes on with the scale, and is the run in one piece."""
    fp16 = (
        "--fp16 --initial-loss-scale 16777216 --hysteresis 1 --loss-scale-window 3 --max-consecutive-nan-iterations 1"
    )
    common = "--eval-iters 0 --global-batch-size 2"

    def records(name: str, flags: str) -> list[dict[str, float]]:
        metrics = tmp_path / f"{name}.jsonl"
        train(tiny_config(f"{common} --metrics-jsonl {metrics} {flags}"), GPT)
        return [{key: record[key] for key in ("lm_loss", "loss_scale", "grad_norm")} for record in read_jsonl(metrics)]

    found = records("whole", f"{fp16} --train-iters 14")
    scale = [record["loss_scale"] for record in found]
    skipped = [record["lm_loss"] is None for record in found]
    assert scale[0] == 2**24 and 2 <= sum(skipped) <= 12 and not skipped[-1]
    for number in range(1, len(scale)):
        assert scale[number] in (
            [scale[number - 1] / 2] if skipped[number - 1] else [scale[number - 1], 2 * scale[number - 1]]
        )
    save = f"{fp16} --save {tmp_path}/c --load {tmp_path}/c"
    records("pieces", f"{save} --train-iters 14 --exit-interval 9")
    assert records("pieces", f"{save} --train-iters 14") == found

    steps = "--train-iters 3"
    expected = records("fp32", steps)
    for record, other in zip(records("fixed", f"--fp16 --loss-scale 1024 {steps}"), expected, strict=True):
        assert record["loss_scale"] == 1024.0 and other["loss_scale"] == 1.0
        assert record["lm_loss"] == pytest.approx(other["lm_loss"], rel=2e-3)
        assert record["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-2), (
            "gradients are unscaled before clipping"
        )


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"precision.fp16 .* and precision.bf16 .* must not both be on"):
        tiny_config("--fp16 --bf16")
    with pytest.raises(
        ConfigError, match=r"min_loss_scale \(4.0\) must be at most precision.initial_loss_scale \(2.0\)"
    ):
        tiny_config("--fp16 --min-loss-scale 4 --initial-loss-scale 2")
    with pytest.raises(ConfigError, match=r"decoupled_min_lr .* must not be given: set --decoupled-lr"):
        tiny_config("--decoupled-min-lr 1e-4")


def test_the_vocabulary_has_a_learning_rate_of_its_own() -> None:
    """--decoupled-lr holds for word embeddings and output layer, on a curve of the same shape."""
    cfg = tiny_config("--decoupled-lr 1e-2 --decoupled-min-lr 5e-3 --min-lr 1e-4 --lr-decay-style linear")
    model = make_gpt(make_config(position_embedding_type="learned_absolute", untie_embeddings_and_output_weights=True))
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, cfg.optimizer)
    schedule = Schedule(optimizer, schedule_shape(cfg.optimizer, cfg.training))

    def rates() -> dict[str, float]:
        return {named[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}

    own = {"embedding.word_embeddings.weight", "output_layer.weight"}
    assert rates() == {name: 1e-2 if name in own else 1e-3 for name in named.values()}
    schedule.step(40)  # half of 10 iterations of 8
    assert rates() == pytest.approx({name: 7.5e-3 if name in own else 5.5e-4 for name in named.values()})
    before = {name: value for name, value in schedule.state_dict().items() if not name.startswith("decoupled")}
    plain = Schedule(optimizer, schedule_shape(OptimizerConfig(lr=1e-3, min_lr=1e-4), cfg.training))
    plain.load_state_dict(before)  # a checkpoint of before
    assert plain.samples == 40
    with pytest.raises(ConfigError, match=r"decoupled_lr: 0\.01 in the checkpoint, None here"):
        plain.load_state_dict(schedule.state_dict())
    assert validate(cfg, 1) == cfg
