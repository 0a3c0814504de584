"""How long a step takes on a cluster: a model, of the counts that the dry run has and the speeds that a cluster file has.

A micro-batch takes a stage, forward and backward,

    FLOPs outside the experts / speed + layers x (experts' FLOPs / speed + LSH + what rows wait for) + other collectives

and a step the micro-batches of its slowest stage, the pipeline's bubble and what of its sends is not hidden, the reduction
of gradients and the optimizer. A collective takes the longer of its two parts, inside nodes and between them. Everything
is counted for even routing, and the busiest rank has ``imbalance`` times the mean. Parameters, FLOPs, memory and rows come
from where the dry run takes them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache

import torch

from megatron_lsh.config.config import Config
from megatron_lsh.config.pipeline import Stages
from megatron_lsh.families import Family
from megatron_lsh.lsh import row_budgets
from megatron_lsh.lsh.cost import grouping_operations
from megatron_lsh.models.recompute import RecomputePlan
from megatron_lsh.models.stacks import Stack
from megatron_lsh.moe.registry import DispatcherSpec, deduplicates, metadata_bytes, rows_across, scope_of
from megatron_lsh.moe.wire import row_bytes
from megatron_lsh.parallel.context import ParallelContext, offline_context
from megatron_lsh.parallel.layout import ParallelLayout
from megatron_lsh.parallel.pipeline import iteration_time
from megatron_lsh.plan.cluster import Cluster, Kind
from megatron_lsh.plan.counting import ParameterCounts, kinds_of_stages
from megatron_lsh.plan.flops import LayerWork, layer_work
from megatron_lsh.plan.memory import Sizes
from megatron_lsh.plan.traffic import (
    Spread,
    keys_to_sharers,
    reduced,
    rows_to_stages,
    spread,
    tensor_parallel_passes,
)

LIMITS = ("compute", "network", "node links", "pipeline bubble")
_AT_THE_END = 1 << 62  # an iteration
_SMALL_CALLS = 3  # sums over all ranks in a step: losses, gradient norm, whether all are finite


@dataclass(frozen=True)
class Transfer:
    """Calls of one collective by all ranks alike.

    Attributes:
        calls: of it.
        far, near: bytes of one call that leave a node, and that a rank sends inside it.
        nodes, ranks: that take part, and of a node.
        kind: of call.
    """

    calls: float
    far: float
    near: float
    nodes: int
    ranks: int
    kind: Kind = "alltoall"

    def seconds(self, cluster: Cluster, faster: float, pieces: int = 1) -> tuple[float, float]:
        """(between nodes, inside nodes) of all calls, each in so many pieces: the longer one, and zero for the other."""
        calls = self.calls * pieces
        across = calls * cluster.across_seconds(self.far / pieces, self.nodes, faster, self.kind)
        inside = calls * cluster.inside.seconds(self.near / pieces, self.ranks, kind=self.kind)
        return (across, 0.0) if across >= inside else (0.0, inside)


@dataclass(frozen=True)
class ExpertPass:
    """MoE layers of a stage that are alike, in one direction of a micro-batch.

    Attributes:
        layers: of them, times the passes in this direction.
        experts: seconds of the experts.
        whole, pieced: what rows take; what of it goes in `pieces`, while experts run.
        beside: seconds of other arithmetic (counted elsewhere) that runs while rows set out.
    """

    layers: float
    experts: float
    whole: tuple[Transfer, ...]
    pieced: tuple[Transfer, ...]
    pieces: int = 1
    beside: float = 0.0

    def seconds(self, cluster: Cluster, faster: float) -> tuple[float, float, float]:
        """(experts, between nodes, inside nodes), of what is not hidden."""
        far = near = 0.0
        for transfers, pieces in ((self.whole, 1), (self.pieced, self.pieces)):
            for transfer in transfers:
                across, inside = transfer.seconds(cluster, faster, pieces)
                far, near = far + across, near + inside
        pieced = [sum(transfer.seconds(cluster, faster, self.pieces)) for transfer in self.pieced]
        experts, waits = self.experts, far + near
        if self.pieces > 1 and sum(pieced) > 0.0:
            travels, pieces = sum(pieced), self.pieces
            together = max(travels + experts / pieces, experts * cluster.slowdown + travels / pieces)
            waits -= travels + experts - min(together, travels + experts)
        if self.beside > 0.0:
            waits -= min(self.beside / cluster.slowdown, waits / 2)
        share = waits / (far + near) if far + near > 0.0 else 0.0
        return self.layers * experts, self.layers * far * share, self.layers * near * share


@dataclass(frozen=True)
class StageCost:
    """One micro-batch on one stage: seconds of arithmetic outside the experts (LSH among them), and everything that
    travels among ranks of the stage. `sends`: to the next stage, and back to the one before."""

    compute: float
    lsh: float
    experts: tuple[ExpertPass, ...]
    transfers: tuple[Transfer, ...]
    sends: Transfer | None

    def seconds(self, cluster: Cluster, faster: float) -> tuple[float, float, float]:
        """(arithmetic, between nodes, inside nodes), without sends."""
        parts = [(self.compute + self.lsh, 0.0, 0.0)]
        parts += [passed.seconds(cluster, faster) for passed in self.experts]
        parts += [(0.0, *transfer.seconds(cluster, faster)) for transfer in self.transfers]
        compute, far, near = (sum(column) for column in zip(*parts, strict=True))
        return compute, far, near


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what they go to, the parts of its slowest stage."""

    compute: float
    network: float
    node_links: float
    bubble: float

    @property
    def total(self) -> float:
        return self.compute + self.network + self.node_links + self.bubble

    @property
    def limit(self) -> str:
        """The largest part."""
        parts = (self.compute, self.network, self.node_links, self.bubble)
        return LIMITS[parts.index(max(parts))]


