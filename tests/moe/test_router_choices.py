"""Router: choices limited to groups of experts, and Sinkhorn's, against Megatron-LM's recorded answers and plain loops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_lsh.config import parse_args, validate
from megatron_lsh.config.model import ModelConfig
from megatron_lsh.config.moe import MoEConfig
from megatron_lsh.moe.router import Routing, TopKRouter, group_limited_ids, sinkhorn_plan, top_ids
from megatron_lsh.parallel.context import offline_context
from tests.config.command_lines import SMALL

RECORDED = json.loads((Path(__file__).parent / "megatron_routing.json").read_text())
LOGITS = torch.tensor(RECORDED["logits"])
E = LOGITS.shape[1]


def router_giving(logits_TE: Tensor, moe: MoEConfig) -> tuple[TopKRouter, Tensor]:
    """A router and inputs whose logits are those: one feature per expert, and the identity as weight."""
    experts = logits_TE.shape[1]
    model = ModelConfig(hidden_size=experts, init_method_std=1.0, add_bias_linear=False)
    router = TopKRouter(model, moe, offline_context(device="cpu"))
    with torch.no_grad():
        router.weight.copy_(torch.eye(experts))
    return router, logits_TE.clone()


def by_expert(routing: Routing) -> Tensor:
    """[T, E] weights, zero for experts that were not chosen."""
    ids = routing.expert_ids_TK
    return torch.zeros(ids.shape[0], E).scatter(1, ids.clamp(min=0), routing.probs_TK)


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda c: f"{c['score_function']}-{c['num_groups']}")
def test_groups_equal_megatrons(case: dict[str, Any]) -> None:
    moe = MoEConfig(
        num_experts=E,
        moe_router_load_balancing_type="none",
        moe_router_topk=case["topk"],
        moe_router_num_groups=case["num_groups"],
        moe_router_group_topk=case["group_topk"],
        moe_router_score_function=case["score_function"],
        moe_router_pre_softmax=case["pre_softmax"],
        moe_router_topk_scaling_factor=case["scaling"],
        moe_router_enable_expert_bias=case["bias"] is not None,
    )
    router, x = router_giving(LOGITS, moe)
    if case["bias"] is not None:
        assert router.expert_bias is not None
        router.expert_bias.copy_(torch.tensor(case["bias"]))
    routing = router(x)
    expected = torch.zeros(len(LOGITS), E).scatter(1, torch.tensor(case["ids"]), torch.tensor(case["probs"]))
    torch.testing.assert_close(by_expert(routing), expected, rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_groups_equal_a_plain_loop(data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, 4))
    size = data.draw(st.integers(1, 4))
    chosen = data.draw(st.integers(1, groups))
    topk = data.draw(st.integers(chosen, chosen * size))
    # few different values: ties, which the lowest id wins, of groups and of experts
    row = st.lists(st.integers(-2, 2), min_size=groups * size, max_size=groups * size)
    scores = data.draw(st.lists(row, min_size=0, max_size=3))
    ids = group_limited_ids(torch.tensor(scores, dtype=torch.float32).view(-1, groups * size), topk, groups, chosen)
    for t, values in enumerate(scores):
        sums = [sum(sorted(values[g * size : (g + 1) * size], reverse=True)[: topk // chosen]) for g in range(groups)]
        best = sorted(range(groups), key=lambda g: (-sums[g], g))[:chosen]
        near = [e for e in range(groups * size) if e // size in best]
        assert ids[t].tolist() == sorted(near, key=lambda e: (-values[e], e))[:topk]


def test_the_loss_judges_the_choice_without_groups() -> None:
    common: dict[str, Any] = {"num_experts": E, "moe_router_topk": 4, "moe_aux_loss_coeff": 1.0}
    free, x = router_giving(LOGITS, MoEConfig(**common))
    limited, _ = router_giving(LOGITS, MoEConfig(**common, moe_router_num_groups=4, moe_router_group_topk=2))
    one, other = free(x), limited(x)
    assert not torch.equal(one.expert_ids_TK, other.expert_ids_TK)
    assert torch.equal(one.load_balancing_loss, other.load_balancing_loss)


def test_the_sinkhorn_plan_equals_megatrons_and_is_even() -> None:
    plan = sinkhorn_plan(LOGITS)
    torch.testing.assert_close(plan, torch.tensor(RECORDED["sinkhorn"]), rtol=2e-4, atol=1e-7)
    torch.testing.assert_close(plan.sum(0), torch.full((E,), 1 / E), rtol=1e-3, atol=0)
    torch.testing.assert_close(plan.sum(1), torch.full((len(LOGITS),), 1 / len(LOGITS)), rtol=1e-2, atol=0)


def test_sinkhorn_stands_masks_empty_ranks_and_huge_logits() -> None:
    mask = torch.arange(len(LOGITS)) % 3 != 0
    masked = sinkhorn_plan(LOGITS, mask)
    assert not masked[~mask].any()
    torch.testing.assert_close(masked[mask], sinkhorn_plan(LOGITS[mask]))
    assert sinkhorn_plan(LOGITS[:0]).shape == (0, E)
    huge = sinkhorn_plan(LOGITS * 1000)  # exp of these is infinite, and the iteration never settles
    assert torch.isfinite(huge).all() and sinkhorn_plan(torch.full((3, 4), float("nan"))).shape == (3, 4)


@pytest.mark.parametrize("topk", [1, 2])
def test_sinkhorn_chooses_by_the_plan_in_training_and_by_score_in_evaluation(topk: int) -> None:
    flags = "--num-experts 16 --moe-aux-loss-coeff 0 --moe-router-load-balancing-type sinkhorn --moe-router-topk"
    moe = validate(parse_args([*SMALL, *flags.split(), str(topk)]), 1).moe
    router, x = router_giving(LOGITS, moe)
    scores = torch.sigmoid(LOGITS) if topk == 1 else LOGITS.softmax(-1)
    for training, judge in ((True, torch.tensor(RECORDED["sinkhorn"])), (False, LOGITS)):
        routing = router.train(training)(x.requires_grad_())
        assert torch.equal(routing.expert_ids_TK, top_ids(judge, topk))
        torch.testing.assert_close(routing.probs_TK, scores.gather(1, routing.expert_ids_TK))  # not renormalised
    loads = router.train()(x).tokens_per_expert_E
    assert int(loads.max()) < int(router.eval()(x).tokens_per_expert_E.max())
    assert torch.autograd.grad(routing.probs_TK.sum(), x)[0].abs().sum() > 0


BIASED = json.loads((Path(__file__).parent / "megatron_router_bias.json").read_text())
"""what megatron-core's TopKRouter with --add-bias-linear answers, and its gradients of sum(probs * (1, 2, ...) / 10)"""


