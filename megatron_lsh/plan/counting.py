"""How many parameters a model has, counted on its real module tree without allocating it."""

from __future__ import annotations

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
    firsts = range(0, layout.world_size, layout.world_size // layout.pp)
    per_stage = tuple(_count(family, cfg, vocab_size, layout, stages, rank) for rank in firsts)
    return ParameterCounts(dense + expert, active, *max(per_stage, key=sum), per_stage)


def _count(
    family: Family, cfg: Config, vocab_size: int, layout: ParallelLayout, stages: Stages, rank: int
) -> tuple[int, int]:
    """Dense and expert parameters of a rank."""
    ctx = offline_context(layout, rank, stages=stages)
    telemetry = MoETelemetry(ctx.device)  # nothing runs
    parameters = list(family.model(cfg, vocab_size, ctx, telemetry).parameters())
    expert = sum(p.numel() for p in parameters if is_expert(p))
    return sum(p.numel() for p in parameters) - expert, expert
