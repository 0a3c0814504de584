"""Estimate of the memory of one rank, item by item. Arithmetic only; nothing is allocated.

Weights, gradients and optimizer state follow from how ``fully_shard`` is used here. Activations are counted like in
Korthikanti et al. (arXiv:2205.05198): what the backward pass keeps of each layer for one micro-batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_lsh.config.config import Config
from megatron_lsh.config.pipeline import Chunk, Stages
from megatron_lsh.families import Family
from megatron_lsh.models.recompute import RecomputePlan
from megatron_lsh.models.shape import ModelShape
from megatron_lsh.models.stacks import Stack
from megatron_lsh.moe.registry import restoration
from megatron_lsh.parallel.layout import ParallelLayout
from megatron_lsh.parallel.pipeline import passes_at_once
from megatron_lsh.plan.counting import ParameterCounts

GIB = 2.0**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank at the peak of a step."""

    weights: float
    """fp32 parameters, of which bf16 training makes master weights; sharded by --use-distributed-optimizer"""
    gathered_weights: float
    """the full copies that forward and backward compute with"""
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gathered_weights + self.gradients + self.optimizer + self.activations


def estimate_memory(
    family: Family, cfg: Config, counts: ParameterCounts, layout: ParallelLayout, vocab_size: int, micro_batches: int
) -> list[MemoryEstimate]:
    """For a rank of each pipeline stage, with even routing and without the framework's own buffers (CUDA context, NCCL: 1-2
    GB).

    `vocab_size`: padded.
    """
    stages = range(len(counts.stages))
    return [_stage_memory(family, cfg, counts, layout, vocab_size, micro_batches, stage) for stage in stages]


def _stage_memory(
    family: Family,
    cfg: Config,
    counts: ParameterCounts,
    layout: ParallelLayout,
    vocab_size: int,
    micro_batches: int,
    stage: int,
) -> MemoryEstimate:
    dense, expert = counts.stages[stage]
    held = float(dense + expert)
    sharded = cfg.parallel.use_distributed_optimizer
    owned = dense / (layout.dp * layout.cp) + expert / layout.edp if sharded else held
    # Without a copy in 16 bits and without shards to gather, forward uses the parameters themselves.
    compute_bytes = 2.0 if cfg.precision.half else 4.0
    gathered = compute_bytes * held if cfg.precision.half or owned < held else 0.0
    # While micro-batches accumulate, gradients are whole; the reduced ones come on top when they are sharded.
    gradients = 4.0 * (held if micro_batches > 1 else 0.0) + 4.0 * owned if sharded else 4.0 * held
    moments = 2.0 if cfg.optimizer.optimizer == "adam" else 1.0
    second = 0.0
    if cfg.optimizer.optimizer == "muon":  # the vocabulary's weights are AdamW's; what else is, is small
        last = stage == layout.pp - 1 and (layout.pp > 1 or cfg.model.untie_embeddings_and_output_weights)
        matrices = int(stage == 0) + int(last)
        second = matrices * vocab_size * (cfg.model.hidden_size or 0) / layout.tp
        second /= layout.dp * layout.cp if sharded else 1
    return MemoryEstimate(
        weights=4.0 * owned,
        gathered_weights=gathered,
        gradients=gradients,
        optimizer=4.0 * (moments * owned + second),
        activations=activation_bytes(family, cfg, layout, vocab_size, stage, micro_batches),
    )


