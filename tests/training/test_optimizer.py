from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_lsh.config import OptimizerConfig
from megatron_lsh.errors import ConfigError
from megatron_lsh.families import GPT
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.parallel.context import offline_context
from megatron_lsh.training.optimizer import build_optimizer, parameter_groups
from tests.training.helpers import tiny_config


def test_biases_norms_and_vectors_do_not_decay() -> None:
    cfg = tiny_config("--moe-layer-freq ([0]+[1])")
    cfg.model.add_bias_linear = True
    cfg.model.normalization = "LayerNorm"
    device = torch.device("cpu")
    model = GPT.build(cfg, 64, offline_context(device=device), MoETelemetry(device))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {group["decay"]: sorted(names[id(p)] for p in group["params"]) for group in parameter_groups(model)}
    assert sum(len(group) for group in groups.values()) == len(names)
    assert all("norm" in name or name.endswith("bias") for name in groups[False])
    assert not any("norm" in name or name.endswith("bias") for name in groups[True])
    # The biases of experts ([E, F]) and of a SwiGLU layer ([2, F]) are matrices by shape and biases all the same.
    shapes = dict(model.named_parameters())
    assert any(shapes[name].ndim == 2 for name in groups[False])


def test_adam_is_adamw() -> None:
    """One step by hand: p (1 - lr wd) - lr g / (|g| + eps), because the first moments' corrections cancel."""
    model = nn.Linear(2, 2, bias=False)
    weight = model.weight
    before = weight.detach().clone()
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1))
    optimizer.param_groups[0]["weight_decay"] = 0.5
    weight.grad = torch.tensor([[1.0, -2.0], [3.0, -4.0]])
    optimizer.step()
    assert torch.allclose(weight, before * (1 - 0.05) - 0.1 * torch.sign(weight.grad), atol=1e-6)
    assert isinstance(build_optimizer(model, OptimizerConfig(lr=0.1, optimizer="sgd")), torch.optim.SGD)


def test_apex_is_refused_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))  # PyPI's, without apex.optimizers
    with pytest.raises(ConfigError, match=r"--use-apex-adam needs NVIDIA's apex.*github.com/NVIDIA/apex"):
        build_optimizer(nn.Linear(2, 2), OptimizerConfig(lr=0.1, use_apex_adam=True))
    with pytest.raises(ConfigError, match=r"optimizer.optimizer \(sgd\) must be adam with --use-apex-adam"):
        build_optimizer(nn.Linear(2, 2), OptimizerConfig(lr=0.1, optimizer="sgd", use_apex_adam=True))


class FakeFusedAdam(torch.optim.Optimizer):
    """Has the interface and the arithmetic of apex.optimizers.FusedAdam, so that the adapter can be tested anywhere."""

    def __init__(self, params: list[Tensor], lr: float, betas: Any, eps: float, weight_decay: float, adam_w_mode: bool):
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                mean = state["exp_avg"] / (1 - beta1 ** group["step"])
                square = state["exp_avg_sq"] / (1 - beta2 ** group["step"])
                p.add_(mean / (square.sqrt() + group["eps"]) + group["weight_decay"] * p, alpha=-group["lr"])


def test_apex_adapter_equals_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    apex = types.ModuleType("apex")
    optimizers = types.ModuleType("apex.optimizers")
    optimizers.FusedAdam = FakeFusedAdam  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex", apex)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    results = []
    for use_apex in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = build_optimizer(model, OptimizerConfig(lr=0.1, use_apex_adam=use_apex))
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.1 if group["decay"] else 0.0
        for step in range(4):
            if step == 2 and use_apex:  # a checkpoint in the middle
                saved = optimizer.state_dict()
                optimizer = build_optimizer(model, OptimizerConfig(lr=0.1, use_apex_adam=True))
                optimizer.load_state_dict(saved)
            optimizer.zero_grad()
            model(torch.full((2, 4), 0.5 + step)).square().sum().backward()
            optimizer.step()
        results.append((model.weight.detach().clone(), model.bias.detach().clone(), optimizer.state_dict()["state"][0]))
    for torchs, apexs in zip(results[0][:2], results[1][:2], strict=True):
        assert torch.allclose(torchs, apexs, atol=1e-5)
    assert results[0][2].keys() == results[1][2].keys()
    assert float(results[1][2]["step"]) == 4
