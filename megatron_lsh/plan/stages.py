"""What the dry run says of pipeline stages, and of what crosses the borders of nodes."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from megatron_lsh.config.config import Config
from megatron_lsh.config.pipeline import Stages
from megatron_lsh.families import Family
from megatron_lsh.models.shape import ModelShape
from megatron_lsh.models.stacks import moe_layers
from megatron_lsh.parallel.layout import ParallelLayout
from megatron_lsh.parallel.pipeline import bubble_share, passes_at_once
from megatron_lsh.plan.counting import ParameterCounts
from megatron_lsh.plan.memory import GIB, MemoryEstimate
from megatron_lsh.plan.traffic import rows_to_experts, rows_to_sharers, rows_to_stages

USUAL_NODE = 8


def stage_lines(
    family: Family, cfg: Config, counts: ParameterCounts, memory: Sequence[MemoryEstimate], micro_batches: int
) -> list[str]:
    """Schedule, bubble, and what each stage holds; nothing without pipeline parallelism."""
    stages = Stages.from_config(cfg.parallel)
    if stages.ranks == 1:
        return []
    (stack,) = family.stacks(cfg)
    schedule = "1F1B" if stages.chunks == 1 else f"interleaved 1F1B, {stages.chunks} virtual stages per rank"
    lines = [
        f"Pipeline of {stages.ranks} stages, {schedule}: ranks wait {bubble_share(stages, micro_batches):.1%} of a step of "
        f"{micro_batches} micro-batches (the bubble)"
    ]
    for stage, (dense, expert) in enumerate(counts.stages):
        layers = ", ".join(_span(chunk.layers) for chunk in stages.of_rank(stage, stack.num_layers))
        passes = passes_at_once(stages, stage, micro_batches)
        at_once = f"{passes} micro-batches" if stages.chunks == 1 else f"{passes} passes of virtual stages"
        lines.append(
            f"  stage {stage}: layers {layers}; {dense + expert:,} parameters per rank; activations of {at_once} at once; "
            f"{memory[stage].total / GIB:.2f} GiB"
        )
    return lines


def _span(layers: range) -> str:
    return f"{layers.start}-{layers.stop - 1}" if len(layers) > 1 else str(layers.start)


def crossing_lines(family: Family, cfg: Config, layout: ParallelLayout) -> list[str]:
    """Rows per token that leave a node. `cfg.parallel.moe_node_size` or the usual number of ranks are on a node."""
    size = cfg.parallel.moe_node_size or USUAL_NODE
    if layout.world_size <= size:
        return []
    layers = moe_layers(family.stacks(cfg))
    experts = rows_to_experts(len(layers), cfg.moe.moe_router_topk, layout, size)
    stages = rows_to_stages(layout, Stages.from_config(cfg.parallel), size)
    whose = "" if cfg.parallel.moe_node_size else " (assumed: --moe-node-size sets it)"
    parts = [f"{experts:.1f} to experts and back"] if layers else []
    if layers and cfg.moe.moe_token_dispatcher_type == "lsh":
        rates = cfg.lsh.rates()
        sent = experts * mean(rates.at(layer, 0) for layer in layers)
        parts[0] += (
            f" if all travel, {'' if rates.energy is None else 'at most '}{sent:.1f} under LSH at --lsh-target-rate {rates}"
        )
    parts += [f"{stages:.1f} between pipeline stages"] if layout.pp > 1 else []
    if layout.cp > 1:
        shape, keys = ModelShape.from_config(cfg.model), rows_to_sharers(cfg.model.num_layers, layout, size)
        parts.append(
            f"{keys:.1f} of keys and values, {shape.query_groups * shape.head_dim} wide, to ranks of the sequence"
        )
    return [
        f"Rows per token that leave a node of {size} ranks{whose}, forward and backward: {'; '.join(parts)}"
    ] if parts else []  # fmt: skip
