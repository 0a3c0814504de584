"""What the planner computes with, measured on this cluster with this model: the part of a cluster file that is no datasheet.

Speeds are those of one rank while all are busy: micro-batches of the real model, whole and halved, with every way of
dispatching in turn; what the planner counts for them is divided by what they took. Links: ``training/link_speeds.py``. A
file of all that is a cluster file without nodes and memory.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from torch import Tensor

from megatron_lsh.config import padded_vocab_size, required
from megatron_lsh.config.moe import LSHConfig, MoEConfig
from megatron_lsh.errors import ConfigError
from megatron_lsh.families import Batch
from megatron_lsh.lsh.cost import grouping_operations
from megatron_lsh.models.stacks import moe_layers
from megatron_lsh.moe.layer import MoELayer
from megatron_lsh.moe.registry import DispatcherSpec, build_dispatcher
from megatron_lsh.moe.schedule import Scheduled
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.data_parallel import accumulate
from megatron_lsh.parallel.parameters import is_expert, local
from megatron_lsh.plan.flops import experts_share, forward_flops
from megatron_lsh.plan.memory import Sizes
from megatron_lsh.plan.traffic import reduced
from megatron_lsh.training.link_speeds import finish, link_of, measure_links, measure_slowdown, slowest_since
from megatron_lsh.training.pipeline import to_device
from megatron_lsh.training.run import Run

RATES = (0.1, 0.3)
"""shares of rows at which LSH is measured"""
CASTS, CODES = "bf16", "fp8"
"""wire dtypes at which casts and codes are measured"""


class Way(NamedTuple):
    """A dispatch that is measured. `rate`: of LSH; None for exact dispatch."""

    rate: float | None = None
    scope: str | None = None
    deduplicated: bool = False
    wire: str | None = None


class Sample(NamedTuple):
    """Medians of one micro-batch, forward and backward, in seconds; means over the ranks but for the whole."""

    whole: float
    alltoall: float
    experts: float
    lsh: float
    wire: float
    tokens: float
    """of a rank"""
    imbalance: float

    @property
    def rest(self) -> float:
        return self.whole - self.alltoall - self.experts - self.lsh - self.wire


def measure_primitives(run: Run, steps: int) -> dict[str, Any]:
    """Sections of a cluster file. Collective over the world.

    Args:
        steps: micro-batches of each kind, and steps.

    Raises:
        ConfigError: for a pipeline, or a model whose rows do not travel.
    """
    cfg, ctx = run.cfg, run.ctx
    if ctx.layout.pp > 1 or ctx.ep.size == 1 or not moe_layers(run.family.stacks(cfg)):
        raise ConfigError(
            f"parallel.pipeline_model_parallel_size ({ctx.layout.pp}) must be 1 and parallel.expert_model_parallel_size "
            f"({ctx.ep.size}) above 1 to measure primitives: change them"
        )
    nodes = len(set(ctx.node_of_rank))
    if nodes > 1 and not ctx.ep_spans_nodes:
        raise ConfigError(
            f"parallel.expert_model_parallel_size ({ctx.ep.size}) must span the {nodes} nodes, so that the links between "
            "them are measured: raise it"
        )
    links = measure_links(ctx)
    samples = _samples(run, steps)
    compute, dispatch = _speeds(run, samples)
    compute |= _once(run, steps, samples[Way(), 1].whole, links)
    exact = samples[Way(), 1]
    return {
        "source": "measured",
        "compute": compute,
        **links,
        **dispatch,
        "overlap": {"slowdown": measure_slowdown(ctx)},
        "routing": {"max_over_mean": round(exact.imbalance, 4)},
    }


def iterations_for(steps: int) -> int:
    """Iterations whose data is enough for :func:`measure_primitives`: all ways, micro-batches whole and halved, steps."""
    return (2 * (len(RATES) + 5) + 1) * (steps + 1)


def use(run: Run, way: Way) -> None:
    """Dispatch like this from now on."""
    cfg = run.cfg
    moe = dataclasses.replace(
        cfg.moe,
        moe_token_dispatcher_type="alltoall" if way.rate is None else "lsh",
        moe_node_deduplication="on" if way.deduplicated else "off",
        moe_overlap_chunks=1,
    )
    lsh = dataclasses.replace(
        cfg.lsh, lsh_target_rate=str(way.rate or 1.0), lsh_scope=way.scope, lsh_start_layer=0, lsh_wire_dtype=way.wire
    )
    layers = [module for module in run.model.modules() if isinstance(module, MoELayer)]
    for layer, dispatcher in zip(layers, dispatchers(run, moe, lsh), strict=True):
        layer.dispatcher = dispatcher


def dispatchers(run: Run, moe: MoEConfig, lsh: LSHConfig) -> list[Scheduled]:
    """Of all MoE layers of the model, in their order, under other settings. A stack's layers have its width."""
    return [
        build_dispatcher(DispatcherSpec.of(stack.cfg.model, moe, lsh, run.ctx, layer))
        for stack in run.family.stacks(run.cfg)
        for layer in moe_layers([stack])
    ]


