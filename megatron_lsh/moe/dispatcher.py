"""The seam: how tokens reach their experts and come back as outputs.

    Dispatcher   (x_TD, routing, experts, p) -> y_TD      tokens in, tokens out
    RowPath      (rows, experts, p)          -> rows      rows in, their experts' outputs out; paths nest
    Compressor   (rows, p)                   -> fewer rows, and what restores the others
    Transport    start, wait                              rows to other ranks and back (transport.py)

A MoE layer knows a dispatcher and nothing below it. :class:`RowDispatcher` turns tokens into rows and rows into tokens;
between the two its path sends them to the experts (:class:`ThroughExperts`), or fewer of them (:class:`Compressed`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from megatron_lsh.lsh import straight_through
from megatron_lsh.moe.exchange_plan import Plan
from megatron_lsh.moe.experts import Experts, Feed
from megatron_lsh.moe.gauges import Gauge, averaged, ratio, summed
from megatron_lsh.moe.layer_pass import LayerPass
from megatron_lsh.moe.permute import Rows, sort_by_expert
from megatron_lsh.moe.router import Routing
from megatron_lsh.moe.transport import GAUGES as TRANSPORT_GAUGES
from megatron_lsh.moe.transport import Transport

GAUGES = (
    *TRANSPORT_GAUGES,
    Gauge("alltoall_bytes_uncompressed", "bytes", "bytes of exact rows", summed("alltoall_bytes_uncompressed"),
          "what exact rows in the model's numbers would have been"),
    Gauge("alltoall_bytes_network_uncompressed", "bytes", "network bytes of exact rows",
          summed("alltoall_bytes_network_uncompressed"),
          "what exact rows in the model's numbers, one per (token, expert), would have sent across the network"),
    Gauge("experts_time_ms", "ms", "experts, ms per step", averaged("experts_time_ms"),
          "the experts, forward and backward"),
    Gauge("lsh_restored_error", "share", "error of restored outputs", ratio("probe_error_energy", "probe_output_energy"),
          "sum of (y - y')² over sum of y'² for restored outputs y and exact ones y', on one micro-batch every "
          "`--lsh-probe-interval` iterations", layers="mean", optional=True),
)  # fmt: skip

#: Waits for the other ranks' counts; see ``Transport.plan``.
PendingPlan = Callable[[], Plan]


class Dispatcher(Protocol):
    """Runs each token through its experts. An ``nn.Module`` where it has parameters or buffers.

    May have ``gauges`` (an iterable of :class:`Gauge`): what it measures beside the gauges of this module.
    """

    def __call__(self, x_TD: Tensor, routing: Routing, experts: Experts, p: LayerPass) -> Tensor:
        """
        Args:
            x_TD: this rank's tokens.
            routing: the experts of each token, and their weights.
            experts: this rank's; to be called once, also with no rows.
            p: see layer_pass.py.

        Returns:
            y_TD in x's dtype.
        """
        ...


class RowPath(Protocol):
    """Gives every row its expert's output, or something near it."""

    def plan(self, counts: Tensor, p: LayerPass, routed: Tensor | None = None) -> PendingPlan | None:
        """Tell the other ranks how many rows per expert this one is going to bring, as early as that is known.

        Args:
            counts: int64 [E]; or [P, E] on the host, of all ranks, if they are known already.
            routed: the rows that these stand for, if others.

        Returns:
            None if it is not known before the rows are there.
        """
        ...

    def __call__(self, rows: Rows, experts: Experts, p: LayerPass, plan: PendingPlan | None = None) -> Rows:
        """``plan``: of these rows, if :meth:`plan` was called already."""
        ...


#: Restores every row's output from those of what was sent; its second half, called when they are back.
Restore = Callable[[Tensor], Rows]


class Compressor(Protocol):
    """Sends fewer rows. May have ``gauges``, and be an ``nn.Module``."""

    def sent_rows(self, counts: Tensor) -> Tensor | None:
        """Rows per expert that will be sent for these, if that follows from the counts alone: then the other ranks are told
        before anything is computed. Else None. ``counts`` are this rank's [E], or those of all ranks [P, E]."""
        ...

    def compress(self, rows: Rows, p: LayerPass) -> tuple[Tensor, Tensor, Callable[[], Restore]]:
        """
        Returns:
            what is sent [C, D], sorted by expert; int64 counts [E] of it; and a function that prepares the restoration as
            far as that needs no expert's output (it runs while rows travel) and returns the rest of it.
        """
        ...


class ThroughExperts(nn.Module):
    """Rows travel to the ranks of their experts, the experts run, the outputs travel back."""

    def __init__(self, transport: Transport) -> None:
        super().__init__()
        self.transport = transport

    def plan(self, counts: Tensor, p: LayerPass, routed: Tensor | None = None) -> PendingPlan:
        return self.transport.plan(counts, p, routed)

    def forward(self, rows: Rows, experts: Experts, p: LayerPass, plan: PendingPlan | None = None) -> Rows:
        transport = self.transport
        if self not in p.decided:
            p.decided[self] = (plan or transport.plan(rows.counts_E, p))()
        agreed: Plan = p.decided[self]
        flight = transport.start(rows.materialise(), agreed, p)
        p.run_deferred()
        received_RD = flight.wait()
        out_RD = p.time("experts_time_ms", experts, Feed(received_RD, agreed.arriving_L or agreed.counts_L))
        return rows.outputs(transport.start_back(out_RD, agreed, p).wait())


