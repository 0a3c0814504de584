"""Ranks that share every sequence train, judge, draw and report as one rank does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_lsh.families import GPT
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.testing import DistributedTestError, run_distributed_test
from megatron_lsh.training.evaluate import evaluate
from megatron_lsh.training.run import Run, set_up
from tests.models.model_helpers import full_gradients
from tests.training.helpers import tiny_config
from tests.training.test_pipeline import EP2, PP2, loaded, loaded_several, whole_run
from tests.training.test_pipeline import together as of_all

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


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_bit_and_its_checkpoint_fits_other_layouts(tmp_path: Path) -> None:
    shared = f"{CP2} {EP2} --attention-dropout 0.1 --hidden-dropout 0.1"
    folder, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    run_distributed_test(whole_run, 4, folder, shared, 4, 6)
    with pytest.raises(DistributedTestError, match="exit code -9"):
        run_distributed_test(whole_run, 4, cut, shared, 4, 6, 5)
    assert run_distributed_test(whole_run, 4, cut, shared, 4, 6)[0][1] == 6
    layouts = [(folder, shared), (cut, shared), (folder, f"{CP2} {PP2}"), (folder, "--tensor-model-parallel-size 2")]
    ranks = run_distributed_test(loaded_several, 4, layouts)
    expected, *others = (of_all([rank[n][0] for rank in ranks]) for n in range(len(layouts)))
    for state in (*others, loaded(folder, "", 1)[0]):
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(state[name], value, err_msg=name)
    dist.destroy_process_group()