def ways(ctx: ParallelContext) -> list[Way]:
    """Those that this layout has."""
    even = ctx.ep_local.size > 1 and ctx.ep_node.size > 1
    found = [Way(), Way(wire=CASTS), Way(wire=CODES), *(Way(rate, "rank") for rate in RATES)]
    return found + ([Way(RATES[0], "node"), Way(deduplicated=True)] if even else [])


def _samples(run: Run, repeats: int) -> dict[tuple[Way, int], Sample]:
    """By way and by how many parts a micro-batch is cut into (1 or 2), in turn."""
    ctx, micro = run.ctx, required(run.cfg.training.micro_batch_size)
    cuts = (1, 2) if micro % 2 == 0 else (1,)
    kinds = [(way, cut) for way in ways(ctx) for cut in cuts]
    collected: dict[tuple[Way, int], list[Sample]] = {kind: [] for kind in kinds}
    with run.batches("train") as batches:
        for repeat in range(repeats + 1):  # the first one is thrown away
            for way, cut in kinds if repeat % 2 else kinds[::-1]:
                use(run, way)
                batch = to_device(next(batches), ctx.device)
                collected[way, cut].append(_micro_batch(run, _first(batch, micro // cut)))
    run.step.optimizer.zero_grad(set_to_none=True)
    return {
        kind: Sample(*(statistics.median(column) for column in zip(*samples[1:], strict=True)))
        for kind, samples in collected.items()
    }


def _first(batch: Batch, samples: int) -> Batch:
    return {name: value[:samples] if isinstance(value, Tensor) else value for name, value in batch.items()}


def _micro_batch(run: Run, batch: Batch) -> Sample:
    """Forward and backward, without a reduction of gradients."""
    ctx = run.ctx
    accumulate(run.model, last=False)
    run.telemetry.collect(ctx, iterations=1)
    dist.barrier(group=ctx.world.process_group)
    finish(ctx.device)
    began = time.perf_counter()
    run.step.forward_step(run.model, batch).objective(micro_batches=1).backward()
    finish(ctx.device)
    whole = slowest_since(began, ctx)
    layers = run.telemetry.collect(ctx, iterations=1)

    def total(name: str) -> float:
        return sum(layer[name] or 0.0 for layer in layers)

    samples = next(value.shape[0] for value in batch.values() if isinstance(value, Tensor))
    share = samples / required(run.cfg.training.micro_batch_size)
    tokens = share * sum(Sizes.of(stack, ctx.layout).tokens for stack in run.family.stacks(run.cfg))
    mean = total("alltoall_bytes") / ctx.world.size
    busiest = total("alltoall_bytes_in_max") / mean if mean else 1.0
    return Sample(
        whole, 1e-3 * total("alltoall_time_ms"), 1e-3 * total("experts_time_ms"), 1e-3 * total("lsh_time_ms"),
        1e-3 * total("wire_time_ms"), tokens, max(busiest, 1.0),
    )  # fmt: skip


def _speeds(run: Run, samples: dict[tuple[Way, int], Sample]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The section `compute`, and the sections `lsh` and `dispatch`."""
    cfg, ctx, family = run.cfg, run.ctx, run.family
    spec = DispatcherSpec.of(cfg.model, cfg.moe, cfg.lsh, ctx, moe_layers(family.stacks(cfg))[0])
    layers, topk = len(moe_layers(family.stacks(cfg))), cfg.moe.moe_router_topk
    micro, shared = required(cfg.training.micro_batch_size), ctx.layout.tp * ctx.layout.cp
    vocabulary = _padded_vocabulary(run)
    forward, routed = forward_flops(family, cfg, vocabulary), experts_share(family, cfg, vocabulary)
    dense, grouped = {}, {}
    clustering: list[tuple[float, float]] = []  # (operations per row, seconds per row)
    further: dict[str, list[float]] = {"node": [], "deduplicated": []}
    coded: dict[str, list[float]] = {CASTS: [], CODES: []}
    element = Sizes.of(family.stacks(cfg)[0], ctx.layout).element
    for (way, cut), sample in samples.items():
        exact, samples_in = samples[Way(), cut], micro / cut
        rows = sample.tokens * topk
        groups = rows / spec.num_experts
        flops = 3.0 * forward * samples_in / shared
        if way == Way():
            dense[sample.tokens] = flops * (1 - routed) / sample.rest * 1e-12
        sent = 1.0 if way.rate is None else way.rate
        if way.scope != "node" and way.wire is None:
            grouped[ctx.ep.size * groups * sent] = flops * routed * sent / max(sample.experts, 1e-9) * 1e-12
        extra = (sample.rest - exact.rest) / layers / rows
        if way.wire is not None:  # a row is encoded and decoded in each of four all-to-alls
            coded[way.wire].append(layers * rows * 8 * spec.hidden * element / max(sample.wire, 1e-9))
        elif way.scope == "rank":
            clusters = max(sent * groups, 1.0)
            work = grouping_operations(clusters, spec.hidden, *cfg.lsh.hash_shape(), cfg.lsh.lsh_refine_steps)
            if cfg.lsh.lsh_residual == "interpolate":
                work += spec.restoration().operations(round(clusters), spec.hidden, sent)
            clustering.append((work, sample.lsh / layers / rows + extra))
        elif way.deduplicated:
            further["deduplicated"].append(extra)
        elif way.scope == "node":
            flat = samples[Way(way.rate, "rank"), cut]
            further["node"].append((sample.rest - flat.rest) / layers / rows)
    per_row, speed = _line(clustering)
    compute = {"dense_tflops": _rising(dense), "grouped_tflops": _rising(grouped)}
    sections: dict[str, Any] = {"lsh": {"row_ns": per_row * 1e9, **({"tflops": speed * 1e-12} if speed else {})}}
    medians = {name: max(statistics.median(values), 0.0) * 1e9 for name, values in further.items() if values}
    speeds = {name: statistics.median(coded[dtype]) * 1e-9 for name, dtype in (("casting", CASTS), ("coding", CODES))}
    sections["dispatch"] = {f"{name}_row_ns": value for name, value in medians.items()}
    sections["dispatch"] |= {f"{name}_gb_per_s": value for name, value in speeds.items()}
    return compute, sections


def _padded_vocabulary(run: Run) -> int:
    if run.tokenizer is None:
        return 0
    size = max(run.tokenizer.vocab_size, run.cfg.model.vocab_size or 0)
    return padded_vocab_size(size, run.cfg.model.make_vocab_size_divisible_by, run.ctx.layout.tp)


def _line(points: list[tuple[float, float]]) -> tuple[float, float | None]:
    """(seconds per row, operations per second), neither negative; None where operations take no time."""
    work, taken = np.array(points).T
    slope, start = np.polyfit(work, taken, 1) if len(set(work)) > 1 else (0.0, float(np.mean(taken)))
    if slope * float(np.max(work)) <= 1e-3 * float(np.mean(taken)):
        return max(float(np.mean(taken)), 0.0), None
    if start < 0.0:
        return 0.0, float(work @ work / max(work @ taken, 1e-30))
    return float(start), float(1.0 / slope)


def _rising(points: dict[float, float]) -> list[list[float]]:
    return [[size, rate] for size, rate in sorted(points.items())]


def _once(run: Run, steps: int, micro_batch: float, links: dict[str, Any]) -> dict[str, float]:
    """The speed of the optimizer, and what else a step takes beside its micro-batches and reductions."""
    ctx, optimizer = run.ctx, run.step.optimizer
    taken, updates, moments = [], [], list[float]()

    def mark(*_: Any) -> None:
        finish(ctx.device)
        moments.append(time.perf_counter())

    hooks = [optimizer.register_step_pre_hook(mark), optimizer.register_step_post_hook(mark)]
    use(run, Way())
    with run.batches("train") as batches:
        for iteration in range(steps + 1):
            moments.clear()
            dist.barrier(group=ctx.world.process_group)
            began = time.perf_counter()
            run.step(batches, iteration, False)
            taken.append(slowest_since(began, ctx))
            updates.append(moments[-1] - moments[0] if moments else 0.0)  # none where a gradient is not finite
    for hook in hooks:
        hook.remove()
    run.telemetry.collect(ctx, iterations=1)
    update = statistics.median(updates[1:])
    rest = statistics.median(taken[1:]) - update - run.step.micro_batches * micro_batch
    section = links["across" if "across" in links else "inside"]
    link = link_of(section)
    held = 0
    for expert, copies in ((False, ctx.layout.dp * ctx.layout.cp), (True, ctx.layout.edp)):
        numbers = sum(local(p).numel() for p in run.model.parameters() if is_expert(p) == expert)
        held += numbers
        sent = reduced(copies, False, 4.0 * numbers, 0.0)
        rest -= sent / link.bandwidth / section["reduction_efficiency"]
    speed = held / max(update, 1e-3 * micro_batch) * 1e-9
    return {"optimizer_gparams_per_s": round(speed, 6), "step_ms": round(max(1e3 * rest, 0.0), 3)}