@dataclass(frozen=True)
class StepCost:
    """What a step consists of. `at` is cheap, so that bandwidths can be tried."""

    cluster: Cluster
    stages: Stages
    micro_batches: int
    of_stage: tuple[StageCost, ...]
    """stages that differ, each once"""
    reductions: tuple[Transfer, ...]
    update: float
    """seconds of the optimizer, and of what else happens once"""

    def at(self, faster: float = 1.0) -> StepTime:
        """On links between nodes that are `faster` times as fast as the cluster's."""
        cluster = self.cluster
        compute, far, near = max((stage.seconds(cluster, faster) for stage in self.of_stage), key=sum)
        count, sends = self.micro_batches, self.of_stage[0].sends
        sent = (0.0, 0.0) if sends is None else sends.seconds(cluster, faster)
        # Ranks that share a processor with other stages' ranks compute faster while those wait.
        alone = compute / min(cluster.ranks_per_processor, self.stages.ranks) + far + near
        busy = count * (compute + far + near)
        idle = max(iteration_time(self.stages, count, alone, 0.0), busy)
        longest = max(iteration_time(self.stages, count, alone, sum(sent)), busy)
        exposed, bubble = longest - idle, idle - busy
        reduced_far = reduced_near = 0.0
        for transfer in self.reductions:
            across, inside = transfer.seconds(cluster, faster)
            reduced_far, reduced_near = reduced_far + across, reduced_near + inside
        waits = reduced_far + reduced_near
        hidden = min(cluster.hidden_reduction * compute * 2 / 3, waits)  # behind the last backward pass
        share = 1.0 - hidden / waits if waits > 0.0 else 1.0
        return StepTime(
            count * compute + self.update + hidden * (cluster.slowdown - 1.0),
            count * far + reduced_far * share + (exposed if sent[0] > 0.0 else 0.0),
            count * near + reduced_near * share + (exposed if sent[0] == 0.0 else 0.0),
            bubble,
        )


