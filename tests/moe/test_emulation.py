"""Nodes emulated by one process (benchmarks/emulation.py): what they compute is what real ranks compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_lsh.config.moe import LSHConfig
from megatron_lsh.errors import ConfigError
from megatron_lsh.families import GPT
from megatron_lsh.moe.layer import MoELayer
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.parameters import local
from megatron_lsh.parallel.testing import run_distributed_test
from megatron_lsh.training.run import set_up
from tests.moe.test_dispatchers import make_layer, single, tokens
from tests.training.helpers import tiny_config

SCOPES = ("node", "rank")
#: Also for one representative among few rows, with the blocks of interpolation smaller than a group, and in few coordinates.
SETTINGS = (
    LSHConfig(lsh_target_rate=0.3, lsh_interpolation_block=4),
    LSHConfig(lsh_target_rate=0.3, lsh_interpolation_rank=2),
    LSHConfig(lsh_residual="identity"),
)
STEPS = 20


def outcome(layer: MoELayer, x: Tensor) -> tuple[Tensor, ...]:
    """Output, and gradients of input, router and experts."""
    y, _ = layer(x)
    wanted = [x, layer.router.weight, layer.experts.linear_fc1.weight, layer.experts.linear_fc2.weight]
    return y.detach(), *(local(grad) for grad in torch.autograd.grad(y.pow(2).sum(), wanted))


def layers_on_real_ranks() -> list[tuple[Tensor, ...]]:
    ctx = initialize_two_by_two()
    settings = [(scope, lsh) for scope in SCOPES for lsh in SETTINGS]
    return [
        outcome(make_layer(ctx, "lsh", lsh_of(lsh, scope))[0], tokens(ctx.rank + 10 * batch))
        for scope, lsh in settings
        for batch in range(3)
    ]


def initialize_two_by_two():  # type: ignore[no-untyped-def]
    return initialize(tiny_config("--expert-model-parallel-size 4 --moe-node-size 2", 4).parallel)


def lsh_of(lsh: LSHConfig, scope: str | None = None) -> LSHConfig:
    return LSHConfig(**{**vars(lsh), "lsh_scope": scope})


def test_an_emulated_layer_computes_what_four_ranks_compute() -> None:
    real = run_distributed_test(layers_on_real_ranks, 4, timeout_s=240.0)
    number = 0
    for scope in SCOPES:
        for lsh in SETTINGS:
            layer, _ = make_layer(single(), f"benchmarks.emulation:{scope}_2x2", lsh)
            for batch in range(3):
                of_rank = [tokens(rank + 10 * batch, requires_grad=False) for rank in range(4)]
                # Sequence b belongs to rank b mod 4.
                x = torch.stack(of_rank, 2).flatten(1, 2).requires_grad_()
                y, of_x, of_router, *of_experts = outcome(layer, x)
                y_R, x_R, router_R, *experts_R = zip(*(rank[number] for rank in real), strict=True)
                expected = [torch.stack(y_R, 2).flatten(1, 2), torch.stack(x_R, 2).flatten(1, 2), sum(router_R)]
                expected += [torch.cat(shards) for shards in experts_R]
                for got, wanted in zip((y, of_x, of_router, *of_experts), expected, strict=True):
                    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
                number += 1


def test_exact_own_rows_and_nodes_in_turn() -> None:
    x = torch.stack([tokens(rank, requires_grad=False) for rank in range(4)], 2).flatten(1, 2)
    exact = make_layer(single())[0](x)[0]

    def error(name: str) -> float:
        layer, telemetry = make_layer(single(), f"benchmarks.emulation:{name}", LSHConfig(lsh_target_rate=0.3))
        layer.set_iteration(1)
        off = float((layer(x)[0] - exact).detach().square().sum())
        (report,) = telemetry.collect(single(), iterations=1)
        sent, seen = report["lsh_compression_rate"], report["expert_rows_rate"]
        assert sent is not None and seen is not None
        assert seen == pytest.approx(sent if name == "rank_2x2" else 0.5 + 0.5 * sent, abs=0.1)
        return off

    assert error("node_2x2") < error("rank_own_exact_2x2") < error("rank_2x2")
    # All of the rows are of one node: they cluster as if there were twice as many of it.
    assert error("node_2x4_in_turn") < error("rank_own_exact_2x4")
    with pytest.raises(ConfigError, match=r"emulates 3 nodes .* divisible by 3; here 8"):
        make_layer(single(), "benchmarks.emulation:node_3x2")
    with pytest.raises(ConfigError, match="cannot be cut into those of 10 ranks"):
        make_layer(single(), "benchmarks.emulation:rank_2x5")[0](x)


def curve(flags: str, ranks: int) -> list[float]:
    """The loss of every step. SGD: Adam's steps would make much of the rounding of a small gradient."""
    common = f"--train-iters {STEPS} --global-batch-size 4 --moe-aux-loss-coeff 0 --optimizer sgd --lr 0.1"
    cfg = tiny_config(f"{common} --lsh-target-rate 0.3 --lsh-interpolation-block 8 {flags}", ranks)
    session = set_up(cfg, GPT, initialize(cfg.parallel))
    with session.batches("train") as batches:
        return [session.step(batches, iteration, False).loss for iteration in range(STEPS)]


def on_real_ranks() -> list[list[float]]:
    flags = "--micro-batch-size 1 --expert-model-parallel-size 4 --moe-node-size 2 --moe-token-dispatcher-type lsh"
    return [curve(f"{flags} --lsh-scope {scope}", 4) for scope in SCOPES]


def emulated() -> list[list[float]]:
    plugin = "--micro-batch-size 4 --moe-token-dispatcher-type benchmarks.emulation:"
    return [curve(f"{plugin}{name}", 1) for name in ("node_2x2", "rank_2x2", "exact")]


@pytest.mark.slow
def test_emulated_nodes_train_as_real_ones_do() -> None:
    """20 steps; but for rows that are as near to one centroid as to another, where rounding decides."""
    real = torch.tensor(run_distributed_test(on_real_ranks, 4, timeout_s=300.0)[0], dtype=torch.float64)
    (found,) = run_distributed_test(emulated, 1, timeout_s=300.0)
    likewise = torch.tensor(found, dtype=torch.float64)
    torch.testing.assert_close(likewise[:2, 0], real[:, 0], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(likewise[:2], real, rtol=1e-4, atol=0.0)
