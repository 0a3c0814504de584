"""What a module needs to know about its place in the world, passed in explicitly."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from megatron_lsh.config.pipeline import Stages
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


class Links(NamedTuple):
    """Pairs of ranks between which a rank of a pipeline moves activations and gradients, one communicator for each.

    The last stage is linked to the first for interleaving only.
    """

    activations_in: Group | None = None
    activations_out: Group | None = None
    gradients_in: Group | None = None
    gradients_out: Group | None = None


@dataclass(frozen=True)
class ParallelContext:
    """Groups, meshes and device of this rank. Made by ``initialize`` or ``offline_context``; never changes.

    dense_mesh has dimensions ("dp_replicate", "dp_shard", "tp"), expert_mesh ("edp_replicate", "edp_shard", "ep").
    With a sharded optimizer the shard dimension has the data parallel size and replicate is 1, else the reverse.
    Both are None offline.

    Attributes:
        local_rank: number of this rank among those of its machine, as its launcher counts; chooses the GPU, and who of a
            machine writes shared files.
        node_of_rank: number of the node of each rank of the world, counted from 0 in order of appearance.
        dp_cp: ranks that hold the same slice of the dense parameters; ``dp`` are those of them with the same part of
            each sequence.
        ep_node, ep_local: the expert parallel group cut in two: ranks of equal place in all its nodes, and ranks of one
            node. See ``ParallelLayout.on_nodes`` for nodes that do not fit.
        tokens: ranks that share the tokens of one micro-batch, each holding others of them. What is counted or averaged
            over a micro-batch (loads of experts, their losses) is summed over this group.
        stage: ranks of the same pipeline stage, which hold the same layers; the world without pipeline parallelism.
        ends: on the first and the last stage the two ranks of this pipeline that are there; elsewhere this rank alone.
        stages: which layers each stage holds.
    """

    layout: ParallelLayout
    rank: int
    local_rank: int
    device: torch.device
    node_of_rank: tuple[int, ...]
    world: Group
    pp: Group
    dp: Group
    cp: Group
    tp: Group
    dp_cp: Group
    edp: Group
    ep: Group
    ep_node: Group
    ep_local: Group
    tokens: Group
    stage: Group
    ends: Group
    links: Links = field(default_factory=Links)
    stages: Stages = field(default_factory=Stages)
    dense_mesh: DeviceMesh | None = None
    expert_mesh: DeviceMesh | None = None
    sequence_parallel: bool = False
    shard_optimizer: bool = False

    @property
    def ep_spans_nodes(self) -> bool:
        """Whether this rank's expert-parallel group lies on several nodes."""
        return len({self.node_of_rank[rank] for rank in self.ep.ranks}) > 1


def group_dimensions(sequence_parallel: bool) -> dict[str, tuple[str, ...]]:
    """For each group of a context but the world, the dimensions of the layout in which its ranks differ.

    Where sequence parallelism is off, the ranks of a tensor parallel group hold the same tokens.
    """
    single = ("pp", "dp", "cp", "tp", "edp", "ep", "ep_node", "ep_local")
    tokens = ("cp", "tp") if sequence_parallel else ("cp",)
    return {name: (name,) for name in single} | {"dp_cp": ("dp", "cp"), "tokens": tokens, "stage": ("dp", "cp", "tp")}


def ends_of(pipeline: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """First and last rank of a pipeline, as one of them sees it; the others are alone."""
    ends = tuple(dict.fromkeys((pipeline[0], pipeline[-1])))
    return ends if rank in ends else (rank,)


def offline_context(
    layout: ParallelLayout | None = None,
    rank: int = 0,
    device: torch.device | str = "meta",
    *,
    sequence_parallel: bool = False,
    shard_optimizer: bool = False,
    ranks_per_node: int | None = None,
    stages: Stages | None = None,
) -> ParallelContext:
    """A context without torch.distributed: for --dry-run (any layout, no communication possible) and for modules
    used on one rank (the default layout). Parameters made with it are plain tensors of this rank's shape.

    Without `ranks_per_node` all ranks are on one node.
    """
    layout = layout or ParallelLayout(1)
    node_size = ranks_per_node or layout.world_size
    node_of_rank = tuple(other // node_size for other in range(layout.world_size))
    layout = layout.on_nodes(node_of_rank)
    sequence_parallel = sequence_parallel and layout.tp > 1
    dimensions = group_dimensions(sequence_parallel).items()
    groups = {name: offline_group(layout.group_of(rank, *names), rank) for name, names in dimensions}
    groups["ends"] = offline_group(ends_of(groups["pp"].ranks, rank), rank)
    return ParallelContext(
        layout=layout,
        rank=rank,
        local_rank=rank % node_size,
        device=torch.device(device),
        node_of_rank=node_of_rank,
        world=offline_group(tuple(range(layout.world_size)), rank),
        stages=stages or Stages(layout.pp),
        dense_mesh=None,
        expert_mesh=None,
        sequence_parallel=sequence_parallel,
        shard_optimizer=shard_optimizer,
        links=Links(),
        **groups,
    )


def offline_group(ranks: tuple[int, ...], rank: int) -> Group:
    """The group of `ranks` as `rank` sees it, without means to communicate."""
    return Group(None, len(ranks), ranks.index(rank), ranks)
