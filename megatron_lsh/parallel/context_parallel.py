"""Context parallelism: the ranks of a group share every sequence, and each attends from its own positions to all.

A sequence is cut into 2 n chunks for n ranks; rank r has the chunks r and 2 n - 1 - r, one from the head and one from the
tail. Under causal attention chunk i looks at i + 1 chunks, so every rank looks at 2 n + 1 of them.

Legend: S whole sequence, s the positions of this rank in order (S/n), in the dimension that is named.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lsh.parallel.collectives import all_gather_sequence
from megatron_lsh.parallel.context import Group


def own_chunks(group: Group) -> tuple[int, int]:
    """Which of the 2 n chunks this rank holds."""
    return group.rank, 2 * group.size - 1 - group.rank


def own_positions(x: Tensor, group: Group, dim: int = 1) -> Tensor:
    """Of whole sequences along `dim`, this rank's positions: S -> s. Raises ValueError if they cannot be cut."""
    if group.size == 1:
        return x
    if x.shape[dim] % (2 * group.size):
        raise ValueError(f"a sequence of {x.shape[dim]} positions cannot be cut into {2 * group.size} chunks")
    chunks = x.chunk(2 * group.size, dim)
    return torch.cat([chunks[number] for number in own_chunks(group)], dim)


def gather_positions(x_s: Tensor, group: Group) -> Tensor:
    """All ranks' positions along dimension 0, in the order of the sequence: s -> S. Backward: summed, each rank its own."""
    if group.size == 1:
        return x_s
    parts = all_gather_sequence(x_s, group).unflatten(0, (group.size, 2, -1))  # rank, head or tail, place
    return torch.cat((parts[:, 0], parts[:, 1].flip(0))).flatten(0, 1)