def step_cost(
    family: Family, cfg: Config, cluster: Cluster, layout: ParallelLayout, counts: ParameterCounts, vocab_size: int
) -> StepCost:
    """What a step of this validated configuration consists of. `vocab_size`: padded.

    Raises:
        ConfigError: for a dispatch that this layout cannot have.
    """
    stages = Stages.from_config(cfg.parallel)
    node_size = cluster.ranks_per_node
    micro, total = cfg.training.micro_batch_size or 1, cfg.training.global_batch_size or 1
    of_stage: dict[Hashable, StageCost] = {}
    for stage, kind in enumerate(zip(kinds_of_stages(family, cfg, stages), _rates(family, cfg, stages), strict=True)):
        if kind not in of_stage:
            of_stage[kind] = _stage_cost(family, cfg, cluster, layout, stages, vocab_size, stage)
    slowest = max(counts.stages, key=sum)
    sharded, data_parallel = cfg.parallel.use_distributed_optimizer, layout.dp * layout.cp
    owned = slowest[0] / data_parallel + slowest[1] / layout.edp if sharded else sum(slowest)
    layers = sum(stack.num_layers for stack in family.stacks(cfg)) / stages.ranks
    compute_bytes = 2.0 if cfg.precision.half else 4.0
    reductions = []
    for held, dimensions in zip(slowest, (("dp", "cp"), ("edp",)), strict=True):
        group = spread(layout, node_size, *dimensions)
        sent = reduced(group.size, sharded, 4.0 * held, compute_bytes * held)
        reductions.append(_ring(cluster, group, layers, sent, "reduction"))
    everyone = spread(layout, node_size, "pp", "dp", "cp", "tp")
    reductions.append(_ring(cluster, everyone, _SMALL_CALLS, 64.0, "reduction"))
    update = owned / cluster.parameters_per_second + cluster.step_seconds
    return StepCost(
        cluster, stages, max(total // (micro * layout.dp), 1), tuple(of_stage.values()), tuple(reductions), update
    )


def _ring(cluster: Cluster, group: Spread, calls: float, size: float, kind: Kind) -> Transfer:
    """Each rank hands on `size` bytes in all to the next: of a group's ranks on a node one sends across."""
    rings = min(cluster.ranks_per_node, cluster.ranks) / group.per_node if group.nodes > 1 else 0.0
    near = size if group.near > 0 else 0.0
    calls = calls if group.size > 1 else 0.0
    return Transfer(calls, rings * size / max(calls, 1.0), near / max(calls, 1.0), group.nodes, _here(group), kind)


def _exchange(cluster: Cluster, group: Spread, to_each: float, calls: float = 1.0, kind: Kind = "alltoall") -> Transfer:
    """Each rank sends so many bytes to each other one."""
    senders = min(cluster.ranks_per_node, cluster.ranks)
    return Transfer(calls, senders * group.far * to_each, group.near * to_each, group.nodes, _here(group), kind)


def _here(group: Spread) -> int:
    return max(round(group.per_node), 1)


@lru_cache(maxsize=256)
def _context(layout: ParallelLayout, ranks_per_node: int) -> ParallelContext:
    return offline_context(layout, ranks_per_node=min(ranks_per_node, layout.world_size))


def _stage_cost(
    family: Family,
    cfg: Config,
    cluster: Cluster,
    layout: ParallelLayout,
    stages: Stages,
    vocab_size: int,
    stage: int,
) -> StageCost:
    micro = cfg.training.micro_batch_size or 1
    ranks = layout.tp * layout.cp
    work, lsh = 0.0, 0.0
    experts: list[ExpertPass] = []
    transfers: list[Transfer] = []
    sends: Transfer | None = None
    tokens = 0.0
    for stack in family.stacks(cfg):
        sizes = Sizes.of(stack, layout)
        tokens += sizes.tokens_full / layout.tp
        found: Counter[_Layer] = Counter()
        pattern, firsts = stack.moe_pattern(), dict[Hashable, int]()
        works = {is_moe: layer_work(stack, is_moe=is_moe) for is_moe in set(pattern)}
        for chunk in stages.of_rank(stage, stack.num_layers):
            plan = RecomputePlan.from_config(cfg.recompute, cfg.moe, len(chunk.layers))
            for place, number in enumerate(chunk.layers):
                is_moe, whole = pattern[number], place < plan.full_layers
                again = ("moe" if is_moe else "mlp") in plan.modules
                first = firsts.setdefault(_rate_of(stack, number), stack.first_layer + number) if is_moe else 0
                found[_Layer(is_moe, first, works[is_moe], whole, "core_attn" in plan.modules, again)] += 1
        for layer, count in found.items():
            work += count * layer.multiply_adds * sizes.tokens_attended
            transfers += _layer_transfers(cluster, layout, stack, sizes, layer, count)
            if layer.is_moe:
                moe = _MoE(cluster, layout, stack, sizes, layer)
                lsh += count * moe.lsh_seconds()
                experts += moe.passes(count)
        if stages.ranks > 1:
            sends = _sends(cluster, layout, stages, sizes)
    if stage == stages.ranks - 1:
        work += 3.0 * family.head(cfg, vocab_size).multiply_adds * micro
    flops = 2.0 * work / ranks / cluster.dense.at(max(tokens, 1.0))
    return StageCost(flops, lsh, tuple(experts), tuple(transfers), sends)


@dataclass(frozen=True)
class _Layer:
    """What tells layers apart. `again`: passes forward (whole layer, scores, feed-forward) on top of the first one."""

    is_moe: bool
    number: int
    work: LayerWork
    whole_again: bool
    scores_again: bool
    feed_forward_again: bool

    @property
    def multiply_adds(self) -> float:
        """Per token, forward and backward, without the routed experts."""
        work = self.work
        dense = work.projections + work.scores + work.feed_forward
        again = dense if self.whole_again else self.scores_again * work.scores
        again += work.feed_forward if self.feed_forward_again and not self.whole_again else 0.0
        return 3.0 * dense + again

    @property
    def forward_passes(self) -> int:
        """Of the experts."""
        return 2 if self.whole_again or self.feed_forward_again else 1


def _rate_of(stack: Stack, number: int) -> Hashable:
    """What tells how many rows an MoE layer sends: its rate at the end, which of a schedule holds for most of a run."""
    layer = stack.first_layer + number
    return stack.cfg.lsh.rates().at(layer, _AT_THE_END), layer < stack.cfg.lsh.lsh_start_layer


def _rates(family: Family, cfg: Config, stages: Stages) -> list[Hashable]:
    """For each stage those of its layers."""
    last = cfg.lsh.rates().phases[-1][1]
    if len(last) == 1 and cfg.lsh.lsh_start_layer == 0:
        return [last] * stages.ranks
    return [
        tuple(
            _rate_of(stack, number)
            for stack in family.stacks(cfg)
            for chunk in stages.of_rank(stage, stack.num_layers)
            for number in chunk.layers
        )
        for stage in range(stages.ranks)
    ]


def _layer_transfers(
    cluster: Cluster, layout: ParallelLayout, stack: Stack, sizes: Sizes, layer: _Layer, count: int
) -> list[Transfer]:
    """Among ranks that share a layer, and ranks that share a sequence."""
    node_size, found = cluster.ranks_per_node, []
    if layout.tp > 1:
        calls = tensor_parallel_passes(stack, is_moe=layer.is_moe) * (1.5 if layer.whole_again else 1.0)
        group = spread(layout, node_size, "tp")
        sent = count * calls * (layout.tp - 1) / layout.tp * sizes.gathered
        found.append(_ring(cluster, group, count * calls, sent, "alltoall"))
    if layout.cp > 1:
        shape = stack.shape
        row = shape.query_groups * shape.head_dim / layout.tp * sizes.element
        rows = keys_to_sharers(1, 1.0) / 2 * (1.5 if layer.whole_again else 1.0)  # keys and values in one call
        found.append(_exchange(cluster, spread(layout, node_size, "cp"), 2 * row * sizes.tokens_full, count * rows))
    return found


def _sends(cluster: Cluster, layout: ParallelLayout, stages: Stages, sizes: Sizes) -> Transfer:
    """Hidden states to the next stage and gradients to the one before, of a stage in the middle."""
    node_size = cluster.ranks_per_node
    borders = stages.ranks * stages.chunks - 1
    crossing = rows_to_stages(layout, stages, node_size) / 2.0 / borders
    size, senders = sizes.residual, min(cluster.ranks_per_node, cluster.ranks)
    nodes = max(spread(layout, node_size, "pp").nodes, 2)
    return Transfer(2.0 * stages.chunks, crossing * senders * size, (1.0 - crossing) * size, nodes, 2, "send")


class _MoE:
    """One MoE layer of a micro-batch on the busiest rank."""

    def __init__(self, cluster: Cluster, layout: ParallelLayout, stack: Stack, sizes: Sizes, layer: _Layer) -> None:
        cfg = stack.cfg
        model, moe = cfg.model, cfg.moe
        self.cluster, self.layout, self.cfg, self.layer, self.sizes = cluster, layout, cfg, layer, sizes
        context = _context(layout, cluster.ranks_per_node)
        self.spec = DispatcherSpec.of(model, moe, cfg.lsh, context, layer.number)
        self.group = spread(layout, cluster.ranks_per_node, "ep")
        self.rows = sizes.tokens * moe.moe_router_topk
        start = moe.moe_token_dispatcher_type in ("lsh", "auto") and layer.number >= cfg.lsh.lsh_start_layer
        self.scope = scope_of(self.spec) if start else None
        self.deduplicated = self.scope is None and deduplicates(self.spec)
        nodes = self.group.nodes
        sources = round(self.group.per_node) if self.scope == "node" else 1
        self.per_group = sources * self.rows / (moe.num_experts or 1)
        self.sent = 1.0
        if self.scope is not None:
            rows = max(round(self.per_group), 1)
            self.sent = int(row_budgets(torch.tensor([rows]), cfg.lsh.rates().at(layer.number, _AT_THE_END))) / rows
        #: of the rows, those that clusters stand for, and those that experts see
        self.compressed = 0.0 if self.scope is None else (nodes - 1) / nodes if self.scope == "node" else 1.0
        self.seen = 1.0 - self.compressed + self.compressed * self.sent

    def lsh_seconds(self) -> float:
        """Clustering and restoring, encoding, and the further handling of rows that go in two hops."""
        cluster, lsh, spec = self.cluster, self.cfg.lsh, self.spec
        per_row = cluster.deduplicated_row_seconds if self.deduplicated else 0.0
        if self.scope is not None:
            per_row += cluster.node_row_seconds if self.scope == "node" else 0.0
            clusters = max(self.sent * self.per_group, 1.0)
            work = grouping_operations(clusters, spec.hidden, *lsh.hash_shape(), lsh.lsh_refine_steps)
            if lsh.lsh_residual == "interpolate":
                restoring = spec.restoration().operations(round(clusters), spec.hidden, self.sent)
                work += restoring * (1.0 + (self.layer.forward_passes - 1) / 3)
            per_row += self.compressed * (cluster.lsh_row_seconds + work / cluster.lsh_flops)
        if lsh.lsh_wire_dtype is not None:
            travelling = self.seen * (4 + 2 * (self.layer.forward_passes - 1)) * 2.0  # encoded, and decoded
            speed = cluster.casting if lsh.lsh_wire_dtype in ("bf16", "fp32") else cluster.coding
            per_row += travelling * spec.hidden * self.sizes.element / speed
        return self.rows * per_row

    def passes(self, count: int) -> list[ExpertPass]:
        """Forward and backward, of `count` such layers."""
        moe, cluster = self.cfg.moe, self.cluster
        arriving = self.group.size * self.rows / (moe.num_experts or 1) * self.seen
        work = 2.0 * self.layer.work.routed / moe.moe_router_topk * self.rows * self.seen * cluster.imbalance
        experts = work / cluster.grouped.at(max(arriving, 1.0))
        beside = 0.0
        if moe.moe_shared_expert_overlap:
            shared = 2.0 * self.layer.work.shared * self.sizes.tokens_full / self.layout.tp
            beside = shared / cluster.dense.at(max(self.sizes.tokens, 1.0))
        found = []
        for times, factor, gradient in ((self.layer.forward_passes, 1.0, False), (1, 2.0, True)):
            whole, pieced = self._hops(gradient)
            pieces = moe.moe_overlap_chunks if pieced else 1
            found.append(ExpertPass(times * count, experts * factor, whole, pieced, pieces, beside * factor))
        return found

    def _hops(self, gradient: bool) -> tuple[tuple[Transfer, ...], tuple[Transfer, ...]]:
        """What rows take there and back in one direction: as a whole, and in pieces where those were asked for."""
        if self.group.size == 1:
            return (), ()
        cluster, group, spec = self.cluster, self.group, self.spec
        half = torch.float16 if self.cfg.precision.fp16 else torch.bfloat16
        dtype = half if self.cfg.precision.half else torch.float32
        lsh, plain = self.cfg.lsh, row_bytes(None, spec.hidden, dtype)
        name = lsh.lsh_wire_dtype_backward if gradient and lsh.lsh_wire_dtype_backward else lsh.lsh_wire_dtype
        wire, rows = row_bytes(name, spec.hidden, dtype), self.rows * cluster.imbalance
        told = () if gradient else (_exchange(cluster, group, 16.0 * spec.num_experts),)
        nodes, per_node = group.nodes, round(group.per_node)
        inner = Spread(per_node, 0.0, per_node - 1.0, 1)
        outer = Spread(nodes, nodes - 1.0, 0.0, nodes)
        if self.scope == "node":
            inside = _exchange(cluster, inner, rows / per_node * plain, 2.0)
            across = _exchange(cluster, outer, rows / nodes * self.sent * wire, 2.0, "hop")
            return (*told, inside), (across,)
        if self.deduplicated:
            visits = rows_across(nodes, spec.moe.moe_router_topk)[1] / max(nodes - 1, 1)  # of each other node
            tokens = rows / spec.moe.moe_router_topk * visits
            beside = metadata_bytes(spec.moe.moe_router_topk) / 2  # out, and not back
            across = _exchange(cluster, outer, tokens * (wire + beside), 2.0, "hop")
            inside = _exchange(cluster, inner, rows / per_node * plain, 2.0)
            return (*told, across), (inside,)
        if spec.moe.moe_token_dispatcher_type == "allgather":
            return (*told, _exchange(cluster, group, rows * self.sent * wire, 2.0)), ()
        return told, (_exchange(cluster, group, rows / group.size * self.sent * wire, 2.0),)
