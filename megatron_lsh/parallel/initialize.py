"""Start torch.distributed and make every process group and device mesh, once, before anything else communicates."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from types import MappingProxyType

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from megatron_lsh.config.parallel import ParallelConfig
from megatron_lsh.config.pipeline import Stages
from megatron_lsh.errors import ConfigError, first_line
from megatron_lsh.parallel.context import (
    DENSE_DATA,
    EP,
    EXPERT_DATA,
    TP,
    Group,
    Links,
    ParallelContext,
    ends_of,
    group_dimensions,
    offline_group,
)
from megatron_lsh.parallel.launcher import Place, adopt, check_complete, place_of
from megatron_lsh.parallel.layout import ParallelLayout

logger = logging.getLogger(__name__)

# Groups of one purpose share a communicator where they have the same ranks. Groups of different purposes never do:
# collectives of one communicator run in order, and a move of rows must not wait for a reduction of gradients.
PURPOSES = MappingProxyType(
    {
        "pp": "stages",
        "stage": "gradients",
        "cp": "sequences",
        "tp": "activations",
        "tokens": "activations",
        "dp": "gradients",
        "dp_cp": "gradients",
        "edp": "gradients",
        "ep": "rows",
        "ep_node": "rows",
        "ep_local": "rows",
    }
)


def initialize(config: ParallelConfig, moe: bool = True) -> ParallelContext:
    """Initialise torch.distributed from the launcher's environment (one process without it) and cut the world into groups.

    All groups are created here, eagerly, with the user's time-out. `moe` says whether the model has experts: then
    tensor parallelism turns sequence parallelism on. Nodes are those of the launcher, or, with --moe-node-size, so
    many ranks each in rank order. Raises ConfigError, on every rank and before any connection is made, for sizes or devices
    that do not fit.
    """
    adopt(os.environ)
    check_complete(os.environ)
    place = place_of(os.environ)
    layout = ParallelLayout.from_config(config, place.world_size)
    device = _device(config, place)
    backend = _backend(config, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _init_process_group(backend, place, _timeout(config), device)
    return make_context(config, layout, place, device, moe=moe, ranks_per_node=config.moe_node_size)


def shutdown(context: ParallelContext) -> None:
    """Leave torch.distributed. The context must not be used afterwards."""
    if context.world.process_group is not None and dist.is_initialized():
        dist.destroy_process_group()


def _device(config: ParallelConfig, place: Place) -> torch.device:
    wanted = config.device
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "parallel.device (cuda) must be cpu, because this machine or this build of torch has no GPU: use --device cpu"
        )
    return torch.device("cuda", gpu_of(place, torch.cuda.device_count()))


def gpu_of(place: Place, gpus: int) -> int:
    """Index of this rank's GPU among those that its process sees. Raises ConfigError if there is none for it."""
    if gpus == 1 and not place.by_torchrun:
        return 0  # srun and its like can give each task a GPU of its own, which is then the only one it sees
    if place.local_rank >= gpus:
        raise ConfigError(
            f"local rank ({place.local_rank}) must be less than the number of GPUs of this node ({gpus}): "
            "start one rank per GPU (torchrun --nproc-per-node) or use --device cpu"
        )
    return place.local_rank


def _backend(config: ParallelConfig, device: torch.device) -> str:
    needed = "nccl" if device.type == "cuda" else "gloo"
    if config.distributed_backend not in ("auto", needed):
        raise ConfigError(
            f"parallel.distributed_backend ({config.distributed_backend}) must be {needed} on device {device.type}: "
            f"use --distributed-backend {needed}, or another --device"
        )
    return needed


def _timeout(config: ParallelConfig) -> timedelta:
    return timedelta(minutes=config.distributed_timeout_minutes)


def _init_process_group(backend: str, place: Place, timeout: timedelta, device: torch.device) -> None:
    # On GPUs the world can also move CPU tensors: asynchronous checkpoints coordinate over gloo.
    backends = "cpu:gloo,cuda:nccl" if backend == "nccl" else backend
    device_id = device if backend == "nccl" else None  # binds the rank to its GPU; communicators are made eagerly
    if "RANK" in os.environ:
        try:
            dist.init_process_group(backends, timeout=timeout, device_id=device_id)
        except dist.DistError as error:
            raise ConfigError(
                f"rank {place.rank} did not meet the other ranks of {place.world_size} at "
                f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({first_line(error)}): see that all were "
                "started, and that MASTER_ADDR names the machine of rank 0 and MASTER_PORT a free port of it"
            ) from error
    else:
        store = dist.HashStore()
        dist.init_process_group(backends, store=store, rank=0, world_size=1, timeout=timeout, device_id=device_id)


