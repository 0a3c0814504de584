"""Two-level dispatch: what a node's ranks have for another node crosses the network together.

The expert-parallel group is M nodes of G ranks each; rank (n, g) is local rank g of node n, and rank (m, h) holds the
experts numbered from (m G + h) L on. The links inside a node are fast, the network between nodes is slow.

*LSH at node scope*: rows of the whole node cluster together before they cross.

    (n, g) ── inside the node ──> (n, h)    all rows that node n has for the experts of any (m, h)
    (n, h) ── the network ──────> (m, h)    those for other nodes: one row per cluster; those for n itself are here already
    back the same way: (n, h) restores every row, and the rows return inside the node

Clusters of G times as many rows are closer at the same rate (docs/lsh.md), for no byte of network.

*De-duplicated exact dispatch*: a token that has several experts on one node crosses once.

    (n, g) ── the network ──────> (m, g)    one row per (token, node), with the ids and weights of its experts there
    (m, g) ── inside the node ──> (m, h)    one row per (token, expert), and the outputs back
    (m, g) ── the network ──────> (n, g)    the weighted sum over the token's experts of node m; the token adds up its nodes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from megatron_lsh.moe.dispatcher import (
    Compressor,
    PendingPlan,
    Restore,
    RowDispatcher,
    RowPath,
    count_exact_bytes,
)
from megatron_lsh.moe.exchange_plan import Plan
from megatron_lsh.moe.experts import Experts
from megatron_lsh.moe.gauges import Gauge, busiest_over_mean, ratio
from megatron_lsh.moe.layer_pass import LayerPass
from megatron_lsh.moe.permute import Rows, sort_by_expert, unpermute
from megatron_lsh.moe.router import Routing
from megatron_lsh.moe.transport import Transport
from megatron_lsh.ops import to_device

GAUGES = (
    Gauge("forwarded_rows_max_over_mean", "", "fullest forwarding rank / mean", busiest_over_mean("forwarded_rows"),
          "rows that the fullest rank forwards for its node, over the mean (LSH at node scope)", layers="mean",
          optional=True),
    Gauge("expert_rows_rate", "share", "rows the experts see, share", ratio("rows_at_experts", "rows_before"),
          "rows that the experts see per row routed, those that stay on their node among them (LSH at node scope)",
          layers="mean", optional=True),
)  # fmt: skip


class InsideNode(nn.Module):
    """A hop inside the node around another path: (n, h) brings the rows of all of node n for the experts of all (., h)."""

    def __init__(self, transport: Transport, path: RowPath, everyone: Transport) -> None:
        """
        Args:
            transport: of the node's ranks; its "experts of rank h" are those of all (m, h), by node.
            path: of the ranks of equal place in all nodes.
            everyone: of all ranks, ordered by node; no row takes it, but the counts do that plan both hops.
        """
        super().__init__()
        self.transport, self.path, self._everyone = transport, path, everyone
        self.gauges = (*getattr(path, "gauges", ()), *GAUGES)

    def plan(self, counts: Tensor, p: LayerPass, routed: Tensor | None = None) -> PendingPlan:
        inside, everyone = self.transport.group, self._everyone

        def both(counts_PE: Tensor) -> Plan:
            counts_MGE = counts_PE.view(-1, inside.size, counts_PE.shape[1])
            plan = self.transport.plan(counts_MGE[everyone.group.rank // inside.size], p)()
            # What each (m, h) is going to have is what the ranks of its node have for the experts of place h.
            gathered_MX = counts_MGE.sum(1).unflatten(1, (inside.size, -1))[:, inside.rank]
            onward = self.path.plan(gathered_MX, p)
            return plan if onward is None else replace(plan, onward=onward())

        return everyone.tell(counts, p, both)

    def forward(self, rows: Rows, experts: Experts, p: LayerPass, plan: PendingPlan | None = None) -> Rows:
        transport = self.transport
        if self not in p.decided:
            p.decided[self] = (plan or self.plan(rows.counts_E, p))()
        agreed: Plan = p.decided[self]
        gathered = transport.start(rows.materialise(), agreed, p).wait()
        if not p.replay:
            p.add(forwarded_rows=gathered.shape[0])
        here, onward = Rows(gathered, to_device(agreed.counts_L, gathered.device)), agreed.onward
        out = self.path(here, experts, p, None if onward is None else lambda: onward).materialise()
        return rows.outputs(transport.start_back(out, agreed, p).wait())


class ExceptOwnNode(nn.Module):
    """Compresses the rows for other nodes; those for this node's own experts are here already and stay as they are."""

    def __init__(self, compressor: Compressor, nodes: int, node: int) -> None:
        """Rows are sorted by node, then expert; ``node`` of ``nodes`` is this one."""
        super().__init__()
        self.compressor = compressor
        self.gauges = tuple(getattr(compressor, "gauges", ()))
        self._nodes, self._node = nodes, node

    def sent_rows(self, counts: Tensor) -> Tensor | None:
        sent = self.compressor.sent_rows(self._others(counts))
        return None if sent is None else sent + self._own(counts)

    def compress(self, rows: Rows, p: LayerPass) -> tuple[Tensor, Tensor, Callable[[], Restore]]:
        rows_ND, agreed = rows.materialise(), p.agreed
        if not p.replay:
            p.decided[self] = self._split(rows.counts_E.tolist() if agreed is None else agreed().routed_E)
        before, own, after = p.decided[self]
        head, mine_ND, tail = rows_ND.split([before, own, after])
        others = Rows(torch.cat([head, tail]), self._others(rows.counts_E))
        if agreed is not None:
            p.agreed = lambda: self._with_others(agreed())
        wire_CD, counts_E, prepare = self.compressor.compress(others, p)
        sent_E = counts_E + self._own(rows.counts_E)
        # Before the own node's rows come as many as are sent for the nodes before it.
        if not p.replay:
            p.decided[self, "sent"] = self._split(sent_E.tolist() if agreed is None else agreed().sent_E)
        first, _, last = p.decided[self, "sent"]
        sent_CD = torch.cat([wire_CD[:first], mine_ND, wire_CD[first:]])
        if not p.replay:
            p.add(rows_at_experts=sent_CD.shape[0], rows_before=rows_ND.shape[0])

        def prepared() -> Restore:
            restore = prepare()

            def finish(out_CD: Tensor) -> Rows:
                head, mine_ND, tail = out_CD.split([first, own, last])
                restored_ND = restore(torch.cat([head, tail])).materialise()
                return rows.outputs(torch.cat([restored_ND[:before], mine_ND, restored_ND[before:]]))

            return finish

        return sent_CD, sent_E, prepared

    def _own(self, counts: Tensor) -> Tensor:
        """The counts of this node's experts, and zero for others; or of [M, E] those of each rank's own node."""
        own_MM = counts.new_ones(self._nodes).diag()
        own = own_MM if counts.ndim == 2 else own_MM[self._node]
        return (counts.unflatten(-1, (self._nodes, -1)) * own.unsqueeze(-1)).flatten(-2)

    def _others(self, counts: Tensor) -> Tensor:
        return counts - self._own(counts)

    def _with_others(self, plan: Plan) -> Plan:
        """The plan as the compressor of the other nodes' rows sees it."""
        first, last = self._own_experts(len(plan.sent_E))
        sent_E, routed_E = (
            (*numbers[:first], *(0 for _ in range(first, last)), *numbers[last:])
            for numbers in (plan.sent_E, plan.routed_E)
        )
        return replace(plan, sent_E=sent_E, routed_E=routed_E)

    def _own_experts(self, num_experts: int) -> tuple[int, int]:
        per_node = num_experts // self._nodes
        return self._node * per_node, (self._node + 1) * per_node

    def _split(self, counts: Sequence[int]) -> tuple[int, int, int]:
        """Rows before, of, and after this node's experts."""
        first, last = self._own_experts(len(counts))
        return sum(counts[:first]), sum(counts[first:last]), sum(counts[last:])


