"""Latent experts: the maps around the dispatcher, what they save, and the same model on any layout."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_lsh.config.moe import LSHConfig
from megatron_lsh.config.parallel import ParallelConfig
from megatron_lsh.moe.layer import MoELayer
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.testing import run_distributed_test
from tests.moe.test_dispatchers import BATCH, HIDDEN, SEQUENCE, make_layer, run, single, tokens
from tests.training.helpers import tiny_config

LATENT = 4
SMALL = LSHConfig(lsh_target_rate=0.4)


def by_hand(layer: MoELayer, x_TD: torch.Tensor) -> torch.Tensor:
    """fc2(sum_k p_k E_k(fc1(x))), token by token."""
    down, up = layer.fc1_latent_proj, layer.fc2_latent_proj
    assert down is not None and up is not None and down.bias is not None and up.bias is not None
    routing = layer.router(x_TD)
    out = []
    for x_D, ids_K, probs_K in zip(x_TD, routing.expert_ids_TK, routing.probs_TK, strict=True):
        z_L = down.weight @ x_D + down.bias
        y_L = torch.zeros(LATENT)
        for e, p in zip(ids_K, probs_K, strict=True):
            fc1, fc2 = layer.experts.linear_fc1, layer.experts.linear_fc2
            gate, value = (fc1.weight[e] @ z_L + fc1.bias[e]).chunk(2)
            y_L = y_L + p * (fc2.weight[e] @ (F.silu(gate) * value) + fc2.bias[e])
        out.append(up.weight @ y_L + up.bias)
    return torch.stack(out)


def test_equals_its_definition() -> None:
    layer, _ = make_layer(single(), moe_latent_size=LATENT)
    names = {name for name, _ in layer.named_parameters()}
    assert {f"fc{i}_latent_proj.{kind}" for i in (1, 2) for kind in ("weight", "bias")} <= names
    assert layer.router.weight.shape[1] == HIDDEN and layer.experts.linear_fc1.weight.shape[2] == LATENT
    x = tokens(0)
    y, _ = layer(x)
    torch.testing.assert_close(y.flatten(0, 1), by_hand(layer, x.flatten(0, 1)), rtol=1e-4, atol=1e-4)


def ranks_agree_and_send_less(tp: int) -> None:
    """TP 2 with sequence parallelism, and EP 2, against one rank: outputs and all gradients; LSH at rate 1 is exact."""
    ctx = initialize(ParallelConfig(tensor_model_parallel_size=tp, expert_model_parallel_size=2, device="cpu"))
    whole, _ = make_layer(single(), moe_latent_size=LATENT, moe_router_load_balancing_type="none")
    x = torch.cat([tokens(0, False), tokens(1, False)])
    mine = slice(ctx.rank * SEQUENCE, (ctx.rank + 1) * SEQUENCE)
    exact = None
    for dispatcher, lsh in (("alltoall", SMALL), ("lsh", LSHConfig(lsh_target_rate=1.0))):
        layer, telemetry = make_layer(
            ctx, dispatcher, lsh, moe_latent_size=LATENT, moe_router_load_balancing_type="none"
        )
        found = run(layer, x[mine].clone().requires_grad_())
        torch.testing.assert_close(found["y"], whole(x)[0][mine].detach(), rtol=1e-4, atol=1e-4)
        assert exact is None or torch.equal(exact["y"], found["y"])
        exact = exact or found
        (figures,) = telemetry.collect(ctx, iterations=1)
        rows = 2 * SEQUENCE * BATCH * 2  # of two ranks, top-2
        assert 0 < figures["alltoall_bytes"] <= rows * LATENT * 4 * 4  # both ways, forward and backward, fp32
    expected = run(whole, x.requires_grad_())
    for name in ("fc1_latent_proj.weight", "fc1_latent_proj.bias", "fc2_latent_proj.weight", "fc2_latent_proj.bias"):
        mean = exact[name].clone() / 2  # each rank's loss is a mean over half of the tokens
        dist.all_reduce(mean)
        torch.testing.assert_close(mean, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tp", [1, 2])
def test_on_two_ranks(tp: int) -> None:
    run_distributed_test(ranks_agree_and_send_less, 2, tp)


def test_upcycling_has_no_latent_rows() -> None:
    with pytest.raises(
        Exception, match=r"moe.moe_latent_size \(8\) must not be given with checkpoint.moe_use_upcycling"
    ):
        tiny_config("--moe-latent-size 8 --moe-use-upcycling --load x --save y")
