"""Groups and meshes of a running world."""

from __future__ import annotations

import logging
import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megatron_lsh.config.parallel import ParallelConfig
from megatron_lsh.errors import ConfigError
from megatron_lsh.parallel.context import Group, ParallelContext, group_dimensions
from megatron_lsh.parallel.initialize import initialize, make_context, shutdown
from megatron_lsh.parallel.launcher import place_of
from megatron_lsh.parallel.layout import ParallelLayout
from megatron_lsh.parallel.testing import run_distributed_test
from tests.parallel.toy import config


def check_groups(ctx: ParallelContext) -> None:
    dimensions = group_dimensions(ctx.sequence_parallel)
    for name, names in dimensions.items():
        group: Group = getattr(ctx, name)
        assert group.ranks == ctx.layout.group_of(ctx.rank, *names)
        assert group.ranks[group.rank] == ctx.rank and group.size == len(group.ranks)
        assert dist.get_process_group_ranks(group.process_group) == list(group.ranks)
        total = torch.tensor([ctx.rank])  # the group communicates, and among exactly these ranks
        dist.all_reduce(total, group=group.process_group)
        assert total.item() == sum(group.ranks)
    # Rows and gradients never wait for each other, also where the ranks are the same.
    purposes = [ctx.world, ctx.tp, ctx.dp, ctx.ep]
    apart = [group.process_group for group in purposes if group.size > 1]
    assert len(set(apart)) == len(apart)


def check_meshes(ctx: ParallelContext, shard: bool) -> None:
    layout, dense, expert = ctx.layout, ctx.dense_mesh, ctx.expert_mesh
    assert dense is not None and expert is not None
    assert dense.mesh_dim_names == ("dp_replicate", "dp_shard", "tp")
    assert expert.mesh_dim_names == ("edp_replicate", "edp_shard", "ep")
    assert tuple(dense.mesh.shape) == ((1, layout.dp, layout.tp) if shard else (layout.dp, 1, layout.tp))
    assert tuple(expert.mesh.shape) == ((1, layout.edp, layout.ep) if shard else (layout.edp, 1, layout.ep))
    assert dense.get_group("tp") is ctx.tp.process_group and expert.get_group("ep") is ctx.ep.process_group
    assert dense.get_group("dp_shard" if shard else "dp_replicate") is ctx.dp.process_group
    assert expert.get_group("edp_shard" if shard else "edp_replicate") is ctx.edp.process_group
    assert dense["tp"].get_local_rank() == ctx.tp.rank and expert["ep"].get_local_rank() == ctx.ep.rank


def many_layouts(world_size: int, sizes: list[tuple[int, int]]) -> None:
    for tp, ep in sizes:
        for shard in (False, True):
            ctx = initialize(config(tp, ep, shard))
            assert ctx.world.size == world_size and ctx.rank == dist.get_rank() and ctx.shard_optimizer == shard
            assert ctx.sequence_parallel == (tp > 1)
            check_groups(ctx)
            check_meshes(ctx, shard)
    assert initialize(config(2), moe=False).sequence_parallel is False
    assert initialize(config(2, sequence_parallel=True), moe=False).sequence_parallel is True
    assert initialize(config(1, sequence_parallel=True), moe=False).sequence_parallel is False


def layouts_to_come() -> None:
    """Pipeline stages and context parallelism are refused as flags, but their groups and meshes are right already."""
    settings = config()
    initialize(settings)
    for layout in (ParallelLayout(4, tp=2, ep=2, pp=2), ParallelLayout(4, cp=2, ep=2), ParallelLayout(4, pp=2, cp=2)):
        ctx = make_context(settings, layout, place_of(os.environ), torch.device("cpu"))
        check_groups(ctx)
        for mesh, names in ((ctx.dense_mesh, ("dp", "cp", "tp")), (ctx.expert_mesh, ("edp", "ep"))):
            assert mesh is not None and tuple(mesh.mesh.flatten().tolist()) == layout.group_of(ctx.rank, *names)
        assert ctx.tokens.size == layout.cp * layout.tp


def nodes() -> None:
    rank = int(os.environ["RANK"])
    whole = initialize(config(ep=4))
    assert (whole.node_of_rank, whole.local_rank) == ((0, 0, 0, 0), rank)
    assert whole.ep_local is whole.ep and whole.ep_node.size == 1
    halves = initialize(replace(config(ep=4), moe_node_size=2))
    assert halves.node_of_rank == (0, 0, 1, 1) and halves.layout.ep_local == 2
    check_groups(halves)
    each = initialize(replace(config(ep=4), moe_node_size=1))
    assert each.ep_node is each.ep and each.ep_local.size == 1
    # As two torchruns of two ranks each would say it.
    os.environ.update(LOCAL_RANK=str(rank % 2), LOCAL_WORLD_SIZE="2")
    told = initialize(config(ep=4))
    assert (told.node_of_rank, told.local_rank) == ((0, 0, 1, 1), rank % 2)
    assert (told.ep_local.ranks, told.ep_node.ranks) == (halves.ep_local.ranks, halves.ep_node.ranks)


def four_ranks() -> None:
    many_layouts(4, [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 2)])
    layouts_to_come()
    nodes()


def test_four_ranks() -> None:
    run_distributed_test(four_ranks, 4)


def test_six_ranks_where_ep_does_not_divide_dp() -> None:
    run_distributed_test(many_layouts, 6, 6, [(3, 3), (2, 2), (3, 6)])


def the_users_timeout() -> None:
    ctx = initialize(config(2, 2))
    for group in (ctx.world, ctx.tp, ctx.dp, ctx.ep, ctx.edp, ctx.pp, ctx.tokens):
        backend = group.process_group._get_backend(torch.device("cpu"))
        assert backend.options._timeout.total_seconds() == 60.0
    shutdown(ctx)
    assert not dist.is_initialized()


def test_every_group_has_the_users_timeout_and_shutdown_ends_all() -> None:
    run_distributed_test(the_users_timeout, 2)


def without_torchrun() -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    ctx = initialize(config(shard=True))
    assert (ctx.rank, ctx.world.size, ctx.tp.size, ctx.device.type) == (0, 1, 1, "cpu")
    check_groups(ctx)


def test_one_process_without_torchrun() -> None:
    run_distributed_test(without_torchrun, 1)


def announced() -> list[str]:
    records: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    logging.getLogger("megatron_lsh").addHandler(Keep())
    initialize(config(2))
    return records


def test_turning_sequence_parallel_on_is_announced_once() -> None:
    first, second = run_distributed_test(announced, 2)
    assert len(first) == 1 and "sequence parallelism is on" in first[0] and second == []


@pytest.mark.parametrize(
    ("environment", "changes", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "4"}, {}, "MASTER_ADDR"),
        ({}, {"tensor_model_parallel_size": 2}, r"tensor_model_parallel_size \(2\)"),
        ({}, {"device": "cpu", "distributed_backend": "nccl"}, r"parallel.distributed_backend \(nccl\) must be gloo"),
        ({}, {"pipeline_model_parallel_size": 2}, r"pipeline_model_parallel_size \(2\)"),
    ],
)
def test_mistakes_are_refused_before_connecting(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], changes: dict[str, object], message: str
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        initialize(ParallelConfig(**changes))  # type: ignore[arg-type]
    assert not dist.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_asking_for_a_gpu_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match="no GPU"):
        initialize(ParallelConfig(device="cuda"))
