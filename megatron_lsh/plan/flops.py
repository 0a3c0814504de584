"""Analytic model FLOPs, peak speeds of known devices, and from both the model FLOPs utilisation (MFU).

Counted analytically because counters see no FLOPs in ``grouped_mm``. A multiplication and an addition are two FLOPs; the
backward pass costs twice the forward pass; activation recomputation is not counted (model, not hardware, FLOPs);
causal attention counts half of the score matrix, as Megatron-LM does; padding counts like tokens. MFU is defined in the
PaLM paper (arXiv:2204.02311, appendix B). The LSH dispatcher runs experts on fewer rows than this counts: under LSH the
figures say how fast an exact model would have to run to keep up. ``IntervalMetrics.mfu_done`` takes off what was not done.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

from megatron_lsh.config.config import Config
from megatron_lsh.families import Family
from megatron_lsh.models.stacks import Stack

# Dense peak in TFLOP/s of one device as its vendor states it: (bf16 or fp16 with fp32 accumulation, fp32 without TF32).
# Looked up among the words of torch.cuda.get_device_name(); the first match wins.
PEAK_TFLOPS: Mapping[str, tuple[float, float]] = MappingProxyType({
    "GB200": (2500.0, 80.0),
    "B200": (2250.0, 80.0),
    "H200": (989.4, 66.9),
    "GH200": (989.4, 66.9),
    "H100 NVL": (835.5, 60.0),
    "H100 PCIe": (756.4, 51.2),
    "H100": (989.4, 66.9),
    "H800": (989.4, 66.9),
    "H20": (148.0, 44.0),
    "A100": (312.0, 19.5),
    "A800": (312.0, 19.5),
    "L40S": (362.05, 91.6),
    "L40": (181.05, 90.5),
    "L4": (121.0, 30.3),
    "A40": (149.7, 37.4),
    "A10": (125.0, 31.2),
    "RTX 6000 Ada": (364.2, 91.1),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
    "V100": (125.0, 15.7),
    "T4": (65.0, 8.1),
    "MI300X": (1307.4, 163.4),
    "MI250": (383.0, 95.7),
})  # fmt: skip


def forward_flops(family: Family, cfg: Config, padded_vocab_size: int) -> float:
    """FLOPs of one forward pass of one sample of full length."""
    stacks = sum(stack.seq_length * _stack_multiply_adds(stack) for stack in family.stacks(cfg))
    return 2.0 * (stacks + family.head(cfg, padded_vocab_size).multiply_adds)


def training_flops(family: Family, cfg: Config, padded_vocab_size: int) -> float:
    """FLOPs of a forward and a backward pass of one sample: three times the forward pass.

    Of samples shorter than the model allows, the share of their mean length.
    """
    full = sum(stack.seq_length for stack in family.stacks(cfg))
    return 3.0 * forward_flops(family, cfg, padded_vocab_size) * family.tokens_per_sample(cfg) / full


def experts_share(family: Family, cfg: Config, padded_vocab_size: int) -> float:
    """Share of :func:`forward_flops` that the routed experts do: what shrinks where fewer rows are sent to them."""
    routed = sum(
        stack.seq_length * sum(stack.moe_pattern()) * layer_work(stack, is_moe=True).routed
        for stack in family.stacks(cfg)
    )
    return 2.0 * routed / forward_flops(family, cfg, padded_vocab_size)


class LayerWork(NamedTuple):
    """Multiply-adds of one layer per token that passes it.

    projections: of the attention; scores: those between a position and those that it attends to;
    feed_forward: of the dense layer, or of all around the routed experts; shared: the shared expert, a part of
    it; routed: the experts that a token has.
    """

    projections: float
    scores: float
    feed_forward: float
    shared: float = 0.0
    routed: float = 0.0

    @property
    def total(self) -> float:
        return self.projections + self.scores + self.feed_forward + self.routed


def layer_work(stack: Stack, *, is_moe: bool) -> LayerWork:
    """What a layer of this stack computes."""
    model, moe, shape = stack.cfg.model, stack.cfg.moe, stack.shape
    hidden, heads, groups, head_dim = shape.hidden, shape.heads, shape.query_groups, shape.head_dim
    matrices = 3 if model.swiglu else 2
    projections = 1.0 * hidden * head_dim * (heads + 2 * groups) + heads * head_dim * hidden
    # QK^T and (scores)V, of which causality needs half
    scores = 2 * heads * head_dim * (stack.attended or stack.seq_length) / (2 if stack.causal else 1)
    if stack.memory_length:  # queries and output per token; keys and values per token of the encoder
        memory = stack.memory_length
        projections += 2 * hidden * heads * head_dim + 2 * hidden * groups * head_dim * memory / stack.seq_length
        scores += 2 * heads * head_dim * memory
    projections, scores = projections * stack.widened, scores * stack.widened
    if not is_moe:
        return LayerWork(projections, scores, matrices * hidden * shape.ffn)
    row = moe.moe_latent_size or hidden
    latent = 0 if moe.moe_latent_size is None else 2 * hidden * row
    shared = matrices * hidden * (moe.moe_shared_expert_intermediate_size or 0)
    routed = moe.moe_router_topk * matrices * row * (moe.moe_ffn_hidden_size or shape.ffn)
    return LayerWork(projections, scores, latent + shared + hidden * (moe.num_experts or 0), shared, routed)


def _stack_multiply_adds(stack: Stack) -> float:
    """Multiply-adds of one stack of layers per token that passes it."""
    return sum(layer_work(stack, is_moe=is_moe).total for is_moe in stack.moe_pattern())


def peak_flops(device: torch.device, dtype: torch.dtype, tflops: float | None = None) -> float | None:
    """Peak FLOP/s of one device in `dtype`, or None for a GPU that is not in the table.

    `tflops` (--peak-tflops) overrides. A CPU has no useful data-sheet figure, so a matrix product is timed: call this
    once, on all ranks at the same time, since they share the machine.
    """
    if tflops is not None:
        return tflops * 1e12
    if device.type == "cpu":
        return measure_matmul(device, dtype)
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for key, (half, single) in PEAK_TFLOPS.items():
        if re.search(rf"\b{key}\b", name):
            return (half if dtype in (torch.bfloat16, torch.float16) else single) * 1e12
    return None


def measure_matmul(device: torch.device, dtype: torch.dtype, size: int = 512, seconds: float = 0.3) -> float:
    """FLOP/s of the fastest of the size x size matrix products that fit in `seconds` (at least two).

    Products of a few milliseconds, the fastest of which the other processes of a busy machine have not interrupted.
    """
    generator = torch.Generator().manual_seed(0)  # leaves the run's own random numbers alone
    a = torch.randn(size, size, generator=generator).to(device, dtype)
    best, deadline, runs = float("inf"), time.perf_counter() + seconds, 0
    while runs < 2 or time.perf_counter() < deadline:
        start = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - start)
        runs += 1
    return 2.0 * size**3 / best