def activation_bytes(
    family: Family, cfg: Config, layout: ParallelLayout, vocab_size: int, stage: int = 0, micro_batches: int = 1
) -> float:
    """What micro-batches keep for their backward passes on one rank of a pipeline stage, as many as are there at once."""
    stages = Stages.from_config(cfg.parallel)
    at_once = passes_at_once(stages, stage, micro_batches) / stages.chunks
    layers = 0.0
    largest = 0.0
    embeddings_and_norms = 0.0
    for stack in family.stacks(cfg):
        sizes = Sizes.of(stack, layout)
        for chunk in stages.of_rank(stage, stack.num_layers):
            kept, peak = _chunk_bytes(stack, chunk, sizes, layout.tp)
            layers += kept * at_once
            largest = max(largest, peak)
            embeddings_and_norms += (chunk.first + chunk.last) * sizes.residual * at_once
    if stage < stages.ranks - 1:
        return layers + largest + embeddings_and_norms
    element = 2.0 if cfg.precision.half else 4.0
    outputs = family.head(cfg, vocab_size).outputs * (cfg.training.micro_batch_size or 1)
    logits = outputs / layout.tp / layout.cp * (element + 4.0)  # and their softmax in fp32
    return layers + largest + logits + embeddings_and_norms


def _chunk_bytes(stack: Stack, chunk: Chunk, sizes: Sizes, tp: int) -> tuple[float, float]:
    """What layers keep until their backward pass, and what the recomputation of one group of them adds."""
    cfg, shape, moe_pattern = stack.cfg, stack.shape, stack.moe_pattern()
    plan = RecomputePlan.from_config(cfg.recompute, cfg.moe, len(chunk.layers))
    layers = 0.0
    largest = 0.0
    for place, is_moe in enumerate(moe_pattern[chunk.layers.start : chunk.layers.stop]):
        recomputed = place < plan.full_layers
        modules: frozenset[str] = frozenset() if recomputed else plan.modules
        whole = _layer_bytes(cfg, sizes, shape, tp, is_moe=is_moe, modules=modules)
        if stack.memory_length:
            whole += _cross_attention_bytes(cfg, sizes, shape, tp, stack.memory_length / stack.seq_length)
        if recomputed:  # its input, once per chunk; while it is recomputed, the chunk is there as a whole
            layers += sizes.residual / plan.chunk
            largest = max(largest, plan.chunk * whole)
        else:
            layers += whole
    return layers, largest


@dataclass(frozen=True)
class Sizes:
    """Of one micro-batch in one stack, on one rank."""

    tokens: float
    """per rank under sequence parallelism"""
    tokens_full: float
    """per context-parallel rank"""
    tokens_attended: float
    """of whole sequences, whose keys and values a rank gathers"""
    element: float
    """bytes of one activation"""
    residual: float
    """bytes of one [S, B, D] activation of this rank"""
    gathered: float
    """the same for the whole sequence"""
    widened: float = 1.0
    """of the stack (models/stacks.py)"""

    @classmethod
    def of(cls, stack: Stack, layout: ParallelLayout) -> Sizes:
        """Under this layout, for the micro-batch of its configuration."""
        cfg, shape = stack.cfg, stack.shape
        sequence_parallel = layout.tp > 1 and (cfg.parallel.sequence_parallel or cfg.moe.num_experts is not None)
        attended = float(stack.seq_length * (cfg.training.micro_batch_size or 1))
        full = attended / layout.cp
        tokens = full / layout.tp if sequence_parallel else full
        element = 2.0 if cfg.precision.half else 4.0
        residual, gathered = tokens * shape.hidden * element, full * shape.hidden * element
        return cls(tokens, full, attended, element, residual, gathered, stack.widened)


def _layer_bytes(
    cfg: Config, sizes: Sizes, shape: ModelShape, tp: int, *, is_moe: bool, modules: frozenset[str]
) -> float:
    heads, groups = shape.heads * shape.head_dim, shape.query_groups * shape.head_dim
    kept = sizes.tokens_full if "core_attn" in modules else sizes.tokens_attended  # keys and values
    attention = sizes.element / tp * (sizes.tokens_full * heads + kept * 2 * groups)  # Q, K, V
    if "core_attn" not in modules:
        attention += sizes.tokens_full / tp * (sizes.element * heads + 4.0 * shape.heads)  # output, log-sum-exp
    else:
        attention += sizes.tokens_full / tp * sizes.element * heads
    attention *= sizes.widened
    norm_input, projection_input = sizes.residual, sizes.gathered * sizes.widened
    if "layernorm" in modules:
        projection_input = 0.0
    masks = 2.0 * sizes.residual / sizes.element if cfg.model.hidden_dropout > 0.0 else 0.0
    if is_moe:
        feed_forward = sizes.residual if "moe" in modules else _moe_bytes(cfg, sizes, shape)
    else:
        feed_forward = sizes.residual if "mlp" in modules else _mlp_bytes(cfg, sizes, shape, tp)
    return norm_input + projection_input + attention + masks + feed_forward


