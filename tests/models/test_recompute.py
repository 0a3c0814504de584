"""Activation recomputation changes memory, never numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatron_lsh import lsh
from megatron_lsh.errors import ConfigError
from megatron_lsh.models.recompute import RecomputePlan
from tests.models.model_helpers import LLAMA_LIKE, MOE, full_gradients, make_batch, make_config, make_gpt

MODEL = {
    **LLAMA_LIKE,
    **MOE,
    "num_layers": 3,
    "moe_layer_freq": "[0,1,1]",
    "moe_token_dispatcher_type": "lsh",
    "moe_input_jitter_eps": 0.01,
    "moe_shared_expert_intermediate_size": 16,
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
}
PLANS: dict[str, dict[str, Any]] = {
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "full, chunks of 2": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
    "block of 2": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
    "core_attn": {"recompute_activations": True},
    "moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "layernorm": {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
    "all modules": {
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn", "moe", "mlp", "layernorm"],
    },
    "moe_layer_recompute": {"moe_layer_recompute": True},
}


class Run:
    """Loss, gradients, generator state and bytes kept for backward, of one forward and backward pass."""

    def __init__(self, **settings: Any) -> None:
        model = make_gpt(make_config(**MODEL, **settings))
        tokens, labels = make_batch()
        torch.manual_seed(3)
        kept: dict[int, Tensor] = {}

        def keep(x: Tensor) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss, aux_loss = model(tokens, labels)
        self.kept = sum(x.untyped_storage().nbytes() for x in kept.values())
        (loss.mean() + aux_loss).backward()
        self.loss, self.aux_loss = loss.detach(), aux_loss.detach()
        self.grads = full_gradients(model)
        self.rng = torch.get_rng_state()


@pytest.fixture(scope="module")
def plain() -> Run:
    return Run()


@pytest.mark.parametrize("plan", PLANS)
def test_bit_equal_and_smaller(plan: str, plain: Run) -> None:
    run = Run(**PLANS[plan])
    assert torch.equal(run.loss, plain.loss)
    assert torch.equal(run.aux_loss, plain.aux_loss) and run.aux_loss > 0
    for name, grad in plain.grads.items():
        assert torch.equal(run.grads[name], grad), name
    assert torch.equal(run.rng, plain.rng)
    assert run.kept < plain.kept


def test_nothing_is_hashed_or_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    project = lsh.project

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return project(*args, **kwargs)

    monkeypatch.setattr(lsh, "project", counting)
    reports = []
    for plan in ("full", "moe"):
        calls = 0
        model = make_gpt(make_config(**MODEL, **PLANS[plan]))
        torch.manual_seed(3)
        loss, aux_loss = model(*make_batch())
        (loss.mean() + aux_loss).backward()
        assert calls == 2  # one per MoE layer
        reports.append(model.telemetry.collect(model.ctx, iterations=1))
    model = make_gpt(make_config(**MODEL))
    torch.manual_seed(3)
    model(*make_batch())
    plain = model.telemetry.collect(model.ctx, iterations=1)
    for report in reports:
        assert [r["load_max_over_mean"] for r in report] == [r["load_max_over_mean"] for r in plain]
        assert [r["load_p50"] for r in report] == [r["load_p50"] for r in plain]
        assert [r["lsh_compression_rate"] for r in report] == [r["lsh_compression_rate"] for r in plain]


def test_the_projection_behind_a_recomputed_norm_runs_once() -> None:
    """Recomputation stops at the input of the projection, so it costs a norm and not a matrix product."""
    flops = []
    for modules in ({}, PLANS["layernorm"]):
        model = make_gpt(make_config(**LLAMA_LIKE, **modules))
        tokens, labels = make_batch()
        with FlopCounterMode(display=False) as counter:
            model(tokens, labels)[0].mean().backward()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1]


def test_chunks() -> None:
    uniform = RecomputePlan(full_layers=5, chunk=2)
    assert uniform.chunks(5) == [(range(0, 2), True), (range(2, 4), True), (range(4, 5), True)]
    block = RecomputePlan(full_layers=1)
    assert block.chunks(3) == [(range(0, 1), True), (range(1, 2), False), (range(2, 3), False)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"recompute_granularity": "selective", "recompute_modules": ["attention"]},
            r"recompute.recompute_modules \(attention\)",
        ),
        ({"recompute_granularity": "full", "recompute_num_layers": 9}, r"recompute.recompute_num_layers \(9\)"),
    ],
)
def test_impossible_plans(settings: dict[str, Any], message: str) -> None:
    cfg = make_config(**settings)
    with pytest.raises(ConfigError, match=message):
        RecomputePlan.from_config(cfg.recompute, cfg.moe, num_layers=2)