class Compressed(nn.Module):
    """Around another path: fewer rows take it, and all rows' outputs are restored from theirs."""

    def __init__(
        self, path: RowPath, compressor: Compressor, exact: RowPath | None = None, probe_interval: int | None = None
    ) -> None:
        """
        Args:
            path: what the compressed rows take.
            exact: what all rows take for the probe, which measures what compression does to the outputs.
            probe_interval: iterations from one probe to the next; None for no probe.
        """
        super().__init__()
        self.path, self.compressor, self.exact = path, compressor, exact
        self._probe_interval = probe_interval
        self._probe_due = False
        self.gauges = tuple(getattr(compressor, "gauges", ()))

    def set_iteration(self, iteration: int, total: int | None = None) -> None:
        self._probe_due = self._probe_interval is not None and iteration % self._probe_interval == 0

    def plan(self, counts: Tensor, p: LayerPass, routed: Tensor | None = None) -> PendingPlan | None:
        sent = self.compressor.sent_rows(counts)
        return None if sent is None else self.path.plan(sent, p, counts if routed is None else routed)

    def forward(self, rows: Rows, experts: Experts, p: LayerPass, plan: PendingPlan | None = None) -> Rows:
        probe = self._probe_due and self.training and not p.replay
        if plan is None and not p.replay:
            plan = self.plan(rows.counts_E, p)
        if plan is not None:
            # Whoever asks first waits: the compressor, because how many rows are sent is the number of its clusters.
            p.agreed = plan
        wire_CD, counts_E, prepare = self.compressor.compress(rows, p)
        p.agreed = None  # it holds this pass: in a circle both would live until Python looks for circles
        restore = p.defer(prepare)
        out = self.path(Rows(wire_CD, counts_E), experts, p, plan)
        restored = restore()(out.materialise())
        if probe:
            self._probe(rows, restored, experts, p)
        return restored

    @torch.no_grad()
    def _probe(self, rows: Rows, restored: Rows, experts: Experts, p: LayerPass) -> None:
        """Run all rows through their experts once more, and compare. Nothing is drawn at random, which a replay would miss:
        the configuration refuses probes with dropout in experts."""
        self._probe_due = False  # one micro-batch of the iteration
        assert self.exact is not None
        exact_ND = self.exact(Rows(rows.materialise(), rows.counts_E), experts, p.silent()).materialise()
        error, total = (t.float().square().sum() for t in (restored.materialise() - exact_ND, exact_ND))
        p.add(probe_error_energy=error, probe_output_energy=total)


class RowDispatcher(nn.Module):
    """Copies every token once per expert, sends these rows down a path, and sums up what comes back."""

    def __init__(self, path: RowPath, num_experts: int, exact: Transport | None, order_E: Tensor | None = None) -> None:
        """
        Args:
            exact: what exact rows would take, to say how many bytes they would have been; None if somebody else says.
            order_E: int64, the place of each expert's rows among the rows; None for the order of the experts.
        """
        super().__init__()
        self.path = path
        self.gauges = tuple(getattr(path, "gauges", ()))
        self._num_experts, self._exact, self._order_E = num_experts, exact, order_E

    def forward(
        self, x_TD: Tensor, routing: Routing, experts: Experts, p: LayerPass, plan: PendingPlan | None = None
    ) -> Tensor:
        """``plan``: of the rows, if their counts are known already."""
        ids_TK = routing.expert_ids_TK
        if self._order_E is not None:
            ids_TK = torch.where(ids_TK < 0, -1, self._order_E[ids_TK.clamp(min=0)])
        if not routing.complete and self not in p.decided:
            # How many rows there are is not known here either, and comes with the counts.
            counts_E = routing.tokens_per_expert_E
            if self._order_E is not None:
                counts_E = torch.empty_like(counts_E).scatter_(0, self._order_E, counts_E)
            plan = plan or self.path.plan(counts_E, p)
            p.decided[self] = routing.num_rows() if plan is None else sum(plan().routed_E)
        num_rows = ids_TK.numel() if routing.complete else p.decided[self]
        rows = Rows.of_tokens(x_TD, sort_by_expert(ids_TK, self._num_experts, num_rows))
        if self._exact is not None:
            count_exact_bytes(x_TD, routing.tokens_per_expert_E, self._exact, p)
        # Weights are applied at the source: what is sent may stand for rows with different weights.
        return self.path(rows, experts, p, plan).combine(routing.probs_TK)


def count_exact_bytes(x_TD: Tensor, counts_E: Tensor, transport: Transport, p: LayerPass) -> None:
    """What an exact all-to-all of ``counts_E`` rows would send: there and back, and in backward unless that ran already."""
    if transport.group.size == 1:
        return
    sent_P = counts_E.view(transport.group.size, -1).sum(1)
    far_P = torch.tensor(transport.near, device=sent_P.device).logical_not()
    backward = x_TD.requires_grad and torch.is_grad_enabled() and not p.replay
    row_bytes = x_TD.shape[1] * x_TD.element_size() * (4 if backward else 2)
    p.add(
        alltoall_bytes_uncompressed=(sent_P.sum() - sent_P[transport.group.rank]) * row_bytes,
        alltoall_bytes_network_uncompressed=(sent_P * far_P).sum() * row_bytes,
    )


def gradient_shortcut(y_TD: Tensor, x_TD: Tensor, routing: Routing) -> Tensor:
    """``--moe-gradient-shortcut``: the gradient of the identity beside every expert's, and nothing of its value."""
    weight_T1 = routing.probs_TK.detach().sum(1, keepdim=True).to(x_TD.dtype)
    return straight_through(y_TD, x_TD * weight_T1)