@pytest.mark.parametrize("case", BIASED["cases"], ids=lambda c: f"{c['score_function']}-{c['pre_softmax']}")
def test_a_router_with_bias_is_megatrons(case: dict[str, Any]) -> None:
    weight, bias = torch.tensor(BIASED["weight"]), torch.tensor(BIASED["bias"])
    experts, hidden = weight.shape
    moe = MoEConfig(
        num_experts=experts,
        moe_router_load_balancing_type="none",
        moe_router_topk=case["topk"],
        moe_router_score_function=case["score_function"],
        moe_router_pre_softmax=case["pre_softmax"],
    )
    router = TopKRouter(ModelConfig(hidden_size=hidden), moe, offline_context(device="cpu"))
    assert router.bias is not None, "as in megatron-core, biases of linear layers are on unless they are switched off"
    with torch.no_grad():
        router.weight.copy_(weight)
        router.bias.copy_(bias)
    routing = router(torch.tensor(BIASED["x"]))
    ids = routing.expert_ids_TK
    probs_TE = torch.zeros(ids.shape[0], experts).scatter(1, ids, routing.probs_TK)
    torch.testing.assert_close(probs_TE, torch.tensor(case["probs"]), rtol=0, atol=1e-6)
    assert (probs_TE > 0).int().tolist() == case["chosen"]
    (probs_TE * (torch.arange(1, probs_TE.numel() + 1).view_as(probs_TE) / 10)).sum().backward()
    torch.testing.assert_close(router.bias.grad, torch.tensor(case["grad_bias"]), rtol=0, atol=2e-5)
    torch.testing.assert_close(router.weight.grad, torch.tensor(case["grad_weight"]), rtol=0, atol=2e-5)
