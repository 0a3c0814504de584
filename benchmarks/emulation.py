"""Dispatch over several nodes, emulated by one process: for loss runs with more ranks than a machine has cores.

    --moe-token-dispatcher-type benchmarks.emulation:node_2x4             LSH at node scope, 2 nodes of 4 ranks
    --moe-token-dispatcher-type benchmarks.emulation:rank_2x4             LSH at rank scope on the same ranks
    --moe-token-dispatcher-type benchmarks.emulation:rank_own_exact_2x4   the same, but rows for the own node's experts exact
    --moe-token-dispatcher-type benchmarks.emulation:exact                every row, in the numbers it has

The micro-batch of the one process is that of all ranks together: sequence b belongs to rank b mod (M G), so that the
micro-batch must be a multiple of M G sequences. Rows cluster as they would there, per (rank, expert) or per (node, expert),
and the experts, of which each M-th part is on one node, see what they would see there, in the same order. tests/moe/
test_emulation.py compares with real ranks.

With `_in_turn` at the end a micro-batch holds the tokens of one node only, of a different one in each iteration: half of the
work on two nodes, at groups of the same size.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from megatron_lsh.errors import ConfigError
from megatron_lsh.moe.dispatcher import (
    Compressed,
    Compressor,
    Dispatcher,
    PendingPlan,
    Restore,
    RowPath,
    ThroughExperts,
)
from megatron_lsh.moe.exchange_plan import expert_order
from megatron_lsh.moe.experts import Experts
from megatron_lsh.moe.layer_pass import LayerPass
from megatron_lsh.moe.nodes import GAUGES as NODE_GAUGES
from megatron_lsh.moe.permute import Rows, sort_by_expert
from megatron_lsh.moe.registry import DispatcherSpec, lsh_compressor, row_dispatcher
from megatron_lsh.moe.router import Routing

_NAME = re.compile(r"(?P<scope>node|rank|rank_own_exact)_(?P<nodes>\d+)x(?P<ranks>\d+)(?P<in_turn>_in_turn)?")


def exact(spec: DispatcherSpec) -> Dispatcher:
    return row_dispatcher(spec)


def __getattr__(name: str) -> Callable[[DispatcherSpec], Dispatcher]:
    """The factories of the module's docstring, for any number of nodes and ranks."""
    found = _NAME.fullmatch(name)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    nodes, ranks = int(found["nodes"]), int(found["ranks"])

    def factory(spec: DispatcherSpec) -> Dispatcher:
        if spec.ctx.ep.size != 1 or spec.num_experts % nodes:
            raise ConfigError(
                f"moe.moe_token_dispatcher_type ({name}) emulates {nodes} nodes on one expert-parallel rank, and needs a "
                f"number of experts divisible by {nodes}; here {spec.num_experts} on {spec.ctx.ep.size} ranks"
            )
        return EmulatedNodes(spec, nodes, ranks, found["scope"], in_turn=found["in_turn"] is not None)

    return factory


