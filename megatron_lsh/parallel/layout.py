"""Which rank belongs to which process group: arithmetic only, usable without torch.distributed.

The same world is cut twice. A rank is a number with one digit per dimension, the last one fastest, as in Megatron-LM's
order tp-cp-ep-dp-pp:

    dense parameters     (pp, dp, cp, tp)
    expert parameters    (pp, edp, ep, etp)      where ep itself is (ep_node, ep_local)

so EP must divide the ranks of a pipeline stage, but need not divide DP (Megatron-LM calls this parallel folding). Ranks
that are neighbours in a tensor or expert parallel group are neighbours in the world, hence on one node where they fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import prod
from typing import TYPE_CHECKING

from megatron_lsh.errors import ConfigError

if TYPE_CHECKING:
    from megatron_lsh.config.parallel import ParallelConfig

DENSE = ("pp", "dp", "cp", "tp")
EXPERT = ("pp", "edp", "ep_node", "ep_local", "etp")


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of all dimensions. Raises ConfigError if they do not fit the world.

    Attributes:
        world_size: number of ranks.
        tp, ep, pp, cp, etp: tensor, expert, pipeline, context and expert tensor parallel size.
        ep_local: ranks of an expert parallel group in each node. 1 where nodes play no part: each rank then counts as
            a node of its own. See ``on_nodes``.
    """

    world_size: int
    tp: int = 1
    ep: int = 1
    pp: int = 1
    cp: int = 1
    etp: int = 1
    ep_local: int = 1

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise ConfigError(f"world size ({self.world_size}) must be at least 1: start at least one rank")
        pipeline = ("pipeline_model_parallel_size", self.pp)
        self._check_fit(pipeline, ("context_parallel_size", self.cp), ("tensor_model_parallel_size", self.tp))
        self._check_fit(pipeline, ("expert_model_parallel_size", self.ep), ("expert_tensor_parallel_size", self.etp))
        if self.ep_local < 1 or self.ep % self.ep_local:
            raise ConfigError(
                f"ranks per node of an expert parallel group ({self.ep_local}) must divide "
                f"parallel.expert_model_parallel_size ({self.ep}): change --expert-model-parallel-size"
            )

    def _check_fit(self, *sizes: tuple[str, int]) -> None:
        product = prod(size for _, size in sizes)
        if all(size >= 1 for _, size in sizes) and self.world_size % product == 0:
            return
        what = " times ".join(f"parallel.{name} ({size})" for name, size in sizes if size != 1)
        fits = [n for n in range(1, self.world_size + 1) if self.world_size % n == 0]
        raise ConfigError(
            f"{what} must divide the number of ranks ({self.world_size}), so be one of {fits}: "
            "change it or start another number of ranks"
        )

    @classmethod
    def from_config(cls, config: ParallelConfig, world_size: int) -> ParallelLayout:
        """Layout for the user's flags on `world_size` ranks. Raises ConfigError for sizes that do not fit."""
        experts = config.expert_tensor_parallel_size
        if experts not in (1, None):
            raise ConfigError(
                f"parallel.expert_tensor_parallel_size ({experts}) must be 1, nothing else is implemented: set "
                "--expert-tensor-parallel-size 1"
            )
        return cls(
            world_size,
            config.tensor_model_parallel_size,
            config.expert_model_parallel_size,
            config.pipeline_model_parallel_size,
            config.context_parallel_size,
        )

    @property
    def dp(self) -> int:
        """Data parallel size of dense parameters; also how many different micro-batches run at once."""
        return self.world_size // (self.pp * self.cp * self.tp)

    @property
    def edp(self) -> int:
        """Data parallel size of expert parameters."""
        return self.world_size // (self.pp * self.ep * self.etp)

    @property
    def ep_node(self) -> int:
        """Nodes over which an expert parallel group is spread."""
        return self.ep // self.ep_local

    def group_of(self, rank: int, *names: str) -> tuple[int, ...]:
        """The ranks that differ from `rank` in the named dimensions only, in rising order.

        The names are of one cut: of pp, dp, cp, tp, or of pp, edp, ep, ep_node, ep_local, etp. Raises ValueError
        otherwise. ``group_of(rank)`` is the rank alone.
        """
        ranks = [rank]
        for size, stride in self._digits(names):
            first = rank // stride % size
            ranks = [other + (digit - first) * stride for other in ranks for digit in range(size)]
        return tuple(ranks)

    def groups(self, *names: str) -> list[list[int]]:
        """All groups of ``group_of``, in the order of their first ranks. They part the world."""
        digits = self._digits(names)
        firsts = [r for r in range(self.world_size) if all(r // stride % size == 0 for size, stride in digits)]
        return [list(self.group_of(first, *names)) for first in firsts]

    def _digits(self, names: Sequence[str]) -> list[tuple[int, int]]:
        """(size, stride) of the named dimensions, slowest first."""
        wanted = {part for name in names for part in (("ep_node", "ep_local") if name == "ep" else (name,))}
        cut = DENSE if wanted <= set(DENSE) else EXPERT
        if not wanted <= set(cut):
            raise ValueError(f"{names} must be dimensions of one cut: of {DENSE} or of {(*EXPERT, 'ep')}")
        digits, stride = [], 1
        for name in reversed(cut):
            size = getattr(self, name)
            if name in wanted:
                digits.append((size, stride))
            stride *= size
        return digits[::-1]

    def ep_ranks_per_node(self, node_of_rank: Sequence[int]) -> int | None:
        """How many ranks of an expert parallel group each of its nodes has; None if that differs, or if the ranks of a
        node do not follow one another in the group."""
        sizes = set()
        for group in self.groups("ep"):
            runs = [(node, len(list(ranks))) for node, ranks in groupby(node_of_rank[rank] for rank in group)]
            if len({node for node, _ in runs}) < len(runs):
                return None
            sizes |= {length for _, length in runs}
        return sizes.pop() if len(sizes) == 1 else None

    def on_nodes(self, node_of_rank: Sequence[int]) -> ParallelLayout:
        """This layout with ``ep_local`` from the node of each rank; 1 if expert parallel groups do not fit nodes."""
        return replace(self, ep_local=self.ep_ranks_per_node(node_of_rank) or 1)
