"""Start torch.distributed and make every process group and device mesh, once, before anything else communicates."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from megatron_lsh.config.parallel import ParallelConfig
from megatron_lsh.errors import ConfigError
from megatron_lsh.parallel.context import DENSE_DATA, EP, EXPERT_DATA, TP, Group, ParallelContext, find_ranks
from megatron_lsh.parallel.layout import ParallelLayout

logger = logging.getLogger(__name__)


def initialize(config: ParallelConfig, moe: bool = True) -> ParallelContext:
    """Initialise torch.distributed from torchrun's environment (one process without it) and cut the world into groups.

    All groups are created here, eagerly, with the user's time-out. `moe` says whether the model has experts: then
    tensor parallelism turns sequence parallelism on. Raises ConfigError, on every rank and before any connection is
    made, for sizes or devices that do not fit.
    """
    rank, local_rank, world_size = _environment(os.environ)
    layout = ParallelLayout.from_config(config, world_size)
    device = _device(config, local_rank)
    backend = _backend(config, device)
    timeout = timedelta(minutes=config.distributed_timeout_minutes)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _init_process_group(backend, rank, world_size, timeout, device)
    return _make_context(config, layout, rank, device, backend, timeout, moe)


def shutdown(context: ParallelContext) -> None:
    """Leave torch.distributed. The context must not be used afterwards."""
    if context.world.process_group is not None and dist.is_initialized():
        dist.destroy_process_group()


def _environment(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, local rank, world size) as torchrun sets them; (0, 0, 1) when started without it."""
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return 0, 0, 1
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ConfigError(f"environment variables {missing} are not set but other torchrun variables are: use torchrun")
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    return rank, int(environment.get("LOCAL_RANK", rank)), world_size


def _device(config: ParallelConfig, local_rank: int) -> torch.device:
    wanted = config.device
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device is 'cuda'; this machine or this build of torch has no GPU: use --device cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU of its own; this node has {torch.cuda.device_count()}: "
            "start one rank per GPU (torchrun --nproc-per-node) or use --device cpu"
        )
    return torch.device("cuda", local_rank)


def _backend(config: ParallelConfig, device: torch.device) -> str:
    needed = "nccl" if device.type == "cuda" else "gloo"
    if config.distributed_backend not in ("auto", needed):
        raise ConfigError(
            f"distributed_backend is {config.distributed_backend!r}; on device {device.type!r} it must be {needed!r}: "
            f"use --distributed-backend {needed}, or another --device"
        )
    return needed


def _init_process_group(backend: str, rank: int, world_size: int, timeout: timedelta, device: torch.device) -> None:
    # On GPUs the world can also move CPU tensors: asynchronous checkpoints coordinate over gloo.
    backends = "cpu:gloo,cuda:nccl" if backend == "nccl" else backend
    device_id = device if backend == "nccl" else None  # binds the rank to its GPU; communicators are made eagerly
    if "RANK" in os.environ:
        dist.init_process_group(backends, timeout=timeout, device_id=device_id)
    else:
        store = dist.HashStore()
        dist.init_process_group(
            backends, store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=device_id
        )


def _make_context(
    config: ParallelConfig,
    layout: ParallelLayout,
    rank: int,
    device: torch.device,
    backend: str,
    timeout: timedelta,
    moe: bool,
) -> ParallelContext:
    def group(groups: list[list[int]]) -> Group:
        # Each rank makes only its own group of each kind. All ranks do so in the same order, hence no deadlock and a
        # number of rendezvous that does not grow with the world.
        ranks = find_ranks(groups, rank)
        process_group = dist.new_group(ranks, timeout=timeout, backend=backend, use_local_synchronization=True)
        return Group(process_group, len(ranks), ranks.index(rank), ranks)

    world_ranks = tuple(range(layout.world_size))
    world = Group(dist.group.WORLD, layout.world_size, rank, world_ranks)
    tp, dp = group(layout.tp_groups()), group(layout.dp_groups())
    ep, edp = group(layout.ep_groups()), group(layout.edp_groups())
    alone = group([[r] for r in world_ranks])
    shard = config.use_distributed_optimizer
    return ParallelContext(
        layout=layout,
        rank=rank,
        device=device,
        world=world,
        tp=tp,
        dp=dp,
        ep=ep,
        edp=edp,
        dense_mesh=_mesh(dp, tp, alone, shard, device, (*DENSE_DATA, TP)),
        expert_mesh=_mesh(edp, ep, alone, shard, device, (*EXPERT_DATA, EP)),
        sequence_parallel=_sequence_parallel(config, layout, rank, moe),
        shard_optimizer=shard,
    )


def _mesh(
    data: Group, model: Group, alone: Group, shard: bool, device: torch.device, names: tuple[str, ...]
) -> DeviceMesh:
    """(replicate, shard, tp or ep) mesh over the world; the data parallel group is the shard or replicate dimension."""
    replicate_group, shard_group = (alone, data) if shard else (data, alone)
    groups = [group.process_group for group in (replicate_group, shard_group, model)]
    ranks = torch.arange(data.size * model.size).view(replicate_group.size, shard_group.size, model.size)
    return DeviceMesh.from_group(groups, device.type, mesh=ranks, mesh_dim_names=names)  # type: ignore[arg-type]


def _sequence_parallel(config: ParallelConfig, layout: ParallelLayout, rank: int, moe: bool) -> bool:
    if layout.tp == 1:
        return False
    if moe and not config.sequence_parallel and rank == 0:
        logger.warning(
            "sequence parallelism is on: tensor_model_parallel_size is %d and a mixture of experts needs each token "
            "on one rank of the tensor parallel group only (--sequence-parallel says so explicitly)",
            layout.tp,
        )
    return moe or config.sequence_parallel
