"""Measures what the all-to-all costs a given model on a given cluster, and what LSH makes of it.

Training steps with the exact all-to-all and with LSH take turns, in one run; ``plan/cost_model.py`` says what follows.
"""

from __future__ import annotations

import copy
import statistics
import time
from contextlib import nullcontext

import torch.distributed as dist

from megatron_lsh.config import Config
from megatron_lsh.errors import ConfigError
from megatron_lsh.families import Family, family_of
from megatron_lsh.models.stacks import moe_layers
from megatron_lsh.moe.compressors.lsh import STAGES as LSH_STAGES
from megatron_lsh.moe.schedule import exact_dispatch
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.plan.cost_model import PARTS, Steps
from megatron_lsh.training.run import Run, set_up


def profiling_config(cfg: Config) -> Config:
    """`cfg` (validated) for a measurement: LSH dispatcher without schedules, and nothing loaded, saved or written.

    Raises:
        ConfigError: there is no all-to-all to measure.
    """
    if not moe_layers(family_of(cfg).stacks(cfg)) or cfg.parallel.expert_model_parallel_size == 1:
        raise ConfigError(
            f"parallel.expert_model_parallel_size ({cfg.parallel.expert_model_parallel_size}) must be above 1, and the "
            "model must have experts: otherwise there is no all-to-all to profile; set --expert-model-parallel-size"
        )
    cfg = copy.deepcopy(cfg)
    if cfg.moe.moe_token_dispatcher_type in ("alltoall", "allgather", "auto"):
        cfg.moe.moe_token_dispatcher_type = "lsh"
    cfg.lsh.lsh_warmup_iters = cfg.lsh.lsh_anneal_iters = 0
    cfg.lsh.lsh_probe_interval = None
    cfg.checkpoint.save = cfg.checkpoint.load = cfg.checkpoint.pretrained_checkpoint = None
    cfg.logging.metrics_jsonl = cfg.logging.tensorboard_dir = None
    return cfg


def measure(cfg: Config, family: Family, ctx: ParallelContext, steps: int, settle: int = 2) -> tuple[Steps, Steps]:
    """Train a little, exact and LSH steps in turn. Collective over the world.

    Args:
        cfg: from :func:`profiling_config`.
        steps: measured steps of each kind.
        settle: steps of each kind before them, for allocations and first calls.

    Returns:
        (exact, LSH)
    """
    cfg.training.train_iters = max(cfg.training.train_iters or 0, 2 * (settle + steps))  # so much data is needed
    run = set_up(cfg, family, ctx)
    kinds: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    with run.batches("train") as batches:
        for iteration in range(2 * (settle + steps)):
            exact = iteration % 2 == 0
            if ctx.world.size > 1:
                dist.barrier(group=ctx.world.process_group)
            with exact_dispatch(run.model) if exact else nullcontext():
                began = time.perf_counter()
                run.step(batches, iteration, False)  # ends with the loss on the host, so the device is done
                step_ms = 1e3 * (time.perf_counter() - began)
            sample = _collect(run, step_ms)
            if iteration >= 2 * settle:
                kinds[exact].append(sample)
    return _summarize(kinds[True]), _summarize(kinds[False])


def _collect(run: Run, step_ms: float) -> dict[str, float]:
    layers = run.telemetry.collect(run.ctx, iterations=1)

    def total(name: str) -> float:
        return sum(layer[name] or 0.0 for layer in layers)

    sample = {
        "step_ms": step_ms,
        "alltoall_ms": total("alltoall_time_ms"),
        "experts_ms": total("experts_time_ms"),
        "lsh_ms": total("lsh_time_ms"),
        "wire_ms": total("wire_time_ms"),
        "bytes": total("alltoall_bytes") / run.ctx.world.size,
    }
    sample["rest_ms"] = step_ms - sum(sample[part] for part in PARTS if part != "rest_ms")
    stages = {stage: total(f"lsh_{stage}_time_ms") for stage in LSH_STAGES}
    return sample | {f"stage {stage}": ms for stage, ms in stages.items()}


def _summarize(samples: list[dict[str, float]]) -> Steps:
    median = {key: statistics.median(sample[key] for sample in samples) for key in samples[0]}
    steps_ms = [sample["step_ms"] for sample in samples]
    quartiles = statistics.quantiles(steps_ms, n=4) if len(steps_ms) > 1 else steps_ms * 3
    return Steps(
        step_ms=median["step_ms"],
        quartiles_ms=(quartiles[0], quartiles[2]),
        **{part: median[part] for part in PARTS},
        bytes=median["bytes"],
        stages_ms={stage: median[f"stage {stage}"] for stage in LSH_STAGES},
    )
