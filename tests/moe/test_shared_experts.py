"""Shared experts against the formula, on one rank and split over two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lsh.config.model import ModelConfig
from megatron_lsh.config.moe import LSHConfig, MoEConfig
from megatron_lsh.config.parallel import ParallelConfig
from megatron_lsh.errors import ConfigError
from megatron_lsh.moe.shared_experts import SharedExperts
from megatron_lsh.parallel.context import ParallelContext, offline_context
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.parameters import initialize_parameters
from megatron_lsh.parallel.testing import run_distributed_test
from tests.moe.test_dispatchers import make_layer, run, tokens

S, B, D, F = 4, 2, 8, 16
CPU = offline_context(device="cpu")


def make_shared(ctx: ParallelContext = CPU, gate: bool = False, **model: Any) -> SharedExperts:
    model_cfg = ModelConfig(num_layers=1, hidden_size=D, init_method_std=0.3, **model)
    moe_cfg = MoEConfig(num_experts=2, moe_shared_expert_intermediate_size=F, moe_shared_expert_gate=gate)
    shared = SharedExperts(model_cfg, moe_cfg, ctx)
    initialize_parameters(shared, seed=1)
    return shared


def inputs() -> Tensor:
    return torch.randn(S, B, D, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("swiglu", [False, True])
def test_equals_formula(gate: bool, swiglu: bool) -> None:
    shared = make_shared(gate=gate, swiglu=swiglu)
    assert {n for n, _ in shared.named_parameters()} == {
        "linear_fc1.weight",
        "linear_fc1.bias",
        "linear_fc2.weight",
        "linear_fc2.bias",
    } | ({"gate_weight"} if gate else set())
    x = inputs()
    w1 = shared.linear_fc1.weight
    gelu, silu = torch.nn.functional.gelu, torch.nn.functional.silu
    h = silu(x @ w1[0].T) * (x @ w1[1].T) if swiglu else gelu(x @ w1.T)
    expected = h @ shared.linear_fc2.weight.T
    if shared.gate_weight is not None:
        expected = expected * torch.sigmoid(x @ shared.gate_weight[0])[..., None]
    torch.testing.assert_close(shared(x), expected)


def test_width_is_required() -> None:
    with pytest.raises(ConfigError, match="--moe-shared-expert-intermediate-size"):
        SharedExperts(ModelConfig(hidden_size=D), MoEConfig(num_experts=2), CPU)


def _check_split() -> None:
    ctx = initialize(ParallelConfig(tensor_model_parallel_size=2, device="cpu"))
    half = slice(ctx.rank * S // 2, (ctx.rank + 1) * S // 2)
    whole, split = make_shared(gate=True, swiglu=True), make_shared(ctx, gate=True, swiglu=True)
    x, x_half = inputs().requires_grad_(), inputs()[half].requires_grad_()
    y, y_half = whole(x), split(x_half)
    torch.testing.assert_close(y_half, y[half])
    y.square().sum().backward()
    y_half.square().sum().backward()
    assert x.grad is not None and x_half.grad is not None
    torch.testing.assert_close(x_half.grad, x.grad[half])
    for a, b in zip(split.parameters(), whole.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad.full_tensor(), b.grad)  # type: ignore[attr-defined]


def test_split_over_tensor_parallel_ranks() -> None:
    run_distributed_test(_check_split, 2)


def overlapped_is_not_overlapped() -> None:
    """The same outputs to the bit, and the same gradients but for the order of their sums, whatever way rows take."""
    ctx = initialize(ParallelConfig(expert_model_parallel_size=2))
    x = tokens(ctx.rank)
    for dispatcher in ("alltoall", "lsh"):
        found = []
        for overlap in (False, True):
            settings = {"moe_shared_expert_intermediate_size": 16, "moe_shared_expert_overlap": overlap}
            layer, _ = make_layer(ctx, dispatcher, LSHConfig(lsh_target_rate=0.4), **settings)
            order: list[str] = []
            layer.shared_experts.register_forward_hook(lambda *_, order=order: order.append("shared"))  # type: ignore[union-attr]
            layer.experts.register_forward_hook(lambda *_, order=order: order.append("experts"))
            found.append(run(layer, x))
            assert order == (["shared", "experts"] if overlap else ["experts", "shared"])
        assert torch.equal(found[0]["y"], found[1]["y"])
        for name, expected in found[0].items():
            torch.testing.assert_close(found[1][name], expected, rtol=1e-5, atol=1e-6)


def test_the_shared_expert_runs_while_rows_travel() -> None:
    run_distributed_test(overlapped_is_not_overlapped, 2)
