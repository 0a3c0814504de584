"""Whole runs on one rank."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from megatron_lsh.checkpoint import inspect
from megatron_lsh.config import from_dict, parse_args, validate
from megatron_lsh.data.tokenizers import NullTokenizer
from megatron_lsh.errors import CheckpointError, ConfigError, DataError
from megatron_lsh.families import GPT, Losses
from megatron_lsh.inference.generate import Sampling, draw, generate
from megatron_lsh.models.cache import KVCache
from megatron_lsh.observing.state import TrainState
from megatron_lsh.observing.writers import read_jsonl
from megatron_lsh.parallel.context import offline_context
from megatron_lsh.parallel.initialize import initialize, shutdown
from megatron_lsh.training.run import set_up
from megatron_lsh.training.startup import refuse_to_overwrite
from megatron_lsh.training.train import train
from tests.training.helpers import gpt_with, tiny_config

EXACT = (
    "iteration",
    "consumed_samples",
    "lm_loss",
    "grad_norm",
    "learning_rate",
    "skipped_iterations",
    "validation_loss",
)


def launch(flags: str) -> TrainState:
    cfg = tiny_config(flags)
    refuse_to_overwrite(cfg.checkpoint)
    return train(cfg, GPT)


def curve(path: Path) -> list[dict[str, Any]]:
    """What must repeat to the bit. (Gauges of the MoE layers start afresh when a run resumes within a log interval.)"""
    return [{key: record[key] for key in EXACT if key in record} for record in read_jsonl(path)]


def test_a_run_and_what_it_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = launch(
        f"--train-iters 30 --lr 5e-3 --log-interval 5 --eval-interval 15 --save {tmp_path}/ckpt --save-interval 20 "
        f"--metrics-jsonl {tmp_path}/m.jsonl --tensorboard-dir {tmp_path}/tb --moe-per-layer-logging --log-throughput "
        "--log-params-norm --log-validation-ppl-to-tensorboard --moe-token-dispatcher-type lsh --lsh-eval both "
        "--sample-prompt 7 --sample-tokens 3"
    )
    assert (state.iteration, state.consumed_samples) == (30, 240)
    out = capsys.readouterr().out
    assert "iteration       30/      30 | consumed samples:          240 |" in out
    assert "validation loss at iteration 15 | lm loss value:" in out
    assert "validation loss at iteration 30 on validation set" in out and "30 on test set" in out
    assert "LSH rows sent and residual energy" in out and "next: " in out and "sample:\n  | 7 " in out

    records = read_jsonl(tmp_path / "m.jsonl")
    training = [record for record in records if "lm_loss" in record]
    validation = [record["validation_loss"] for record in records if "validation_loss" in record]
    assert [record["iteration"] for record in training] == [5, 10, 15, 20, 25, 30]
    assert training[-1]["lm_loss"] < training[0]["lm_loss"] - 0.3 and validation[1] < validation[0]
    assert len(training[0]["lsh_residual_energy_per_layer"]) == 2
    exact = [record["validation_loss_exact"] for record in records if "validation_loss" in record]  # of the same record
    assert len(exact) == 2 and exact != validation and exact == pytest.approx(validation, rel=0.1)
    assert "validation loss at iteration 15 without compression | lm loss value:" in out
    assert (tmp_path / "m.png").exists()
    assert (tmp_path / "ckpt" / "iter_0000020").is_dir() and (tmp_path / "ckpt" / "iter_0000030").is_dir()
    assert from_dict(json.loads((tmp_path / "ckpt" / "config.json").read_text())).training.train_iters == 30

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tb"))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    assert {
        "lm loss", "lm loss validation", "lm loss validation ppl", "learning-rate", "grad-norm", "params-norm", "batch-size",
        "iteration-time", "throughput", "load_balancing_loss", "z_loss", "moe/load_p95_layer_1",
    } <= tags  # fmt: skip
    assert [event.step for event in board.Scalars("lm loss")] == list(range(1, 31))
    assert board.Scalars("learning-rate")[0].value == pytest.approx(5e-3)


def test_the_same_command_gives_the_same_bits_and_resume_does_too(tmp_path: Path) -> None:
    flags = (
        "--train-iters 9 --log-interval 2 --eval-interval 4 --hidden-dropout 0.1 --attention-dropout 0.1 --clip-grad 0.1 "
        "--lr-decay-style cosine --lr-decay-iters 9 --lr-warmup-iters 2 --metrics-jsonl {0}/m.jsonl --save {0}/ckpt"
    )
    for name in ("one", "two"):
        launch(flags.format(tmp_path / name))
    reference = curve(tmp_path / "one" / "m.jsonl")
    assert curve(tmp_path / "two" / "m.jsonl") == reference

    # Stop in the middle of a log interval, and once more beyond the last checkpoint.
    parts = flags.format(tmp_path / "three") + f" --load {tmp_path}/three/ckpt"
    assert launch(parts + " --exit-interval 3").iteration == 3
    assert launch(parts + " --exit-interval 5").iteration == 5
    metrics = tmp_path / "three" / "m.jsonl"
    with open(metrics, "a") as file:
        file.write('{"iteration": 6, "lm_loss": 1.0}\n{"itera')  # as if the run had gone on and been killed
    assert launch(parts).iteration == 9
    assert curve(metrics) == reference


def test_nothing_is_resumed_or_overwritten_by_accident(tmp_path: Path) -> None:
    save = f"--save {tmp_path}/ckpt --train-iters 2"
    launch(save)
    with pytest.raises(
        ConfigError, match=r"already holds a run: one checkpoint, at iteration 2 of 2; .*--load .*rm -r"
    ):
        launch(save)
    with pytest.raises(ConfigError, match="--pretrained-checkpoint"):
        launch(f"{save} --load {tmp_path}")
    with pytest.raises(ConfigError, match="drop --finetune"):
        launch(f"{save} --load {tmp_path}/ckpt --finetune")
    assert launch(f"{save} --load {tmp_path}/ckpt/../ckpt --train-iters 3").iteration == 3
    evaluated = launch(f"--load {tmp_path}/ckpt --skip-train --metrics-jsonl {tmp_path}/evaluation.jsonl")
    assert evaluated.iteration == 3
    assert [set(r) for r in read_jsonl(tmp_path / "evaluation.jsonl")] == [
        {"iteration", "validation_loss"},
        {"iteration", "test_loss"},
    ]
    tuned = launch(f"--load {tmp_path}/ckpt --finetune --save {tmp_path}/tuned --train-iters 1")
    assert tuned.iteration == 1


def test_an_evaluation_leaves_what_the_training_wrote(tmp_path: Path) -> None:
    """The command line of the training with --skip-train, also of an earlier checkpoint; and it needs no optimizer."""
    flags = f"--save {tmp_path}/ckpt --load {tmp_path}/ckpt --metrics-jsonl {tmp_path}/m.jsonl --save-interval 2"
    launch(f"{flags} --train-iters 4")
    before = (tmp_path / "m.jsonl").read_bytes()
    words = f"{flags} --skip-train --ckpt-step 2 --optimizer sgd --lr 7 --train-iters 30 --lr-decay-style linear"
    assert launch(words).iteration == 2
    after = (tmp_path / "m.jsonl").read_bytes()
    assert after.startswith(before) and len(after) > len(before)
    assert [record["iteration"] for record in read_jsonl(tmp_path / "m.jsonl")][-1] == 2
    assert not list(tmp_path.glob("m.jsonl.*"))


def test_the_settings_in_a_checkpoint_are_those_of_a_run(tmp_path: Path) -> None:
    """For --config, which derives again what was derived, and for --use-checkpoint-args."""
    launch(f"--save {tmp_path} --train-iters 2")
    saved = tmp_path / "iter_0000002" / "config.json"
    assert json.loads(saved.read_text()) == json.loads((tmp_path / "config.json").read_text())
    again = validate(parse_args(f"--config {saved} --train-iters 20 --hidden-size 64".split()), 1)
    assert again.optimizer.lr_decay_iters == 20 and again.model.kv_channels == 64 // (
        again.model.num_attention_heads or 0
    )
    words = f"--use-checkpoint-args --load {tmp_path} --micro-batch-size 1 --train-iters 3"
    shaped = parse_args(words.split())
    assert shaped.model.num_layers == again.model.num_layers and shaped.moe.num_experts == again.moe.num_experts
    bare = json.loads(saved.read_text())["config"]  # what checkpoints of before hold
    saved.write_text(json.dumps(bare))
    again = parse_args(words.split())
    assert (again.model.hidden_size, again.moe.num_experts) == (shaped.model.hidden_size, shaped.moe.num_experts)


def test_a_changed_schedule_is_noticed(tmp_path: Path) -> None:
    flags = f"--save {tmp_path}/ckpt --load {tmp_path}/ckpt --lr-decay-style linear"
    launch(f"{flags} --train-iters 2")
    with pytest.raises(CheckpointError, match="decay_samples: 16 in the checkpoint, 32 here"):
        try:
            launch(f"{flags} --train-iters 4")
        finally:
            torch.distributed.destroy_process_group()
    assert launch(f"{flags} --train-iters 4 --override-opt_param-scheduler").iteration == 4


def test_dense_model_in_bf16_with_recomputation(tmp_path: Path) -> None:
    cfg = tiny_config(f"--bf16 --recompute-granularity full --train-samples 40 --metrics-jsonl {tmp_path}/m.jsonl")
    cfg.moe.num_experts = None
    assert train(cfg, GPT).iteration == 5
    records = read_jsonl(tmp_path / "m.jsonl")
    assert records[0]["load_balancing_loss"] is None and records[0]["alltoall_bytes"] == 0
    assert json.loads((tmp_path / "config.json").read_text())["config"]["training"]["train_samples"] == 40


def test_missing_sets(tmp_path: Path) -> None:
    cfg = tiny_config("--eval-iters 0")
    ctx = initialize(cfg.parallel)
    run = set_up(cfg, GPT, ctx)
    with pytest.raises(DataError, match="there is no valid set"):
        run.batches("valid")
    shutdown(ctx)


class Successor(nn.Module):
    """Prefers the token after the last one."""

    def new_cache(self, capacity: int) -> KVCache:
        return KVCache(0, capacity)

    def forward(self, tokens_BS: torch.Tensor, position_ids_BS: torch.Tensor, cache: KVCache) -> torch.Tensor:
        return 5.0 * nn.functional.one_hot((tokens_BS + 1) % 16, 16).float()


def test_generate() -> None:
    ctx = offline_context(device="cpu")
    greedy = Sampling(max_new_tokens=4, temperature=0.0)
    assert generate(Successor(), [3], ctx, vocab_size=16, context_length=8, sampling=greedy) == [4, 5, 6, 7]
    stopped = generate(Successor(), [3], ctx, vocab_size=16, context_length=8, eod=6, sampling=greedy)
    assert stopped == [4, 5]
    assert generate(Successor(), [14], ctx, vocab_size=15, context_length=1, sampling=greedy)[0] == 0  # 15 is padding
    drawn = Sampling(max_new_tokens=50, temperature=2.0, top_k=0, seed=1)
    one, two = (generate(Successor(), [3], ctx, vocab_size=16, context_length=8, sampling=drawn) for _ in range(2))
    assert one == two and len(set(one)) > 4
    logits = torch.tensor([0.0, 3.0, 2.0, 1.0])
    generator = torch.Generator().manual_seed(0)
    assert {draw(logits, Sampling(top_k=2, temperature=5.0), generator) for _ in range(100)} == {1, 2}
    with pytest.raises(ValueError, match="at least one token"):
        generate(Successor(), [], ctx, vocab_size=16, context_length=8)
    assert NullTokenizer(15).detokenize(stopped) == "4 5"


def test_state_keeps_count() -> None:
    from megatron_lsh.observing.state import StepResult

    state = TrainState()
    for loss, skipped in ((2.0, False), (float("nan"), True), (4.0, False)):
        state.advance(StepResult(loss, 1.0, skipped, stop=False), 8)
    assert (state.iteration, state.consumed_samples, state.skipped_iterations) == (3, 24, 1)
    assert (state.interval_loss, state.interval_steps, state.consecutive_nan_iterations) == (6.0, 2, 0)
    assert TrainState.from_state_dict({**json.loads(json.dumps(state.state_dict())), "new": 1}) == state


def test_a_clock_that_jumps_changes_nothing_but_the_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """400 days back in the third iteration, and 800 forward in the fifth: saved, kept, written and timed as ever."""
    real, shift_s, count = time.time, 0.0, 0
    monkeypatch.setattr(time, "time", lambda: real() + shift_s)
    monkeypatch.setattr(time, "time_ns", lambda: int((real() + shift_s) * 1e9))

    def losses(*arguments: Any) -> Losses:
        nonlocal shift_s, count
        count += 1
        shift_s = {3: -400.0, 5: 400.0}.get(count, shift_s / 86400) * 86400
        return GPT.losses(*arguments)

    flags = "--train-iters 6 --global-batch-size 2 --eval-iters 0 --save-interval 2 --save-retain-interval 1000"
    folders = f"--save {tmp_path}/c --metrics-jsonl {tmp_path}/m.jsonl --tensorboard-dir {tmp_path}/tb"
    train(tiny_config(f"{flags} {folders} --exit-duration-in-mins 1000"), gpt_with(losses))
    records = read_jsonl(tmp_path / "m.jsonl")
    assert [record["iteration"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert all(0 < record["iteration_time_ms"] < 1e6 for record in records)
    assert [(info.iteration, info.valid) for info in inspect(tmp_path / "c", hashes=True)] == [(6, True)]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tb"))
    board.Reload()
    assert [point.step for point in board.Scalars("lm loss")] == [1, 2, 3, 4, 5, 6]
