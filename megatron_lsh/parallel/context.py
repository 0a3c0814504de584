"""What a module needs to know about its place in the world, passed in explicitly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from megatron_lsh.parallel.layout import ParallelLayout

TP = "tp"
EP = "ep"
DENSE_DATA = ("dp_replicate", "dp_shard")
EXPERT_DATA = ("edp_replicate", "edp_shard")


@dataclass(frozen=True)
class Group:
    """One process group seen from this rank. `process_group` is None where there is no torch.distributed."""

    process_group: dist.ProcessGroup | None
    size: int
    rank: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class ParallelContext:
    """Groups, meshes and device of this rank. Made by ``initialize`` or ``offline_context``; never changes.

    dense_mesh has dimensions ("dp_replicate", "dp_shard", "tp"), expert_mesh ("edp_replicate", "edp_shard", "ep").
    With a sharded optimizer the shard dimension has the data parallel size and replicate is 1, else the reverse.
    Both are None offline.
    """

    layout: ParallelLayout
    rank: int
    device: torch.device
    world: Group
    tp: Group
    dp: Group
    ep: Group
    edp: Group
    dense_mesh: DeviceMesh | None = None
    expert_mesh: DeviceMesh | None = None
    sequence_parallel: bool = False
    shard_optimizer: bool = False


def offline_context(
    layout: ParallelLayout | None = None,
    rank: int = 0,
    device: torch.device | str = "meta",
    *,
    sequence_parallel: bool = False,
    shard_optimizer: bool = False,
) -> ParallelContext:
    """A context without torch.distributed: for --dry-run (any layout, no communication possible) and for modules
    used on one rank (the default layout). Parameters made with it are plain tensors of this rank's shape.
    """
    layout = layout or ParallelLayout(1)
    return ParallelContext(
        layout=layout,
        rank=rank,
        device=torch.device(device),
        world=_offline_group([list(range(layout.world_size))], rank),
        tp=_offline_group(layout.tp_groups(), rank),
        dp=_offline_group(layout.dp_groups(), rank),
        ep=_offline_group(layout.ep_groups(), rank),
        edp=_offline_group(layout.edp_groups(), rank),
        sequence_parallel=sequence_parallel and layout.tp > 1,
        shard_optimizer=shard_optimizer,
    )


def _offline_group(groups: list[list[int]], rank: int) -> Group:
    ranks = find_ranks(groups, rank)
    return Group(None, len(ranks), ranks.index(rank), ranks)


def find_ranks(groups: list[list[int]], rank: int) -> tuple[int, ...]:
    """The member of `groups` that contains `rank`. Raises ValueError if none does."""
    for ranks in groups:
        if rank in ranks:
            return tuple(ranks)
    raise ValueError(f"rank {rank} is outside every group of {groups}")