def node_order(nodes: int, ranks: int, local_experts: int, device: torch.device) -> Tensor:
    """int64 [E]: the place of each expert when experts are ordered by (local rank, node, number on the rank), so that what
    goes through one rank of this node lies together."""
    order = torch.arange(nodes * ranks * local_experts, device=device).view(nodes, ranks, local_experts)
    return torch.argsort(order.transpose(0, 1).flatten())


class DeduplicatedDispatcher(nn.Module):
    """Exact: one row per (token, node) crosses the network; see the module's docstring."""

    def __init__(self, network: Transport, inside: RowDispatcher, exact: Transport, experts_per_node: int) -> None:
        """
        Args:
            network: of the ranks of equal place in all nodes; each stands for its node, with one "expert".
            inside: runs tokens through the experts of this node.
            exact: what one row per (token, expert) would take; to say how many bytes it would have been.
        """
        super().__init__()
        self.network, self.inside, self._exact = network, inside, exact
        self._per_node = experts_per_node
        self.gauges = tuple(getattr(inside, "gauges", ()))

    def forward(self, x_TD: Tensor, routing: Routing, experts: Experts, p: LayerPass) -> Tensor:
        network, nodes = self.network, self.network.group.size
        count_exact_bytes(x_TD, routing.tokens_per_expert_E, self._exact, p)
        ids_TK = routing.expert_ids_TK
        node_TK = torch.where(ids_TK < 0, -1, torch.div(ids_TK, self._per_node, rounding_mode="floor"))
        visited_TM = (node_TK.unsqueeze(2) == torch.arange(nodes, device=ids_TK.device)).any(1)
        places_TM = torch.where(visited_TM, torch.arange(nodes, device=ids_TK.device), -1)
        if self not in p.decided:
            counts = torch.cat([visited_TM.sum(0), routing.tokens_per_expert_E])
            plan, onward = self._exact.tell(counts, p, lambda counts_PX: self._plans(counts_PX, p))()
            p.decided[self] = sort_by_expert(places_TM, nodes, sum(plan.sent_E)), plan, onward
        permutation, plan, onward = p.decided[self]
        token_N = permutation.token_of_row_N
        node_N = torch.arange(nodes, device=ids_TK.device).repeat_interleave(
            permutation.counts_E, output_size=token_N.shape[0]
        )
        here_NK = node_TK[token_N] == node_N.unsqueeze(1)
        # Ids as the node counts its experts, weights in fp32: both travel with the row, and the weights' gradients back.
        ids_NK = torch.where(here_NK, ids_TK[token_N] - node_N.unsqueeze(1) * self._per_node, -1)
        weights_NK = torch.where(here_NK, routing.probs_TK[token_N], 0)
        columns = (ids_NK.to(torch.int32), weights_NK)
        flight = network.start(Rows.of_tokens(x_TD, permutation).materialise(), plan, p, columns)
        p.run_deferred()
        received_RD, ids_RK, weights_RK = flight.wait()
        routing_R = _routing(ids_RK.long(), weights_RK, self._per_node)
        partial_RD = self.inside(received_RD, routing_R, experts, p, lambda: onward)
        back_ND = network.start_back(partial_RD, plan, p).wait()
        ones_TM = visited_TM.to(routing.probs_TK.dtype)
        return unpermute(back_ND, ones_TM, permutation)

    def _plans(self, counts_PX: Tensor, p: LayerPass) -> tuple[Plan, Plan | None]:
        """Of both hops, from each rank's rows for every node and then for every expert: the second hop's rows are what the
        ranks of one place have for the experts of this node."""
        network, nodes = self.network.group, self.network.group.size
        counts_MGX = counts_PX.view(nodes, -1, counts_PX.shape[1])
        place = self._exact.group.rank % counts_MGX.shape[1]
        visited_MGM, routed_MGE = counts_MGX.split([nodes, counts_PX.shape[1] - nodes], 2)
        here_GL = routed_MGE.sum(0).unflatten(1, (nodes, -1))[:, network.rank]
        onward = self.inside.path.plan(here_GL, p)
        return self.network.plan(visited_MGM[:, place], p)(), None if onward is None else onward()


def _routing(ids_RK: Tensor, weights_RK: Tensor, num_experts: int) -> Routing:
    """Where tokens of other ranks go; what belongs to losses was booked where they come from."""
    nothing = weights_RK.new_zeros(())
    counts_E = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids_RK.device)
    slots = torch.where(ids_RK < 0, num_experts, ids_RK).flatten()
    counts_E.scatter_add_(0, slots, torch.ones_like(slots))
    return Routing(ids_RK, weights_RK, nothing, nothing, nothing, counts_E[:-1], complete=False)
