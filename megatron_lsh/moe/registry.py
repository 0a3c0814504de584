"""Token dispatchers by name: what ``--moe-token-dispatcher-type`` picks from.

A factory takes a :class:`DispatcherSpec` and returns a dispatcher (dispatcher.py); schedules, exact evaluation and the like
are put around it here. Third parties add one without touching this package, either as an entry point in the group
``megatron_lsh.dispatchers``, or by giving ``package.module:factory`` as the flag's value. Most are one of

    row_dispatcher(spec)                   every row travels
    row_dispatcher(spec, compressor)       fewer rows travel
    lsh_dispatcher(spec, cluster=...)      LSH with a part of another make

CONTRIBUTING.md has an example.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.metadata import entry_points

from megatron_lsh import lsh
from megatron_lsh.config.model import ModelConfig
from megatron_lsh.config.moe import LSHConfig, MoEConfig
from megatron_lsh.errors import ConfigError
from megatron_lsh.lsh.cost import MOST, Restoration, choose_restoration
from megatron_lsh.moe.compressors.low_rank import LowRankResidual
from megatron_lsh.moe.compressors.lsh import GAUGES as LSH_GAUGES
from megatron_lsh.moe.compressors.lsh import (
    Cluster,
    ClusterByHash,
    LSHCompressor,
    Represent,
    RestoreRows,
    WithResidual,
    as_sent,
    interpolated,
    send_means,
    send_members,
)
from megatron_lsh.moe.compressors.tokens import TokenLSHCompressor
from megatron_lsh.moe.dispatcher import GAUGES as DISPATCHER_GAUGES
from megatron_lsh.moe.dispatcher import Compressed, Compressor, Dispatcher, RowDispatcher, RowPath, ThroughExperts
from megatron_lsh.moe.experts import expert_width, row_width
from megatron_lsh.moe.nodes import GAUGES as NODE_GAUGES
from megatron_lsh.moe.nodes import DeduplicatedDispatcher, ExceptOwnNode, InsideNode, node_order
from megatron_lsh.moe.overlap import InPieces
from megatron_lsh.moe.schedule import DEDUPLICATED, EXACT, LOSSLESS, Scheduled, Trial
from megatron_lsh.moe.transport import AllGatherTransport, AllToAllTransport, LocalTransport, Transport
from megatron_lsh.moe.wire import Wire
from megatron_lsh.parallel.context import ParallelContext

ENTRY_POINT_GROUP = "megatron_lsh.dispatchers"

#: What the dispatchers of this package measure; a run's outputs have these figures whichever of them runs.
GAUGES = (*DISPATCHER_GAUGES, *LSH_GAUGES, *NODE_GAUGES)


def restoration(lsh: LSHConfig, hidden: int, expert_width: int | None, gated: bool, rate: float) -> Restoration:
    """``--lsh-interpolation-block`` and ``-rank`` with what is automatic filled in."""
    return choose_restoration(
        hidden, expert_width, gated, rate, lsh.lsh_interpolation_block, lsh.lsh_interpolation_rank
    )


@dataclass(frozen=True)
class DispatcherSpec:
    """Everything a factory may need to build the dispatcher of one MoE layer.

    Attributes:
        hidden: D, width of a row.
        num_experts: E.
        layer: number of the layer in the model.
        expert_width: F; None where nobody knows.
        gated: whether experts are SwiGLU.
    """

    moe: MoEConfig
    lsh: LSHConfig
    ctx: ParallelContext
    hidden: int
    num_experts: int
    layer: int
    expert_width: int | None = None
    gated: bool = False

    @classmethod
    def of(cls, model: ModelConfig, moe: MoEConfig, lsh: LSHConfig, ctx: ParallelContext, layer: int) -> DispatcherSpec:
        """What the settings say of the MoE layer with this number. Raises ConfigError for a width that is not known."""
        width, inner = row_width(model, moe), expert_width(model, moe)
        return cls(moe, lsh, ctx, width, moe.num_experts or 0, layer, inner, model.swiglu)

    def restoration(self) -> Restoration:
        """How ``--lsh-residual interpolate`` restores rows here."""
        # At the lowest rate most rows are to be restored: the block must be affordable then, too.
        lowest = min(self.lsh.rates().of_layer(self.layer))
        return restoration(self.lsh, self.hidden, self.expert_width, self.gated, lowest)

    def transport(self, kind: type[Transport] = AllToAllTransport) -> Transport:
        """What moves rows, in the numbers of ``--lsh-wire-dtype``; with one expert-parallel rank nothing moves."""
        kind = LocalTransport if self.ctx.ep.size == 1 else kind
        return kind(self.ctx.ep, self.num_experts, self.wire(), self.ctx.node_of_rank)

    def wire(self) -> Wire:
        """The numbers that travel."""
        return Wire.of(self.lsh.lsh_wire_dtype, self.lsh.lsh_wire_dtype_backward)


DispatcherFactory = Callable[[DispatcherSpec], Dispatcher]


def row_dispatcher(
    spec: DispatcherSpec, compressor: Compressor | None = None, transport: Transport | None = None
) -> RowDispatcher:
    """Rows to their experts and back, compressed or not.

    Args:
        transport: by default :meth:`DispatcherSpec.transport`.
    """
    transport = transport or spec.transport()
    path: RowPath = _through_experts(spec, transport)
    if compressor is not None:
        # The probe compares with rows that travelled in the model's numbers.
        exact = ThroughExperts(type(transport)(spec.ctx.ep, spec.num_experts, None, spec.ctx.node_of_rank))
        path = Compressed(path, compressor, exact, spec.lsh.lsh_probe_interval)
    return RowDispatcher(path, spec.num_experts, transport)


def _through_experts(spec: DispatcherSpec, transport: Transport) -> RowPath:
    """In pieces where asked to, and where rows travel."""
    chunks = spec.moe.moe_overlap_chunks
    return InPieces(transport, chunks) if chunks > 1 and transport.group.size > 1 else ThroughExperts(transport)


def lsh_dispatcher(
    spec: DispatcherSpec,
    *,
    cluster: Cluster | None = None,
    represent: Represent | None = None,
    restore: RestoreRows | None = None,
    transport: Transport | None = None,
) -> RowDispatcher:
    """LSH as the flags say, but for the parts that are given."""
    compressor = lsh_compressor(spec, cluster=cluster, represent=represent, restore=restore)
    return row_dispatcher(spec, compressor, transport)


def node_lsh_dispatcher(spec: DispatcherSpec) -> RowDispatcher:
    """LSH at node scope: rows of all ranks of a node cluster together before they cross the network (nodes.py)."""
    ctx, nodes = spec.ctx, spec.ctx.ep_node.size
    per_rank = spec.num_experts // ctx.ep.size
    inside = AllToAllTransport(ctx.ep_local, spec.num_experts, None, ctx.node_of_rank)
    network, as_is = (
        _through_experts(spec, AllToAllTransport(ctx.ep_node, nodes * per_rank, numbers, ctx.node_of_rank))
        for numbers in (spec.wire(), None)
    )
    compressor = ExceptOwnNode(lsh_compressor(spec), nodes, ctx.ep_node.rank)
    flat = spec.transport()
    path = InsideNode(inside, Compressed(network, compressor, as_is, spec.lsh.lsh_probe_interval), flat)
    order_E = node_order(nodes, ctx.ep_local.size, per_rank, ctx.device)
    return RowDispatcher(path, spec.num_experts, flat, order_E)


def deduplicated_dispatcher(spec: DispatcherSpec) -> DeduplicatedDispatcher:
    """Exact, with one row per (token, node) across the network (nodes.py).

    Pieces (``--moe-overlap-chunks``) are cut by expert, so they are those of the hop inside the node: a row across the
    network has experts in several.

    Raises:
        ConfigError: pieces where a node has one rank and there is no such hop.
    """
    ctx, nodes = spec.ctx, spec.ctx.ep_node.size
    if spec.moe.moe_overlap_chunks > 1 and ctx.ep_local.size == 1:
        raise ConfigError(
            f"moe.moe_overlap_chunks ({spec.moe.moe_overlap_chunks}) must be 1 with moe.moe_node_deduplication "
            f"({spec.moe.moe_node_deduplication}) on nodes of one rank, because a row that crosses has experts in several "
            "pieces: drop one of --moe-overlap-chunks and --moe-node-deduplication"
        )
    per_node = spec.num_experts // nodes
    network = AllToAllTransport(ctx.ep_node, nodes, spec.wire(), ctx.node_of_rank)
    kind = LocalTransport if ctx.ep_local.size == 1 else AllToAllTransport
    inside = _through_experts(spec, kind(ctx.ep_local, per_node, None, ctx.node_of_rank))
    return DeduplicatedDispatcher(network, RowDispatcher(inside, per_node, None), spec.transport(), per_node)


def scope_of(spec: DispatcherSpec) -> str:
    """``--lsh-scope`` with its default filled in: "node" or "rank".

    Raises:
        ConfigError: node scope was asked for, and expert parallelism does not span nodes of several ranks, evenly.
    """
    fits = _even(spec) and spec.ctx.ep_local.size > 1
    if spec.lsh.lsh_scope == "node" and not fits:
        raise ConfigError(
            "lsh.lsh_scope (node) must have expert parallel groups that span several nodes, with equally many ranks on each "
            f"and more than one; here a group of {spec.ctx.ep.size} ranks lies on nodes as {nodes_in_words(spec)}: "
            "leave --lsh-scope out, or say with --moe-node-size how many ranks a node has"
        )
    return "node" if fits and spec.lsh.lsh_scope != "rank" and spec.lsh.lsh_residual != "lowrank" else "rank"


def _even(spec: DispatcherSpec) -> bool:
    """Whether expert-parallel groups span several nodes, with equally many ranks on each."""
    nodes = {spec.ctx.node_of_rank[rank] for rank in spec.ctx.ep.ranks}
    return len(nodes) == spec.ctx.ep_node.size > 1


def nodes_in_words(spec: DispatcherSpec) -> str:
    """How the ranks of the expert-parallel group lie on nodes: ``2 + 2 ranks``."""
    nodes = [spec.ctx.node_of_rank[rank] for rank in spec.ctx.ep.ranks]
    return " + ".join(str(nodes.count(node)) for node in dict.fromkeys(nodes)) + (
        " ranks" if len(nodes) > 1 else " rank"
    )


def deduplicates(spec: DispatcherSpec) -> bool:
    """``--moe-node-deduplication`` with its default filled in: whether exact dispatch sends fewer bytes so."""
    nodes, topk, asked = spec.ctx.ep_node.size, spec.moe.moe_router_topk, spec.moe.moe_node_deduplication
    if not _even(spec) or asked == "off":
        return False
    rows, visits = rows_across(nodes, topk)
    metadata = metadata_bytes(topk) / (4 * spec.hidden)  # beside a row
    whole = spec.moe.moe_overlap_chunks > 1 and spec.ctx.ep_local.size == 1  # pieces were asked for, and would be none
    return asked == "on" or (visits * (1 + metadata) < rows and not whole)


def rows_across(nodes: int, topk: int) -> tuple[float, float]:
    """Rows per token that leave a node under even routing: one per expert on another node, K (M - 1) / M for K experts per
    token over M nodes; and one per other node that has any, (M - 1) (1 - (1 - 1/M)^K)."""
    return topk * (nodes - 1) / nodes, (nodes - 1) * (1 - (1 - 1 / nodes) ** topk)


def metadata_bytes(topk: int) -> int:
    """Beside a de-duplicated row: an id and a weight for each expert that a token may have."""
    return 8 * topk


def describe(spec: DispatcherSpec) -> str | None:
    """One line for the log where several nodes take part: what was chosen, and how many rows cross the network."""
    nodes, topk = spec.ctx.ep_node.size, spec.moe.moe_router_topk
    if not spec.ctx.ep_spans_nodes:
        return None
    where = f"expert parallelism over nodes of {nodes_in_words(spec)}"
    name = spec.moe.moe_token_dispatcher_type
    if not _even(spec):
        return f"{where}: not equally many on each, so every rank sends its rows by itself"
    flat, visits = rows_across(nodes, topk)
    if name in ("lsh", "auto"):
        scope, (least, most) = scope_of(spec), spec.lsh.rates().span()
        sent = f"{least * flat:.2f}" if least == most else f"{least * flat:.2f} to {most * flat:.2f}"
        sent = sent if spec.lsh.lsh_clustering == "budget" else "fewer"
        return f"{where}: LSH at {scope} scope; {sent} rows per token cross the network instead of {flat:.2f}"
    if name == "alltoall" and deduplicates(spec):
        return (
            f"{where}: one row per (token, node), about {visits:.2f} per token across the network instead of {flat:.2f}"
        )
    return f"{where}: {flat:.2f} rows per token cross the network"


def describe_restoration(spec: DispatcherSpec) -> str | None:
    """One line for the log where interpolation takes more of the exact experts' arithmetic than it should."""
    if spec.moe.moe_token_dispatcher_type not in ("lsh", "auto") or spec.lsh.lsh_residual != "interpolate":
        return None
    found = spec.restoration()
    if found.share is None or found.share <= MOST:
        return None
    few = replace(spec, lsh=replace(spec.lsh, lsh_interpolation_block=None, lsh_interpolation_rank=0)).restoration()
    way = "--lsh-residual none restores for nothing, at more loss"
    if few.rank is not None:
        way += f"; --lsh-interpolation-rank auto (here {few.rank}) takes {few.share:.1%} where groups are large"
    return (
        f"interpolation between blocks of {found.block} representatives takes {found.share:.1%} of the arithmetic of exact "
        f"experts, more than {MOST:.0%}, because experts of width {spec.expert_width} are narrow: {way}"
    )


