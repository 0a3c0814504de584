"""Rows that travel in pieces: the same outputs and gradients, and experts that run while other rows are under way."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_lsh.config.moe import LSHConfig
from megatron_lsh.config.parallel import ParallelConfig
from megatron_lsh.models.recompute import recomputed
from megatron_lsh.moe.exchange_plan import Plan
from megatron_lsh.moe.experts import Experts, Feed
from megatron_lsh.moe.layer_pass import ReplayMemo
from megatron_lsh.moe.transport import AllToAllTransport, Movement
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.testing import run_distributed_test
from tests.moe.test_dispatchers import EXPERTS, make_layer, run, tokens

LOCAL = EXPERTS // 2


def same_results(x: torch.Tensor, ctx: Any, *dispatchers: str) -> None:
    for dispatcher in dispatchers:
        for chunks in (1, 2, 2 * LOCAL):
            layer, _ = make_layer(ctx, dispatcher, LSHConfig(lsh_target_rate=0.4), moe_overlap_chunks=chunks)
            found = run(layer, x)
            if chunks == 1:
                whole = found
            elif chunks <= LOCAL:
                for name, value in whole.items():
                    assert torch.equal(found[name], value), (dispatcher, chunks, name)
            else:  # gradients of weights are sums of parts
                for name, value in whole.items():
                    torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def in_pieces() -> None:
    ctx = initialize(ParallelConfig(expert_model_parallel_size=2, device="cpu"))
    same_results(tokens(ctx.rank), ctx, "alltoall", "allgather", "lsh")
    same_results(tokens(0) if ctx.rank else tokens(0)[:0], ctx, "lsh")  # a rank without rows
    order_of_events(ctx)
    replayed(ctx)


def order_of_events(ctx: Any) -> None:
    """Forward and backward, every piece has set out before the experts of the first one run."""
    events: list[str] = []
    move, run_experts = AllToAllTransport.move, Experts._run

    def noted_move(self: AllToAllTransport, payload: torch.Tensor, plan: Plan, outward: bool) -> Movement:
        events.append("out" if outward else "back")
        return move(self, payload, plan, outward)

    def noted_run(self: Experts, feed: Feed, *weights: Any) -> torch.Tensor:
        out = run_experts(self, feed, *weights)
        events.append("experts")
        return out

    AllToAllTransport.move, Experts._run = noted_move, noted_run  # type: ignore[method-assign]
    try:
        layer, _ = make_layer(ctx, moe_overlap_chunks=2)
        y, _ = layer(tokens(ctx.rank))
        assert events == ["out", "out", "experts", "back", "experts", "back"]
        events.clear()
        y.square().sum().backward()
        assert sorted(events) == ["back", "back", "out", "out"] and events[:2] == ["out", "out"]
    finally:
        AllToAllTransport.move, Experts._run = move, run_experts  # type: ignore[method-assign]
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, events)
    assert everyone[0] == everyone[1]


def replayed(ctx: Any) -> None:
    """Recomputation repeats the pieces; gradients are those without it."""
    found = []
    for again in (False, True):
        layer, _ = make_layer(ctx, "lsh", LSHConfig(lsh_target_rate=0.4), moe_overlap_chunks=2)
        x, memo = tokens(ctx.rank), ReplayMemo()
        y, aux = recomputed(lambda t, m=memo, la=layer: la(t, None, m), x) if again else layer(x, None, memo)
        (y.square().mean() + aux).backward()
        found.append([x.grad, *(p.grad for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_on_two_ranks() -> None:
    run_distributed_test(in_pieces, 2)
