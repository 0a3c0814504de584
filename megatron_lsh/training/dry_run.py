"""``--dry-run``: what a run would look like on any number of ranks, without starting one or reading data."""

from __future__ import annotations

from megatron_lsh.config import Config, assumed_world_size, padded_vocab_size
from megatron_lsh.data.tokenizers import build_tokenizer
from megatron_lsh.errors import MegatronLSHError
from megatron_lsh.models.counting import ParameterCounts, parameter_counts
from megatron_lsh.models.stacks import moe_layers, stacks_of
from megatron_lsh.parallel.layout import ParallelLayout
from megatron_lsh.training.flops import tokens_per_sample, training_flops_per_token
from megatron_lsh.training.memory import MemoryEstimate, estimate_memory

ASSUMED_VOCABULARY = 32000
_GIB = 2.0**30


def dry_run(cfg: Config) -> str:
    """The report as text. `cfg` is validated for the world size that ``assumed_world_size`` finds.

    Raises:
        ConfigError: for a model or a layout that cannot be.
    """
    layout = ParallelLayout.from_config(cfg.parallel, assumed_world_size(cfg))
    vocabulary, source = _vocabulary(cfg)
    padded = padded_vocab_size(vocabulary, cfg.model.make_vocab_size_divisible_by, layout.tp)
    counts = parameter_counts(cfg, padded, layout)
    micro = cfg.training.micro_batch_size or 1
    global_batch = cfg.training.global_batch_size or micro * layout.dp
    micro_batches = max(global_batch // (micro * layout.dp), 1)
    memory = estimate_memory(cfg, counts, layout, padded, micro_batches)
    flops = training_flops_per_token(cfg, padded) * global_batch * tokens_per_sample(cfg)
    sections = [
        _layout_lines(cfg, layout),
        _batch_lines(cfg, layout, micro, global_batch, micro_batches, flops),
        _parameter_lines(cfg, layout, counts, vocabulary, padded, source),
        _memory_lines(cfg, memory),
        [f"note: {notice}" for notice in cfg.notices],
        ["Nothing was started and no data was read."],
    ]
    return "\n".join(line for lines in sections for line in lines)


def _vocabulary(cfg: Config) -> tuple[int, str]:
    """Size of the vocabulary before padding, and where it comes from."""
    given = cfg.model.vocab_size
    try:
        return max(build_tokenizer(cfg.data, given).vocab_size, given or 0), "tokenizer"
    except (MegatronLSHError, OSError):
        if given is not None:
            return given, "--vocab-size"
        return ASSUMED_VOCABULARY, "assumed, because no tokenizer can be read here: --vocab-size sets it"


def _layout_lines(cfg: Config, layout: ParallelLayout) -> list[str]:
    lines = [
        f"Layout of {layout.world_size} ranks (rank = dp * {layout.tp} + tp = edp * {layout.ep} + ep)",
        _group_line("tensor parallel", layout.groups("tp")),
        _group_line("data parallel", layout.groups("dp")),
    ]
    if cfg.moe.num_experts is not None:
        per_rank = cfg.moe.num_experts // layout.ep
        lines += [
            _group_line("expert parallel", layout.groups("ep")),
            _group_line("expert data parallel", layout.groups("edp")),
            f"  experts: {cfg.moe.num_experts} in each of {len(moe_layers(cfg))} of {_num_layers(cfg)} layers, "
            f"{per_rank} per rank; ep rank r holds experts [{per_rank} r, {per_rank} r + {per_rank})",
            f"  token dispatcher: {cfg.moe.moe_token_dispatcher_type}",
        ]
    return lines


def _num_layers(cfg: Config) -> str:
    """``32``, or ``12 encoder and 12 decoder``."""
    stacks = stacks_of(cfg)
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
    cfg: Config, layout: ParallelLayout, micro: int, global_batch: int, micro_batches: int, flops: float
) -> list[str]:
    return [
        "Batch",
        f"  global batch {global_batch} = micro batch {micro} x data parallel {layout.dp} x {micro_batches} micro-batches; "
        f"{global_batch * tokens_per_sample(cfg):,} tokens",
        f"  {flops / 1e12:,.2f} model TFLOP per iteration, {flops / layout.world_size / 1e12:,.2f} per rank",
    ]


def _parameter_lines(
    cfg: Config, layout: ParallelLayout, counts: ParameterCounts, vocabulary: int, padded: int, source: str
) -> list[str]:
    lines = [
        f"Parameters (vocabulary {vocabulary:,}, {source}; padded to {padded:,})",
        f"  total     {counts.total:>18,}",
        f"  active    {counts.active:>18,}   per token",
        f"  per rank  {counts.per_rank:>18,}   dense {counts.dense_per_rank:,} + experts {counts.expert_per_rank:,}",
    ]
    if cfg.parallel.use_distributed_optimizer:
        owned = -(-counts.dense_per_rank // layout.dp) + -(-counts.expert_per_rank // layout.edp)
        lines.append(f"  sharded   {owned:>18,}   per rank with --use-distributed-optimizer")
    return lines


def _memory_lines(cfg: Config, memory: MemoryEstimate) -> list[str]:
    compute = "bf16" if cfg.precision.bf16 else "fp32"
    rows = [
        ("weights (fp32)", memory.weights),
        (f"gathered weights ({compute})", memory.gathered_weights),
        ("gradients (fp32)", memory.gradients),
        (f"optimizer ({cfg.optimizer.optimizer}, fp32)", memory.optimizer),
        ("activations (estimate)", memory.activations),
        ("sum", memory.total),
    ]
    return ["Memory per rank, without the buffers of CUDA and NCCL (1-2 GiB)"] + [
        f"  {name:<28}{size / _GIB:>10.2f} GiB" for name, size in rows
    ]