class EmulatedNodes(nn.Module):
    """See the module's docstring."""

    def __init__(self, spec: DispatcherSpec, nodes: int, ranks: int, scope: str, *, in_turn: bool) -> None:
        super().__init__()
        self._nodes, self._ranks, self._experts, self._in_turn = nodes, ranks, spec.num_experts, in_turn
        self._by_node = scope == "node"
        self._compressor = ExceptWhere(lsh_compressor(spec))
        self._own_exact = scope != "rank"
        path, as_is = (BySource(ThroughExperts(spec.transport()), spec.num_experts) for _ in range(2))
        self._path = Compressed(path, self._compressor, as_is, spec.lsh.lsh_probe_interval)
        self.gauges = (*self._path.gauges, *NODE_GAUGES)
        self._turn = 0

    def set_iteration(self, iteration: int, total: int | None = None) -> None:
        self._turn = iteration % self._nodes

    def forward(self, x_TD: Tensor, routing: Routing, experts: Experts, p: LayerPass) -> Tensor:
        tokens, nodes = x_TD.shape[0], 1 if self._in_turn else self._nodes
        sources = nodes * self._ranks
        if tokens % sources:
            raise ConfigError(f"a micro-batch of {tokens} tokens cannot be cut into those of {sources} ranks")
        # Rank by rank, as each has its tokens: token t is rank t mod sources's (sequences are the inner axis).
        order_T = torch.arange(tokens, device=x_TD.device).view(-1, sources).t().flatten()
        inverse_T = torch.empty_like(order_T).scatter_(0, order_T, torch.arange(tokens, device=x_TD.device))
        per_source = tokens // nodes if self._by_node else tokens // sources
        source_T1 = torch.arange(tokens, device=x_TD.device).div(per_source, rounding_mode="floor").unsqueeze(1)
        groups = (nodes if self._by_node else sources) * self._experts
        ids_TK = routing.expert_ids_TK[order_T]
        ids_TK = torch.where(ids_TK < 0, -1, ids_TK + source_T1 * self._experts)
        permutation = sort_by_expert(ids_TK, groups, routing.num_rows())
        self._compressor.as_is_G = self._on_own_node(groups, x_TD.device)
        rows = self._path(Rows.of_tokens(x_TD[order_T], permutation), experts, p)
        return rows.combine(routing.probs_TK[order_T])[inverse_T]

    def _on_own_node(self, groups: int, device: torch.device) -> Tensor:
        """bool [groups]: whose rows stay on their node and are exact there."""
        if not self._own_exact:
            return torch.zeros(groups, dtype=torch.bool, device=device)
        group_G = torch.arange(groups, device=device)
        source_G = group_G.div(self._experts, rounding_mode="floor")
        node_G = source_G if self._by_node else source_G.div(self._ranks, rounding_mode="floor")
        home_G = (group_G % self._experts).div(self._experts // self._nodes, rounding_mode="floor")
        return home_G == (torch.full_like(node_G, self._turn) if self._in_turn else node_G)


class BySource(nn.Module):
    """Around another path: rows come sorted by source, then expert; experts want theirs together."""

    def __init__(self, path: RowPath, num_experts: int) -> None:
        super().__init__()
        self.path, self._experts = path, num_experts

    def plan(self, counts: Tensor, p: LayerPass, routed: Tensor | None = None) -> PendingPlan | None:
        return None  # ExceptWhere knows what it sends only when it has sent it

    def forward(self, rows: Rows, experts: Experts, p: LayerPass, plan: PendingPlan | None = None) -> Rows:
        counts_SE = rows.counts_E.view(-1, self._experts)
        sort_R, unsort_R = expert_order(counts_SE.cpu(), rows.counts_E.device)
        rows_RD = rows.materialise()
        out = self.path(Rows(rows_RD if sort_R is None else rows_RD[sort_R], counts_SE.sum(0)), experts, p)
        out_RD = out.materialise()
        return rows.outputs(out_RD if unsort_R is None else out_RD[unsort_R])


class ExceptWhere(nn.Module):
    """Compresses the rows of some groups and leaves those of the others, :attr:`as_is_G`, as they are."""

    as_is_G: Tensor

    def __init__(self, compressor: Compressor) -> None:
        super().__init__()
        self.compressor = compressor
        self.gauges = tuple(getattr(compressor, "gauges", ()))

    def sent_rows(self, counts: Tensor) -> Tensor | None:
        return None

    def compress(self, rows: Rows, p: LayerPass) -> tuple[Tensor, Tensor, Callable[[], Restore]]:
        as_is_G, rows_ND, counts_G = self.as_is_G, rows.materialise(), rows.counts_E
        as_is_N = as_is_G.repeat_interleave(counts_G)
        place_N = _places(as_is_N)
        others = Rows(rows_ND[~as_is_N], counts_G * ~as_is_G)
        wire_CD, sent_G, prepare = self.compressor.compress(others, p)
        sent_G = sent_G + counts_G * as_is_G
        as_is_C = as_is_G.repeat_interleave(sent_G)
        sent_CD = torch.cat([wire_CD, rows_ND[as_is_N]])[_places(as_is_C)]
        if not p.replay:
            p.add(rows_at_experts=sent_CD.shape[0], rows_before=rows_ND.shape[0])

        def prepared() -> Restore:
            restore = prepare()

            def finish(out_CD: Tensor) -> Rows:
                restored_ND = restore(out_CD[~as_is_C]).materialise()
                return rows.outputs(torch.cat([restored_ND, out_CD[as_is_C]])[place_N])

            return finish

        return sent_CD, sent_G, prepared


def _places(later_N: Tensor) -> Tensor:
    """int64 [N]: where each row lies when those marked ``later`` are put behind the others."""
    order_N = torch.argsort(later_N.to(torch.int8), stable=True)
    return torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=order_N.device))
