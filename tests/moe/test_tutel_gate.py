"""The router as Tutel's gate: equal to what Tutel's own functions gave (tutel_gate.json says which, and how)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lsh.config.model import ModelConfig
from megatron_lsh.config.moe import MoEConfig
from megatron_lsh.moe.capacity import expert_capacity
from megatron_lsh.moe.router import TopKRouter
from megatron_lsh.parallel.context import offline_context
from megatron_lsh.parallel.parameters import initialize_parameters

RECORDED = json.loads((Path(__file__).parent / "tutel_gate.json").read_text())


def tutels_router(case: dict[str, Any], **moe: Any) -> TopKRouter:
    experts = case["experts"]
    settings: dict[str, Any] = {
        "num_experts": experts,
        "moe_router_topk": case["topk"],
        "moe_router_pre_softmax": True,
        "moe_router_bias": False,
        "moe_router_gate_noise": case["noise"],
        "moe_router_load_balancing_type": "load_importance",
        "moe_aux_loss_coeff": 1.0,
        "moe_expert_capacity_factor": case["factor"],
        "moe_capacity_rounding": "tutel",
        "moe_token_drop_policy": "batch-priority",
    }
    ctx = offline_context(device="cpu")
    router = TopKRouter(ModelConfig(hidden_size=experts), MoEConfig(**settings | moe), ctx)
    with torch.no_grad():
        router.weight.copy_(torch.eye(experts))  # tokens are their own logits
    return router


@pytest.mark.parametrize(
    "case", RECORDED["cases"], ids=lambda case: f"E{case['experts']} K{case['topk']} f{case['factor']}"
)
def test_choices_drops_weights_and_loss_are_tutels(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    logits_TE = torch.tensor(case["logits"], requires_grad=True)
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.tensor(case["normal"]))
    routing = tutels_router(case)(logits_TE)
    kept_TK = torch.tensor(case["kept"]).bool()
    assert not kept_TK.all() and kept_TK.any()
    assert torch.equal(routing.expert_ids_TK, torch.tensor(case["ids"]).long().masked_fill(~kept_TK, -1))
    torch.testing.assert_close(routing.probs_TK, torch.tensor(case["weights"]) * kept_TK, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(routing.aux_loss.item(), case["loss"], rtol=1e-5, atol=0)
    (grad,) = torch.autograd.grad(routing.aux_loss, logits_TE)
    torch.testing.assert_close(grad, torch.tensor(case["grad"]), rtol=1e-4, atol=1e-6)
    tokens, experts, topk = len(case["ids"]), case["experts"], case["topk"]
    assert expert_capacity(tokens, topk, experts, case["factor"], "tutel") == case["capacity"]
    assert expert_capacity(torch.tensor(tokens), topk, experts, case["factor"], "tutel") == case["capacity"]


def test_masked_tokens_change_nothing() -> None:
    case = RECORDED["cases"][1]
    logits_TE, extra = torch.tensor(case["logits"]), torch.full((3, case["experts"]), 9.0)
    router = tutels_router(case, moe_router_gate_noise=1e-3).train()
    mask = torch.arange(len(logits_TE) + 3) < len(logits_TE)
    torch.manual_seed(0)
    alone = router(logits_TE)
    torch.manual_seed(0)
    padded = router(torch.cat([logits_TE, extra]), mask)
    assert torch.equal(padded.expert_ids_TK[: len(logits_TE)], alone.expert_ids_TK)
    assert (padded.expert_ids_TK[len(logits_TE) :] == -1).all()
    torch.testing.assert_close(padded.load_balancing_loss, alone.load_balancing_loss, rtol=1e-2, atol=0)


def test_evaluation_has_no_noise_and_drops_only_where_it_is_asked_to() -> None:
    case = RECORDED["cases"][2]
    logits_TE = torch.tensor(case["logits"])
    for drops in (False, True):
        router = tutels_router(case, eval_capacity=drops).eval()
        first, second = router(logits_TE), router(logits_TE)
        assert torch.equal(first.probs_TK, second.probs_TK)
        assert bool((first.expert_ids_TK < 0).any()) is drops
        best = torch.softmax(logits_TE, 1).topk(case["topk"], 1).values
        torch.testing.assert_close(first.probs_TK, best.masked_fill(first.expert_ids_TK < 0, 0))


def test_the_cosine_router_is_tutels() -> None:
    recorded = {name: torch.tensor(value) for name, value in RECORDED["cosine"].items()}
    moe = MoEConfig(num_experts=4, moe_router_type="cosine", moe_router_topk=4, moe_router_pre_softmax=True)
    router = TopKRouter(ModelConfig(hidden_size=8), moe, offline_context(device="cpu"))
    initialize_parameters(router, 0)
    assert set(router.state_dict()) == {
        f"gate.{name}" for name in ("projector_weight", "projector_bias", "vectors", "temperature")
    }
    torch.testing.assert_close(router.gate.temperature.item(), recorded["temperature"].item())  # type: ignore[union-attr]
    names = {"cosine_projector.weight": "projector_weight", "cosine_projector.bias": "projector_bias"}
    names |= {"sim_matrix": "vectors", "temperature": "temperature"}
    router.load_state_dict({f"gate.{ours}": recorded[theirs] for theirs, ours in names.items()})
    logits = router._logits(recorded["x"])
    torch.testing.assert_close(logits, recorded["logits"], rtol=1e-5, atol=1e-6)
    router(recorded["x"]).probs_TK[:, 0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in router.parameters())
