"""Ranks that share every sequence train, judge, draw and report as one rank does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_lsh.families import GPT
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.testing import run_distributed_test
from megatron_lsh.training.evaluate import evaluate
from megatron_lsh.training.run import Run, set_up
from tests.models.model_helpers import full_gradients
from tests.training.helpers import tiny_config

CP2 = "--context-parallel-size 2"
DOCUMENTS = "--reset-position-ids --reset-attention-mask --eod-mask-loss"
CASES = {
    "documents": f"{DOCUMENTS} --group-query-attention --num-query-groups 2",
    "weight per token": f"{DOCUMENTS} --calculate-per-token-loss",
    "losses of sequences": "--moe-router-load-balancing-type seq_aux_loss --position-embedding-type learned_absolute",
    "losses of the batch": "--moe-router-load-balancing-type global_aux_loss --num-layers 1",
    "biases": "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --num-layers 1",
    "dense": "--num-experts 4 --moe-layer-freq [0,1] --attention-dropout 0 --qk-layernorm",
}
STEPS = 2


def connect(flags: str, world_size: int) -> Run:
    cfg = tiny_config(f"{flags} {CP2 if world_size > 1 else ''}", world_size)
    return set_up(cfg, GPT, initialize(cfg.parallel))


def found(flags: str, world_size: int) -> dict[str, Any]:
    """Losses and gradient norms of some steps, what an evaluation says, and what the layers measured."""
    run = connect(flags, world_size)
    batches = run.batches("train")
    judged = evaluate(run.step.pipeline, run.judge, [next(run.batches("train"))])
    assert judged is not None
    run.telemetry.collect(run.ctx, 1)
    results = [run.step(batches, iteration, False) for iteration in range(STEPS)]
    assert not any(result.skipped for result in results)
    reports = run.telemetry.collect(run.ctx, STEPS)
    names = ("load_balancing_loss", "z_loss", "load_max_over_mean")
    return {
        "evaluation": judged["loss"],
        "steps": [(result.loss, result.grad_norm) for result in results],
        "gauges": [[report[name] for name in names] for report in reports],
    }


def together(world_size: int) -> dict[str, Any]:
    several: dict[str, Any] = {name: found(flags, world_size) for name, flags in CASES.items()}
    plain, recomputed = (
        gradients(f"--attention-dropout 0.1 --hidden-dropout 0.1 --lr 1e-3 {flags}", world_size)
        for flags in ("", "--recompute-granularity selective --recompute-modules core_attn moe")
    )
    assert all(torch.equal(recomputed[name], grad) for name, grad in plain.items())
    return several | {"seed": torch.initial_seed()}


def gradients(flags: str, world_size: int) -> dict[str, torch.Tensor]:
    run = connect(flags, world_size)
    kept: dict[str, torch.Tensor] = {}
    run.step.optimizer.register_step_pre_hook(lambda *_: kept.update(full_gradients(run.model)))
    run.step(run.batches("train"), 0, False)
    return kept


def test_two_ranks_that_share_sequences_are_one() -> None:
    one, other = run_distributed_test(together, 2, 2)
    assert one.pop("seed") != other.pop("seed"), "they drop and draw differently"
    assert one == other
    for name, flags in CASES.items():
        expected = found(flags, 1)
        assert one[name]["evaluation"] == pytest.approx(expected["evaluation"], rel=1e-6), name
        for step, alone in zip(one[name]["steps"], expected["steps"], strict=True):
            assert step == pytest.approx(alone, rel=1e-5), name
        for layer, alone in zip(one[name]["gauges"], expected["gauges"], strict=True):
            assert layer == pytest.approx(alone, rel=1e-5), name
    dist.destroy_process_group()