def _cross_attention_bytes(cfg: Config, sizes: Sizes, shape: ModelShape, tp: int, memory_share: float) -> float:
    """`memory_share`: tokens of the encoder per token of the decoder."""
    heads, groups = shape.heads * shape.head_dim, shape.query_groups * shape.head_dim
    per_token = heads + 2 * groups * memory_share + heads  # queries, keys and values, output
    masks = sizes.residual / sizes.element if cfg.model.hidden_dropout > 0.0 else 0.0
    gathered = sizes.gathered * (1.0 + memory_share)  # inputs of the projections
    return sizes.residual + gathered + sizes.tokens_full * sizes.element / tp * per_token + masks


def _mlp_bytes(cfg: Config, sizes: Sizes, shape: ModelShape, tp: int) -> float:
    halves = 3.0 if cfg.model.swiglu else 2.0  # before and after the activation function
    return sizes.residual + sizes.gathered + sizes.tokens_full * sizes.element * halves * shape.ffn / tp


def _moe_bytes(cfg: Config, sizes: Sizes, shape: ModelShape) -> float:
    """Norm, router scores, permuted and received rows, the experts' inside, their output, the returned rows."""
    moe = cfg.moe
    halves = 3.0 if cfg.model.swiglu else 2.0
    width = moe.moe_ffn_hidden_size or shape.ffn
    rows = sizes.tokens * moe.moe_router_topk
    row = moe.moe_latent_size or shape.hidden
    row_copies, restored = 4.0, 0.0
    if moe.moe_token_dispatcher_type in ("lsh", "auto"):  # rows and residuals
        row_copies, restored = 5.0, restoration_bytes(cfg, rows, row, width)
    latent = (
        0.0 if moe.moe_latent_size is None else 2.0 * sizes.tokens * sizes.element * row
    )  # each map's input or output
    experts = rows * sizes.element * (row_copies * row + halves * width) + latent
    shared = sizes.tokens * sizes.element * halves * (moe.moe_shared_expert_intermediate_size or 0)
    return 2.0 * sizes.residual + 8.0 * sizes.tokens * (moe.num_experts or 0) + experts + shared + restored


def restoration_bytes(cfg: Config, rows: float, hidden: int, width: int) -> float:
    """What interpolation keeps for its backward pass, in fp32 (lsh/interpolate.py): k, K, its inverse, and W or twice A; in
    few coordinates (lsh/leading.py) those of rows, representatives and outputs, and both sets of directions."""
    if cfg.lsh.lsh_residual != "interpolate":
        return 0.0
    rate = min(cfg.lsh.rates().span())
    found = restoration(cfg.lsh, hidden, width, cfg.model.swiglu, rate)
    sent = max(cfg.lsh.rates().span())
    there = math.ceil(rows / (cfg.moe.num_experts or 1) * sent)
    block = math.ceil(there / math.ceil(there / found.block)) if there else 0
    common = block + 2 * sent * block
    if found.rank is None or found.rank >= hidden or there <= found.beyond:
        return 4.0 * rows * (common + (2 * block if found.form == "weights" else sent * hidden))
    directions = 2 * found.rank * hidden * sent / max(block, 1)
    return 4.0 * rows * (common + found.rank * (2 + 3 * sent) + directions)
