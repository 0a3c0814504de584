"""How the layers of a model are shared out over pipeline stages. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from megatron_lsh.config.parallel import ParallelConfig


class Chunk(NamedTuple):
    """Consecutive layers that run without a step to another rank: a stage, or with interleaving a part of one."""

    layers: range
    first: bool = True
    """whether the embedding comes before them"""
    last: bool = True
    """whether the final norm and the heads come after them"""


@dataclass(frozen=True)
class Stages:
    """Megatron-LM's rule. Chunk c of rank r is the virtual stage c * ranks + r; virtual stages follow one another.

    Attributes:
        ranks: pipeline-parallel size.
        chunks: virtual stages per rank; more than one is the interleaved schedule.
        first_layers, last_layers: layers of the first and the last rank where they differ from the others'.
    """

    ranks: int = 1
    chunks: int = 1
    first_layers: int | None = None
    last_layers: int | None = None

    @classmethod
    def from_config(cls, cfg: ParallelConfig) -> Stages:
        """As the flags of a validated configuration say."""
        ranks = cfg.pipeline_model_parallel_size
        if ranks == 1:
            return cls()
        chunks = cfg.num_virtual_stages_per_pipeline_rank or 1
        return cls(ranks, chunks, cfg.decoder_first_pipeline_num_layers, cfg.decoder_last_pipeline_num_layers)

    def layers_per_rank(self, num_layers: int) -> list[int]:
        """How many layers each rank holds. Raises ValueError if they cannot be shared out."""
        given = {0: self.first_layers, self.ranks - 1: self.last_layers}
        fixed = {rank: layers for rank, layers in given.items() if layers is not None}
        rest, others = num_layers - sum(fixed.values()), self.ranks - len(fixed)
        if rest < others or (rest % others if others else rest):
            raise ValueError(f"{rest} layers cannot be shared out evenly over {others} stages")
        sizes = [fixed.get(rank, rest // max(others, 1)) for rank in range(self.ranks)]
        uneven = [size for size in sizes if size % self.chunks]
        if uneven:
            raise ValueError(f"{uneven[0]} layers of a stage cannot be cut into {self.chunks} virtual stages")
        return sizes

    def of_rank(self, rank: int, num_layers: int) -> list[Chunk]:
        """The chunks of a pipeline rank, in the order in which a sample passes them. Raises as ``layers_per_rank``."""
        sizes = [size // self.chunks for size in self.layers_per_rank(num_layers)] * self.chunks
        ends = list(accumulate(sizes))
        return [
            Chunk(range(ends[stage] - sizes[stage], ends[stage]), stage == 0, stage == len(sizes) - 1)
            for stage in range(rank, len(sizes), self.ranks)
        ]
