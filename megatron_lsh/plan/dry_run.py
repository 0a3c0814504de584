"""``--dry-run``: what a run would look like on any number of ranks, without starting one or reading data."""

from __future__ import annotations

import dataclasses
import json
from typing import NamedTuple

from megatron_lsh.config import Config, assumed_world_size, padded_vocab_size
from megatron_lsh.errors import MegatronLSHError
from megatron_lsh.families import Family, family_of
from megatron_lsh.models.stacks import Stack, moe_layers
from megatron_lsh.parallel.layout import ParallelLayout
from megatron_lsh.plan.counting import ParameterCounts, parameter_counts
from megatron_lsh.plan.flops import training_flops
from megatron_lsh.plan.memory import GIB, MemoryEstimate, estimate_memory
from megatron_lsh.plan.stages import crossing_lines, stage_lines

ASSUMED_VOCABULARY = 32000


def dry_run(cfg: Config) -> str:
    """The report as text, or with --dry-run-json its figures as JSON.

    `cfg` is validated for the world size that ``assumed_world_size`` finds.

    Raises:
        ConfigError: for a model or a layout that cannot be.
    """
    family = family_of(cfg)
    layout = ParallelLayout.from_config(cfg.parallel, assumed_world_size(cfg))
    vocabulary = vocabulary_of(family, cfg, layout)
    counts = parameter_counts(family, cfg, vocabulary.padded, layout)
    micro = cfg.training.micro_batch_size or 1
    global_batch = cfg.training.global_batch_size or micro * layout.dp
    micro_batches = max(global_batch // (micro * layout.dp), 1)
    memory_of_stages = estimate_memory(family, cfg, counts, layout, vocabulary.padded, micro_batches)
    memory = max(memory_of_stages, key=lambda estimate: estimate.total)
    flops = training_flops(family, cfg, vocabulary.padded) * global_batch
    if cfg.training.dry_run_json:
        return json.dumps(
            {
                "family": family.name,
                "ranks": layout.world_size,
                "layout": {name: getattr(layout, name) for name in ("tp", "cp", "dp", "pp", "ep", "edp")},
                "global_batch": global_batch,
                "micro_batches": micro_batches,
                "parameters": {**dataclasses.asdict(counts), "per_rank": counts.per_rank},
                "moe_layers": moe_layers(family.stacks(cfg)) if cfg.moe.num_experts is not None else [],
                "flops_per_iteration": flops,
                "memory_bytes": {**dataclasses.asdict(memory), "total": memory.total},
                "notices": cfg.notices,
            },
            indent=2,
        )
    sections = [
        _layout_lines(family, cfg, layout),
        _batch_lines(family, cfg, layout, micro, global_batch, micro_batches, flops),
        _parameter_lines(cfg, layout, counts, vocabulary),
        stage_lines(family, cfg, counts, memory_of_stages, micro_batches),
        _memory_lines(cfg, memory),
        crossing_lines(family, cfg, layout),
        [f"note: {notice}" for notice in cfg.notices],
        ["Nothing was started and no data was read."],
    ]
    return "\n".join(line for lines in sections for line in lines)


class Vocabulary(NamedTuple):
    size: int = 0
    padded: int = 0
    source: str = ""

    def __str__(self) -> str:
        return f" (vocabulary {self.size:,}, {self.source}; padded to {self.padded:,})" if self.size else ""


def vocabulary_of(family: Family, cfg: Config, layout: ParallelLayout) -> Vocabulary:
    """The vocabulary before and after padding, and where it comes from; empty for a family without one."""
    if family.tokenizer is None:
        return Vocabulary()
    size, source = cfg.model.vocab_size, "--vocab-size"
    try:
        size, source = max(family.tokenizer(cfg).vocab_size, size or 0), "tokenizer"
    except (MegatronLSHError, OSError):
        if size is None:
            size, source = ASSUMED_VOCABULARY, "assumed, because no tokenizer can be read here: --vocab-size sets it"
    return Vocabulary(size, padded_vocab_size(size, cfg.model.make_vocab_size_divisible_by, layout.tp), source)


def _layout_lines(family: Family, cfg: Config, layout: ParallelLayout) -> list[str]:
    lines = [
        f"Layout of {layout.world_size} ranks ({_digits(layout)})",
        _group_line("tensor parallel", layout.groups("tp")),
        *([_group_line("context parallel", layout.groups("cp"))] if layout.cp > 1 else []),
        _group_line("data parallel", layout.groups("dp")),
        *([_group_line("pipeline parallel", layout.groups("pp"))] if layout.pp > 1 else []),
    ]
    if cfg.moe.num_experts is not None:
        per_rank, stacks = cfg.moe.num_experts // layout.ep, family.stacks(cfg)
        lines += [
            _group_line("expert parallel", layout.groups("ep")),
            _group_line("expert data parallel", layout.groups("edp")),
            f"  experts: {cfg.moe.num_experts} in each of {len(moe_layers(stacks))} of {_num_layers(stacks)} layers, "
            f"{per_rank} per rank; ep rank r holds experts [{per_rank} r, {per_rank} r + {per_rank})",
            f"  token dispatcher: {cfg.moe.moe_token_dispatcher_type}",
        ]
    return lines


def _digits(layout: ParallelLayout) -> str:
    """What a rank's number is made of, in both cuts of the world."""
    stage = f"pp * {layout.world_size // layout.pp} + " if layout.pp > 1 else ""
    dense = f"dp * {layout.cp * layout.tp} + " + (f"cp * {layout.tp} + " if layout.cp > 1 else "") + "tp"
    return f"rank = {stage}{dense} = {stage}edp * {layout.ep} + ep"


def _num_layers(stacks: tuple[Stack, ...]) -> str:
    """``32``, or ``12 encoder and 12 decoder``."""
    return " and ".join(
        f"{stack.num_layers} {stack.name}" if len(stacks) > 1 else str(stack.num_layers) for stack in stacks
    )


def _group_line(name: str, groups: list[list[int]]) -> str:
    shown = [_ranks(group) for group in (groups if len(groups) <= 8 else [*groups[:3], groups[-1]])]
    if len(groups) > 8:
        shown.insert(3, "...")
    return f"  {name + ':':<22}{len(groups)} groups of {len(groups[0])}: {' '.join(shown)}"


def _ranks(group: list[int]) -> str:
    """``[0 1 2 3]``, or ``[0 2 .. 30]`` when there are many."""
    if len(group) <= 8:
        return "[" + " ".join(map(str, group)) + "]"
    return f"[{group[0]} {group[1]} .. {group[-1]}]"


def _batch_lines(
    family: Family, cfg: Config, layout: ParallelLayout, micro: int, global_batch: int, micro_batches: int, flops: float
) -> list[str]:
    return [
        "Batch",
        f"  global batch {global_batch} = micro batch {micro} x data parallel {layout.dp} x {micro_batches} micro-batches; "
        f"{global_batch * family.tokens_per_sample(cfg):,} tokens",
        f"  {flops / 1e12:,.2f} model TFLOP per iteration, {flops / layout.world_size / 1e12:,.2f} per rank",
    ]


def _parameter_lines(cfg: Config, layout: ParallelLayout, counts: ParameterCounts, vocabulary: Vocabulary) -> list[str]:
    lines = [
        f"Parameters{vocabulary}",
        f"  total     {counts.total:>18,}",
        f"  active    {counts.active:>18,}   per token",
        f"  per rank  {counts.per_rank:>18,}   dense {counts.dense_per_rank:,} + experts {counts.expert_per_rank:,}",
    ]
    if cfg.parallel.use_distributed_optimizer:
        owned = -(-counts.dense_per_rank // (layout.dp * layout.cp)) + -(-counts.expert_per_rank // layout.edp)
        lines.append(f"  sharded   {owned:>18,}   per rank with --use-distributed-optimizer")
    return lines


def _memory_lines(cfg: Config, memory: MemoryEstimate) -> list[str]:
    compute = "fp16" if cfg.precision.fp16 else "bf16" if cfg.precision.bf16 else "fp32"
    rows = [
        ("weights (fp32)", memory.weights),
        (f"gathered weights ({compute})", memory.gathered_weights),
        ("gradients (fp32)", memory.gradients),
        (f"optimizer ({cfg.optimizer.optimizer}, fp32)", memory.optimizer),
        ("activations (estimate)", memory.activations),
        ("sum", memory.total),
    ]
    return ["Memory per rank, without the buffers of CUDA and NCCL (1-2 GiB)"] + [
        f"  {name:<28}{size / GIB:>10.2f} GiB" for name, size in rows
    ]
