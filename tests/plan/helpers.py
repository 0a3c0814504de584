"""A cluster and a model small enough for paper."""

from __future__ import annotations

from typing import Any

from megatron_lsh.config import Config, parse_args
from megatron_lsh.families import GPT
from megatron_lsh.parallel.layout import ParallelLayout
from megatron_lsh.plan.cluster import Cluster, cluster_of
from megatron_lsh.plan.counting import parameter_counts
from megatron_lsh.plan.dry_run import vocabulary_of
from megatron_lsh.plan.search import _validated
from megatron_lsh.plan.step_time import StepCost, step_cost

#: D 32, 4 heads of 8, S 32, F 64 with SwiGLU, 4 experts, 2 per token, two layers.
MODEL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --swiglu --disable-bias-linear --num-experts 4 "
    "--moe-ffn-hidden-size 64 --moe-router-topk 2 --vocab-size 127 --mock-data --global-batch-size 16 "
    "--tokenizer-type NullTokenizer --moe-aux-loss-coeff 1e-2 --normalization RMSNorm"
)


def document(**changes: Any) -> dict[str, Any]:
    """Two nodes of two ranks: 1 GFLOP/s, 1 Gbit/s between nodes, 8 Gbit/s inside, and no latency."""
    return {
        "nodes": 2,
        "ranks_per_node": 2,
        "memory_gib": 1,
        "compute": {"dense_tflops": 1e-3, "grouped_tflops": 1e-3},
        "inside": {"gbit_per_s": 8},
        "across": {"gbit_per_s": 1},
    } | changes


def cluster(**changes: Any) -> Cluster:
    return cluster_of(document(**changes), "test")


def parsed(words: str = "") -> Config:
    return parse_args([*MODEL.split(), *words.split()])


def cost(words: str, on: Cluster) -> StepCost:
    """Of a layout that the words say in full."""
    cfg = _validated(parsed(words), {}, on.ranks)
    layout = ParallelLayout.from_config(cfg.parallel, on.ranks)
    padded = vocabulary_of(GPT, cfg, layout).padded
    return step_cost(GPT, cfg, on, layout, parameter_counts(GPT, cfg, padded, layout), padded)