def describe_rates(spec: DispatcherSpec) -> str | None:
    """One line for the log where rates follow the residual energy."""
    rates = spec.lsh.rates()
    if rates.energy is None or spec.moe.moe_token_dispatcher_type in ("alltoall", "allgather"):
        return None
    least, most = rates.span()
    return (
        f"LSH sends between {least:.1%} and {most:.1%} of the rows of each layer, so that its residual energy stays near "
        f"{rates.energy:g} (--lsh-target-energy)"
    )


def lsh_compressor(
    spec: DispatcherSpec,
    *,
    cluster: Cluster | None = None,
    represent: Represent | None = None,
    restore: RestoreRows | None = None,
) -> LSHCompressor:
    """What clusters, represents and restores rows; parts that are not given are those that the flags name."""
    cfg = spec.lsh
    straight_through = cfg.lsh_gradient == "straight-through"
    keeps_residual = cfg.lsh_residual in ("identity", "lowrank") or straight_through
    on_tokens = cluster is represent is restore is None and not cfg.sends_members()
    on_tokens = on_tokens and cfg.lsh_residual in ("identity", "none")
    if cluster is None:
        rotation_DQW = lsh.make_rotation(
            spec.hidden, *cfg.hash_shape(), seed=cfg.lsh_seed, stream=spec.layer, device=spec.ctx.device
        )
        cluster = ClusterByHash(cfg, rotation_DQW, spec.layer)
    represent = represent or (send_members if cfg.sends_members() else send_means)(keeps_residual)
    restore = restore or _restoration(spec)
    sent_rows = getattr(cluster, "sent_rows", lambda counts_E: None)
    if on_tokens:
        adds = cfg.lsh_residual == "identity"
        return TokenLSHCompressor(
            cluster, represent, restore, sent_rows, adds_residual=adds, keeps_tokens=adds or straight_through
        )
    return LSHCompressor(cluster, represent, restore, sent_rows)


