"""Which rank belongs to which process group: arithmetic only, usable without torch.distributed.

The same world is cut twice. Dense parameters see (data, tensor) and expert parameters see (expert-data, expert):

    rank = dp_rank * TP + tp_rank = edp_rank * EP + ep_rank

so EP must divide the world, but need not divide DP (Megatron-LM calls this parallel folding). Ranks that are
neighbours in a tensor or expert parallel group are neighbours in the world, hence on one node where they fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_lsh.errors import ConfigError

if TYPE_CHECKING:
    from megatron_lsh.config.parallel import ParallelConfig


@dataclass(frozen=True)
class Coordinates:
    """Index of one rank within its group of each kind."""

    tp: int
    dp: int
    ep: int
    edp: int


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of the groups. Raises ConfigError if they do not fit the world. Pipeline and context parallel are 1."""

    world_size: int
    tp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise ConfigError(f"world size is {self.world_size}; it must be at least 1: start at least one rank")
        for name, size in (("tensor_model_parallel_size", self.tp), ("expert_model_parallel_size", self.ep)):
            if size < 1 or self.world_size % size:
                fits = [n for n in range(1, self.world_size + 1) if self.world_size % n == 0]
                raise ConfigError(
                    f"{name} is {size}; it must divide the number of ranks, which is {self.world_size}: "
                    f"use one of {fits} or start another number of ranks"
                )

    @classmethod
    def from_config(cls, config: ParallelConfig, world_size: int) -> ParallelLayout:
        """Layout for the user's flags on `world_size` ranks. Raises ConfigError for sizes that do not fit."""
        expert_tp = config.expert_tensor_parallel_size
        for name, size in (
            ("pipeline_model_parallel_size", config.pipeline_model_parallel_size),
            ("context_parallel_size", config.context_parallel_size),
            ("expert_tensor_parallel_size", 1 if expert_tp is None else expert_tp),
        ):
            if size != 1:
                raise ConfigError(f"{name} is {size}; only 1 is implemented: set it to 1")
        return cls(world_size, config.tensor_model_parallel_size, config.expert_model_parallel_size)

    @property
    def dp(self) -> int:
        """Data parallel size of dense parameters; also how many different micro-batches run at once."""
        return self.world_size // self.tp

    @property
    def edp(self) -> int:
        """Data parallel size of expert parameters."""
        return self.world_size // self.ep

    def coordinates(self, rank: int) -> Coordinates:
        """Where `rank` stands in each of its groups."""
        return Coordinates(tp=rank % self.tp, dp=rank // self.tp, ep=rank % self.ep, edp=rank // self.ep)

    def tp_groups(self) -> list[list[int]]:
        """Ranks that share each dense layer."""
        return _blocks(self.world_size, self.tp)

    def dp_groups(self) -> list[list[int]]:
        """Ranks that hold the same slice of the dense parameters."""
        return _strides(self.world_size, self.tp)

    def ep_groups(self) -> list[list[int]]:
        """Ranks over which the experts of one layer are spread; the all-to-all runs here."""
        return _blocks(self.world_size, self.ep)

    def edp_groups(self) -> list[list[int]]:
        """Ranks that hold the same experts."""
        return _strides(self.world_size, self.ep)


def _blocks(world_size: int, size: int) -> list[list[int]]:
    return [list(range(start, start + size)) for start in range(0, world_size, size)]


def _strides(world_size: int, stride: int) -> list[list[int]]:
    return [list(range(start, world_size, stride)) for start in range(stride)]
