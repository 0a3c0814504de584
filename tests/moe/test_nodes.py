"""Two-level dispatch on four ranks as two nodes of two: equal to the plain all-to-all where it says so, and what crosses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from megatron_lsh.config import parse_args, validate
from megatron_lsh.config.moe import LSHConfig, MoEConfig
from megatron_lsh.config.parallel import ParallelConfig
from megatron_lsh.errors import ConfigError
from megatron_lsh.moe.layer_pass import ReplayMemo
from megatron_lsh.moe.nodes import node_order
from megatron_lsh.moe.registry import DispatcherSpec, deduplicated_dispatcher, deduplicates, describe, scope_of
from megatron_lsh.moe.schedule import exact_dispatch
from megatron_lsh.parallel.context import offline_context
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.layout import ParallelLayout
from megatron_lsh.parallel.parameters import local
from megatron_lsh.parallel.testing import run_distributed_test
from tests.moe.test_dispatchers import BATCH, EXPERTS, HIDDEN, SEQUENCE, make_layer, run, tokens
from tests.moe.test_waits import count

ROW = HIDDEN * 4
FULL = LSHConfig(lsh_target_rate=1.0)


def two_by_two():  # type: ignore[no-untyped-def]
    ctx = initialize(ParallelConfig(expert_model_parallel_size=4, moe_node_size=2))
    assert (ctx.ep_node.size, ctx.ep_local.size) == (2, 2)
    return ctx


def node_scope_is_exact_at_rate_one() -> None:
    """Outputs and all gradients to the bit; also with ranks that have no rows, and under recomputation."""
    ctx = two_by_two()
    x, nobody = tokens(ctx.rank), torch.zeros(SEQUENCE, BATCH, dtype=torch.bool)
    one = nobody.clone()
    one[0, 0] = True
    masks = [None, nobody if ctx.rank in (0, 3) else ~nobody, nobody, one if ctx.rank == 1 else nobody]
    for residual in ("interpolate", "identity", "none"):
        for mask in masks:
            exact = run(make_layer(ctx, "alltoall", moe_node_deduplication="off")[0], x, mask)
            layer, telemetry = make_layer(ctx, "lsh", dataclasses.replace(FULL, lsh_residual=residual))
            assert {"lsh", "exact", "lossless"} == set(layer.dispatcher.alternatives)
            got = run(layer, x, mask)
            for name, expected in exact.items():
                assert torch.equal(got[name], expected), f"{residual}: {name}"
            (report,) = telemetry.collect(ctx, iterations=1)
            assert report["alltoall_bytes_network"] == report["alltoall_bytes_network_uncompressed"]
            total = (report["alltoall_bytes_network"] or 0) + (report["alltoall_bytes_node"] or 0)
            assert report["alltoall_bytes"] == total
    memo = ReplayMemo()
    layer, _ = make_layer(ctx, "lsh", LSHConfig(lsh_target_rate=0.3))
    direct = run(layer, x)
    y, aux = checkpoint(lambda inputs: layer(inputs, None, memo), x, use_reentrant=False)
    grads = torch.autograd.grad(y.pow(2).mean() + aux, [x, *layer.parameters()])
    for got, expected in zip([y, aux, *grads], direct.values(), strict=True):
        assert torch.equal(local(got), expected)
    with exact_dispatch(layer):
        assert torch.equal(layer(x)[0], run(make_layer(ctx, "alltoall", moe_node_deduplication="off")[0], x)["y"])


def node_scope_compresses_what_crosses() -> None:
    ctx = two_by_two()
    x = tokens(ctx.rank)
    for lsh in (
        LSHConfig(lsh_target_rate=0.25, lsh_probe_interval=1),
        LSHConfig(lsh_clustering="bucket", lsh_num_hashes=1, lsh_hash_width=2),
        LSHConfig(lsh_target_rate=0.25, lsh_wire_dtype="int4"),
    ):
        layer, telemetry = make_layer(ctx, "lsh", lsh)
        layer.set_iteration(0)
        got = run(layer, x)
        assert all(value.isfinite().all() for value in got.values())
        (report,) = telemetry.collect(ctx, iterations=1)
        network, flat = report["alltoall_bytes_network"], report["alltoall_bytes_network_uncompressed"]
        assert network is not None and flat is not None and 0 < network < 0.8 * flat
        if lsh.lsh_clustering == "budget":
            groups = 4 * EXPERTS / 2  # each rank clusters for the experts of the other node's rank of its place
            rows = flat / (4 * ROW)
            bytes_per_row = ROW if lsh.lsh_wire_dtype is None else HIDDEN // 2 + 4
            assert network <= (0.25 * rows + groups) * 4 * bytes_per_row
        assert report["lsh_compression_rate"] < report["expert_rows_rate"] < 1
        assert report["forwarded_rows_max_over_mean"] >= 1
        if lsh.lsh_probe_interval:
            assert 0 < report["lsh_restored_error"] < 1
            pieces, _ = make_layer(ctx, "lsh", lsh, moe_overlap_chunks=2)
            assert all(torch.equal(value, got[name]) for name, value in run(pieces, x).items())


def deduplication_is_exact() -> None:
    """To fp32 rounding, gradients included; each movement sends the distinct (token, remote node) pairs."""
    ctx = two_by_two()
    x, nobody = tokens(ctx.rank), torch.zeros(SEQUENCE, BATCH, dtype=torch.bool)
    for topk in (2, 4):
        for mask in (None, nobody if ctx.rank == 2 else ~nobody, nobody):
            moe = {"moe_router_topk": topk}
            exact = run(make_layer(ctx, "alltoall", moe_node_deduplication="off", **moe)[0], x, mask)
            layer, telemetry = make_layer(ctx, "alltoall", moe_node_deduplication="on", **moe)
            assert layer.dispatcher.current == "deduplicated"
            got = run(layer, x, mask)
            for name, expected in exact.items():
                torch.testing.assert_close(got[name], expected, rtol=1e-4, atol=1e-6, msg=name)
            (report,) = telemetry.collect(ctx, iterations=1)
            if mask is None:
                x_TD = x.detach().flatten(0, 1)
                ids = layer.router(x_TD).expert_ids_TK
                far = ((ids // (EXPERTS // 2)) != ctx.rank // 2).any(1).sum().double()
                dist.all_reduce(far)
                metadata = topk * (4 + 4)
                there, back = ROW + metadata, ROW  # ids and weights go along; the weights' gradients come back
                expected_bytes = float(far) * (there + back + back + ROW + topk * 4)
                assert report["alltoall_bytes_network"] == expected_bytes
                assert report["alltoall_bytes_network"] < report["alltoall_bytes_network_uncompressed"]
    memo = ReplayMemo()
    layer, _ = make_layer(ctx, "alltoall", moe_node_deduplication="on")
    direct = run(layer, x)
    y, aux = checkpoint(lambda inputs: layer(inputs, None, memo), x, use_reentrant=False)
    grads = torch.autograd.grad(y.pow(2).mean() + aux, [x, *layer.parameters()])
    for got_value, expected in zip([y, aux, *grads], direct.values(), strict=True):
        assert torch.equal(local(got_value), expected)
    pieces, _ = make_layer(ctx, "alltoall", moe_node_deduplication="on", moe_overlap_chunks=2)
    assert all(torch.equal(value, direct[name]) for name, value in run(pieces, x).items())
    with exact_dispatch(layer):
        flat = run(make_layer(ctx, "alltoall", moe_node_deduplication="off")[0], x)["y"]
        assert torch.equal(layer(x)[0], flat), "evaluation takes the flat way"


def both_hops_wait_once() -> None:
    """One exchange of counts plans them, whatever the capacity, in pieces too."""
    ctx = two_by_two()
    for more in ({}, {"moe_expert_capacity_factor": 1.0}, {"moe_overlap_chunks": 2}):
        for kind, moe in (("lsh", {}), ("alltoall", {"moe_node_deduplication": "on"})):
            found = count(ctx, kind, **moe, **more)
            assert found == [["arrival"], [], []], (kind, more, found)


def all_of_them() -> None:
    node_scope_is_exact_at_rate_one()
    node_scope_compresses_what_crosses()
    deduplication_is_exact()
    both_hops_wait_once()


def test_two_nodes_of_two_ranks() -> None:
    run_distributed_test(all_of_them, 4, timeout_s=240.0)


def two_by_four() -> None:
    """Eight ranks, one expert each: both ways are the plain all-to-all where they say so."""
    ctx = initialize(ParallelConfig(expert_model_parallel_size=8, moe_node_size=4))
    assert (ctx.ep_node.size, ctx.ep_local.size) == (2, 4)
    x = tokens(ctx.rank)
    exact = run(make_layer(ctx, "alltoall", moe_node_deduplication="off")[0], x)
    whole = run(make_layer(ctx, "lsh", FULL)[0], x)
    assert all(torch.equal(whole[name], value) for name, value in exact.items())
    fewer = LSHConfig(lsh_target_rate=0.3)
    compressed = run(make_layer(ctx, "lsh", fewer)[0], x)
    assert not torch.equal(compressed["y"], exact["y"])
    for dispatcher, lsh, expected in (("alltoall", FULL, exact), ("lsh", fewer, compressed)):
        # More pieces than experts on a rank: these are cut, too, and gradients of weights are sums of parts.
        layer, _ = make_layer(ctx, dispatcher, lsh, moe_node_deduplication="on", moe_overlap_chunks=3)
        for name, value in run(layer, x).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5, msg=f"{dispatcher}: {name}")


@pytest.mark.slow
def test_two_nodes_of_four_ranks() -> None:
    run_distributed_test(two_by_four, 8, timeout_s=400.0)


def test_pieces_where_deduplication_has_none() -> None:
    """A row that crosses the network has experts in several pieces."""
    assert not deduplicates(spec(4, 4, 1, moe_overlap_chunks=2)) and deduplicates(spec(4, 4, 2, moe_overlap_chunks=2))
    with pytest.raises(ConfigError, match=r"moe_overlap_chunks \(2\) must be 1 with moe.moe_node_deduplication \(on\)"):
        deduplicated_dispatcher(spec(4, 4, 1, moe_overlap_chunks=2, moe_node_deduplication="on"))


def spec(ranks: int, ep: int, node: int, **settings: object) -> DispatcherSpec:
    ctx = offline_context(ParallelLayout(ranks, ep=ep), device="cpu", ranks_per_node=node)
    moe = MoEConfig(num_experts=ep * 2, moe_router_topk=2)
    lsh = LSHConfig()
    for name, value in settings.items():
        setattr(lsh if hasattr(lsh, name) else moe, name, value)
    return DispatcherSpec(moe, lsh, ctx, 64, ep * 2, 0)


def test_scope_follows_from_the_groups_ranks() -> None:
    assert scope_of(spec(4, 4, 2)) == "node"
    assert scope_of(spec(4, 4, 2, lsh_scope="rank")) == "rank"
    assert (
        scope_of(spec(4, 4, 4))
        == scope_of(spec(4, 1, 2))
        == scope_of(spec(4, 4, 1))
        == scope_of(spec(8, 2, 4))
        == "rank"
    )
    assert scope_of(spec(24, 12, 8)) == "rank"  # 8 + 4 ranks
    for uneven in (spec(24, 12, 8, lsh_scope="node"), spec(4, 4, 4, lsh_scope="node"), spec(4, 4, 1, lsh_scope="node")):
        with pytest.raises(ConfigError, match=r"lsh\.lsh_scope \(node\)"):
            scope_of(uneven)
    line = describe(spec(24, 12, 8, moe_token_dispatcher_type="lsh"))
    assert line is not None and "8 + 4 ranks" in line and "by itself" in line
    line = describe(spec(4, 4, 2, moe_token_dispatcher_type="lsh"))
    assert line is not None and "LSH at node scope; 0.20 rows per token cross the network instead of 1.00" in line
    line = describe(spec(4, 4, 2))
    assert line is not None and "about 0.75 per token" in line
    assert describe(spec(4, 4, 4)) is None


def test_deduplication_where_it_sends_fewer_bytes() -> None:
    assert deduplicates(spec(4, 4, 2)) and deduplicates(spec(4, 4, 1))
    assert not deduplicates(spec(4, 4, 4)) and not deduplicates(spec(4, 4, 2, moe_node_deduplication="off"))
    assert not deduplicates(spec(4, 4, 2, moe_router_topk=1))
    assert deduplicates(spec(4, 4, 2, moe_router_topk=1, moe_node_deduplication="on"))


def test_experts_in_the_order_of_the_ranks_they_go_through() -> None:
    order = node_order(nodes=2, ranks=2, local_experts=2, device=torch.device("cpu"))
    # Ranks (0,0) (0,1) (1,0) (1,1) hold experts 01 23 45 67; through local rank 0 go 01 45, through 1 go 23 67.
    assert torch.argsort(order).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


def test_a_node_has_at_least_one_rank() -> None:
    with pytest.raises(ConfigError, match=r"moe_node_size \(0\) must be at least 1"):
        validate(parse_args(["--moe-node-size", "0"]), 1)
