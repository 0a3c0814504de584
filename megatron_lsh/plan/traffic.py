"""Who of a group is on which node, and what a layer sends between ranks. Arithmetic only, under even routing."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from megatron_lsh.config.config import required
from megatron_lsh.config.pipeline import Stages
from megatron_lsh.models.stacks import Stack
from megatron_lsh.parallel.layout import ParallelLayout


class Spread(NamedTuple):
    """How a kind of groups lies on nodes, as a mean over ranks.

    Attributes:
        size: ranks of a group.
        far, near: the other ranks of it that are on other nodes, and on the same one.
        nodes: that a group is on, at most.
    """

    size: int
    far: float
    near: float
    nodes: int

    @property
    def per_node(self) -> float:
        """Ranks of the group on a node."""
        return self.near + 1


@lru_cache(maxsize=4096)
def spread(layout: ParallelLayout, node_size: int, *dimensions: str) -> Spread:
    """Of the groups of these dimensions, with `node_size` ranks on a node, in rank order."""
    nodes_GP = np.asarray(layout.groups(*dimensions)) // node_size
    sorted_GP = np.sort(nodes_GP, axis=1)
    starts_GP = np.diff(sorted_GP, axis=1, prepend=-1) != 0
    # Pairs on one node, each rank with itself among them: the squares of the lengths of equal runs.
    lengths = np.diff(np.flatnonzero(starts_GP.ravel()), append=nodes_GP.size)
    same = float((lengths.astype(float) ** 2).sum()) / nodes_GP.size
    size = nodes_GP.shape[1]
    return Spread(size, size - same, same - 1.0, int(starts_GP.sum(axis=1).max()))


def rows_to_experts(layers: int, topk: int, layout: ParallelLayout, node_size: int) -> float:
    """Rows per token that leave a node: a row goes to its expert and back, and its gradient as well."""
    experts = spread(layout, node_size, "ep")
    return 4.0 * layers * topk * experts.far / experts.size


def keys_to_sharers(layers: int, sharers: float) -> float:
    """In each layer a token's key and its value go to the `sharers` of its sequence, and their gradients come back."""
    return 4.0 * layers * sharers


def rows_to_sharers(num_layers: int | None, layout: ParallelLayout, node_size: int) -> float:
    """Keys and values per token that leave a node."""
    return keys_to_sharers(required(num_layers), spread(layout, node_size, "cp").far)


@lru_cache(maxsize=4096)
def rows_to_stages(layout: ParallelLayout, stages: Stages, node_size: int) -> float:
    """A token's hidden states go from one virtual stage to the next, and their gradient comes back."""
    nodes_GP = np.asarray(layout.groups("pp")) // node_size
    place = np.arange(stages.ranks * stages.chunks) % stages.ranks
    return 2.0 * float((nodes_GP[:, place[:-1]] != nodes_GP[:, place[1:]]).sum(1).mean())


def tensor_parallel_passes(stack: Stack, *, is_moe: bool) -> int:
    """Collectives of one layer among tensor-parallel ranks, forward and backward, each of which brings every rank the
    activations of the others: each pair of column and row parallel layers is entered and left, twice."""
    pairs = 2 if stack.memory_length else 1  # attentions
    dense = not is_moe or stack.cfg.moe.moe_shared_expert_intermediate_size is not None
    return 4 * (pairs + dense)


def reduced(ranks: int, sharded: bool, gradient_bytes: float, parameter_bytes: float) -> float:
    """Bytes that a rank sends for the gradients of a step: a ring all-reduce, or a reduce-scatter, and the parameters
    gathered again."""
    share = (ranks - 1) / ranks
    return share * (gradient_bytes + (parameter_bytes if sharded else gradient_bytes))
