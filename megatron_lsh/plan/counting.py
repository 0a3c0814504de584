"""How many parameters a model has, counted on its real module tree without allocating it."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from dataclasses import dataclass

from megatron_lsh.config.config import Config
from megatron_lsh.config.pipeline import Stages
from megatron_lsh.families import Family
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.parallel.context import offline_context
from megatron_lsh.parallel.layout import ParallelLayout
from megatron_lsh.parallel.parameters import is_expert


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters; a tied embedding counts once.

    total: of the whole model.
    active: used by one token: all of the dense part, and K of the E routed experts of each MoE layer.
    dense_per_rank, expert_per_rank: held by one rank of the fullest pipeline stage, before any sharding over data-parallel
        ranks (``--use-distributed-optimizer`` divides the former by DP and the latter by expert-DP).
    stages: (dense, expert) of a rank of each stage.
    """

    total: int
    active: int
    dense_per_rank: int
    expert_per_rank: int
    stages: tuple[tuple[int, int], ...]

    @property
    def per_rank(self) -> int:
        return self.dense_per_rank + self.expert_per_rank


def parameter_counts(family: Family, cfg: Config, vocab_size: int, layout: ParallelLayout) -> ParameterCounts:
    """Count the parameters of the model of this family that `cfg` describes.

    Args:
        vocab_size: padded vocabulary.
        layout: how the ranks share the model.

    Raises:
        ConfigError: for sizes that are missing or do not fit together or the layout.
    """
    dense, expert = _count(family, cfg, vocab_size, ParallelLayout(1), Stages(), 0)
    active = dense
    if expert and cfg.moe.num_experts:
        active += expert * cfg.moe.moe_router_topk // cfg.moe.num_experts
    stages = Stages.from_config(cfg.parallel)
    kinds = kinds_of_stages(family, cfg, stages)
    firsts = {kind: stage * (layout.world_size // layout.pp) for stage, kind in reversed(list(enumerate(kinds)))}
    found = {kind: _count(family, cfg, vocab_size, layout, stages, rank) for kind, rank in firsts.items()}
    per_stage = tuple(found[kind] for kind in kinds)
    return ParameterCounts(dense + expert, active, *max(per_stage, key=sum), per_stage)


def kinds_of_stages(family: Family, cfg: Config, stages: Stages) -> list[Hashable]:
    """For each pipeline stage what it is made of; those that are equal hold equally many parameters."""
    return [
        tuple(
            (tuple(stack.moe_pattern()[chunk.layers.start : chunk.layers.stop]), chunk.first, chunk.last)
            for stack in family.stacks(cfg)
            for chunk in stages.of_rank(stage, stack.num_layers)
        )
        for stage in range(stages.ranks)
    ]


def _count(
    family: Family, cfg: Config, vocab_size: int, layout: ParallelLayout, stages: Stages, rank: int
) -> tuple[int, int]:
    """Dense and expert parameters of a rank. Nodes, which are not known here, have no parameters of their own."""
    cfg = dataclasses.replace(cfg, lsh=dataclasses.replace(cfg.lsh, lsh_scope=None))
    ctx = offline_context(layout, rank, stages=stages)
    telemetry = MoETelemetry(ctx.device)  # nothing runs
    parameters = list(family.model(cfg, vocab_size, ctx, telemetry).parameters())
    expert = sum(p.numel() for p in parameters if is_expert(p))
    return sum(p.numel() for p in parameters) - expert, expert
