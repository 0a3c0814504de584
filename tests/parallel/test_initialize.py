"""Groups and meshes of a running world."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.distributed as dist

from megatron_lsh.config.parallel import ParallelConfig
from megatron_lsh.errors import ConfigError
from megatron_lsh.parallel.context import Group, ParallelContext
from megatron_lsh.parallel.initialize import initialize, shutdown
from megatron_lsh.parallel.testing import run_distributed_test
from tests.parallel.toy import config


def check_groups(ctx: ParallelContext) -> None:
    layout = ctx.layout
    here = layout.coordinates(ctx.rank)
    for kind in ("tp", "dp", "ep", "edp"):
        group: Group = getattr(ctx, kind)
        assert list(group.ranks) in getattr(layout, f"{kind}_groups")()
        assert group.ranks[group.rank] == ctx.rank and group.rank == getattr(here, kind)
        assert dist.get_process_group_ranks(group.process_group) == list(group.ranks)
        total = torch.tensor([ctx.rank])  # the group communicates, and among exactly these ranks
        dist.all_reduce(total, group=group.process_group)
        assert total.item() == sum(group.ranks)


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


def test_four_ranks() -> None:
    run_distributed_test(many_layouts, 4, 4, [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 2)])


def test_six_ranks_where_ep_does_not_divide_dp() -> None:
    run_distributed_test(many_layouts, 6, 6, [(3, 3), (2, 2), (3, 6)])


def the_users_timeout() -> None:
    ctx = initialize(config(2, 2))
    for group in (ctx.world, ctx.tp, ctx.dp, ctx.ep, ctx.edp):
        backend = group.process_group._get_backend(torch.device("cpu"))
        assert backend.options._timeout.total_seconds() == 60.0
    shutdown(ctx)
    assert not dist.is_initialized()


def test_every_group_has_the_users_timeout_and_shutdown_ends_all() -> None:
    run_distributed_test(the_users_timeout, 2)


def without_torchrun() -> None:
    import os

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
        ({}, {"tensor_model_parallel_size": 2}, "tensor_model_parallel_size is 2"),
        ({}, {"device": "cpu", "distributed_backend": "nccl"}, "distributed_backend is 'nccl'"),
        ({}, {"pipeline_model_parallel_size": 2}, "pipeline_model_parallel_size is 2"),
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