def _restoration(spec: DispatcherSpec) -> RestoreRows:
    cfg = spec.lsh
    if cfg.lsh_residual == "interpolate":
        found = spec.restoration()
        return interpolated(found.block, found.form, found.rank, found.beyond)
    if cfg.lsh_residual == "none":
        return as_sent(cfg.lsh_gradient == "straight-through")
    if cfg.lsh_residual == "identity":
        return WithResidual()
    return WithResidual(LowRankResidual(spec.num_experts, spec.hidden, cfg.lsh_residual_rank, spec.ctx))


def _allgather(spec: DispatcherSpec) -> RowDispatcher:
    return row_dispatcher(spec, transport=spec.transport(AllGatherTransport))


def _lsh(spec: DispatcherSpec) -> RowDispatcher:
    return node_lsh_dispatcher(spec) if scope_of(spec) == "node" else lsh_dispatcher(spec)


def builtin_dispatchers() -> dict[str, DispatcherFactory]:
    """The dispatchers of this package. With one expert-parallel rank each uses the local transport."""
    return {"alltoall": row_dispatcher, "allgather": _allgather, "lsh": _lsh, "auto": _lsh}


def build_dispatcher(spec: DispatcherSpec) -> Scheduled:
    """The dispatcher of a layer, with what runs in its place now and then.

    Raises:
        ConfigError: as :func:`resolve_dispatcher`.
    """
    name = spec.moe.moe_token_dispatcher_type
    factory = resolve_dispatcher(name)
    sends_all = name in ("alltoall", "allgather")
    exact_factory = factory if sends_all else row_dispatcher
    as_is = replace(spec, lsh=replace(spec.lsh, lsh_wire_dtype=None, lsh_wire_dtype_backward=None))
    alternatives: dict[str, Dispatcher] = {EXACT: exact_factory(spec), LOSSLESS: exact_factory(as_is)}
    chosen, trial = EXACT, None
    # No row travels with one rank, and none may be compressed in the first layers: nothing to try there.
    settled = name == "auto" and (spec.ctx.ep.size == 1 or spec.layer < spec.lsh.lsh_start_layer)
    if name in ("alltoall", "auto") and deduplicates(spec):
        alternatives[DEDUPLICATED] = deduplicated_dispatcher(spec)
        chosen = DEDUPLICATED
    if not sends_all and not settled:
        chosen = "lsh" if name in ("lsh", "auto") else "plugin"
        alternatives[chosen] = factory(spec)
        if name == "auto" and scope_of(spec) == "node":
            alternatives["lsh per rank"] = lsh_dispatcher(spec)
    if name == "auto" and not settled:
        tried = tuple(key for key in alternatives if key != LOSSLESS)
        trial = Trial(spec.layer, tried, spec.lsh.lsh_auto_iters, spec.ctx.device)
    return Scheduled(alternatives, chosen, spec.lsh, spec.layer, trial, shortcut=spec.moe.moe_gradient_shortcut)


def resolve_dispatcher(name: str) -> DispatcherFactory:
    """Find the factory for a value of ``--moe-token-dispatcher-type``.

    Raises:
        ConfigError: unknown name, or a ``module:factory`` that cannot be imported.
    """
    known = builtin_dispatchers()
    if name in known:
        return known[name]
    plugins = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if name in plugins:
        return plugins[name].load()
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"--moe-token-dispatcher-type ({name}) must name an importable factory as package.module:factory; {error}"
            ) from error
    names = sorted([*known, *plugins])
    nearest = get_close_matches(name, names, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise ConfigError(
        f"--moe-token-dispatcher-type ({name}) must be one of {', '.join(names)}, or package.module:factory{hint}"
    )