def make_context(
    config: ParallelConfig,
    layout: ParallelLayout,
    place: Place,
    device: torch.device,
    *,
    moe: bool = True,
    ranks_per_node: int | None = None,
) -> ParallelContext:
    """All groups and meshes of `layout`, seen from this rank. Collective; torch.distributed must be initialised."""
    node_of_rank = _node_of_rank(place, ranks_per_node)
    layout = layout.on_nodes(node_of_rank)
    sequence_parallel = _sequence_parallel(config, layout, place.rank, moe)
    dimensions = group_dimensions(sequence_parallel).items()
    ranks_of = {name: layout.group_of(place.rank, *names) for name, names in dimensions}

    def make(ranks: tuple[int, ...]) -> Group:
        timeout, backend = _timeout(config), _backend(config, device)
        process_group = dist.new_group(sorted(ranks), timeout, backend, use_local_synchronization=True)
        return replace(offline_group(ranks, place.rank), process_group=process_group)

    world = replace(offline_group(tuple(range(layout.world_size)), place.rank), process_group=dist.group.WORLD)
    if layout.pp == 1:
        del ranks_of["stage"]  # the world, which is there
    groups = _make_groups(ranks_of, place.rank, make)
    groups.setdefault("stage", world)
    stages = Stages.from_config(config)
    alone, shard = groups.pop("alone"), config.use_distributed_optimizer
    links, groups["ends"] = Links(), alone
    if layout.pp > 1:
        links, groups["ends"] = _make_links(groups["pp"].ranks, place.rank, stages.chunks > 1, make)

    def mesh(data: str, model: str, *dimensions: str) -> DeviceMesh:
        """Over the ranks of this pipeline stage. The data parallel group is the shard or the replicate dimension."""
        replicate_group, shard_group = (alone, groups[data]) if shard else (groups[data], alone)
        parts = (replicate_group, shard_group, groups[model])
        ranks = torch.tensor(layout.group_of(place.rank, *dimensions)).view([part.size for part in parts])
        names = (*DENSE_DATA, TP) if model == TP else (*EXPERT_DATA, EP)
        process_groups = [part.process_group for part in parts]
        return DeviceMesh.from_group(process_groups, device.type, mesh=ranks, mesh_dim_names=names)  # type: ignore[arg-type]

    return ParallelContext(
        layout=layout,
        rank=place.rank,
        local_rank=place.local_rank,
        device=device,
        node_of_rank=node_of_rank,
        world=world,
        links=links,
        stages=stages,
        dense_mesh=mesh("dp_cp", TP, "dp", "cp", "tp"),
        expert_mesh=mesh("edp", EP, "edp", "ep"),
        sequence_parallel=sequence_parallel,
        shard_optimizer=shard,
        **groups,
    )


def _node_of_rank(place: Place, ranks_per_node: int | None) -> tuple[int, ...]:
    if ranks_per_node is not None:
        return tuple(rank // ranks_per_node for rank in range(place.world_size))
    nodes: list[str] = [place.node] * place.world_size
    dist.all_gather_object(nodes, place.node)
    numbers = {node: number for number, node in enumerate(dict.fromkeys(nodes))}
    return tuple(numbers[node] for node in nodes)


def _make_groups(
    ranks_of: dict[str, tuple[int, ...]], rank: int, make: Callable[[tuple[int, ...]], Group]
) -> dict[str, Group]:
    """A group for each name, and one of this rank alone, "alone", which is what every group of one rank is.

    Each rank makes only its own group of each kind. All ranks do so in the same order, hence no deadlock and a number
    of rendezvous that does not grow with the world.
    """
    made: dict[tuple[str, tuple[int, ...]], Group] = {}
    groups = {}
    for name, ranks in ({"alone": (rank,)} | ranks_of).items():
        key = (PURPOSES[name] if len(ranks) > 1 else "alone", ranks)
        if key not in made:
            made[key] = make(ranks)
        groups[name] = made[key]
    return groups


def _make_links(
    pipeline: tuple[int, ...], rank: int, ring: bool, make: Callable[[tuple[int, ...]], Group]
) -> tuple[Links, Group]:
    """Links of a rank to its neighbours in the pipeline, and the group of the pipeline's ends.

    torch names a group after its ranks and the number of groups that were made before. So every rank makes one of each
    kind in each round, if need be of itself alone; in a round no rank has two neighbours.
    """
    ends, links = make(ends_of(pipeline, rank)), {}
    size, place = len(pipeline), pipeline.index(rank)
    for turn in range(3 if ring and size % 2 else 2):
        # Link i leads from place i to the next one; of a ring of odd length, the last one has a round of its own.
        mine = [i for i in ((place - 1) % size, place) if (2 if size % 2 and i == size - 1 else i % 2) == turn]
        link = next((i for i in mine if ring or i < size - 1), None)
        for kind in ("activations", "gradients"):
            if link is None:
                make((rank,))
                continue
            pair = (pipeline[link], pipeline[(link + 1) % size])
            sends = rank == pair[0 if kind == "activations" else 1]
            links[f"{kind}_{'out' if sends else 'in'}"] = make(pair)
    return Links(**links), ends


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
