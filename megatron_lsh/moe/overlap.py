"""``--moe-overlap-chunks``: rows travel in pieces, and the experts of one piece run while the next is under way.

Pieces are cut by local expert: every rank's experts 0 to 3, then 4 to 7. Where a rank has fewer experts than there shall be
pieces, the rows of an expert are cut too. Tokens are never cut: what compresses rows has seen them all by then. All pieces
set out at once, in their order, which is the same on all ranks; the outputs of each set out as soon as they are there.
Backward is the mirror image (transport.py), so there too one piece's experts run while another's gradients travel.

Cut by expert nothing is computed in another order, and results are equal to the bit; within an expert the gradient of its
weights is a sum of parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_lsh.moe.dispatcher import PendingPlan
from megatron_lsh.moe.exchange_plan import Plan, completed
from megatron_lsh.moe.experts import Experts, Feed
from megatron_lsh.moe.layer_pass import LayerPass
from megatron_lsh.moe.permute import Rows
from megatron_lsh.moe.transport import Flight, Transport
from megatron_lsh.ops import to_device


class Piece(NamedTuple):
    """Some of the rows.

    Attributes:
        experts: their local experts, on every rank.
        plan: how they move.
    """

    experts: range
    plan: Plan


class Pieces(NamedTuple):
    """All of them, and where their rows are.

    Attributes:
        order_C: int64, the rows of this rank, piece by piece; the inverse is inverse_C.
        sizes: rows of this rank in each.
    """

    pieces: Sequence[Piece]
    order_C: Tensor
    inverse_C: Tensor
    sizes: Sequence[int]


class InPieces(nn.Module):
    """As ``ThroughExperts``, in pieces."""

    def __init__(self, transport: Transport, chunks: int) -> None:
        super().__init__()
        self.transport, self._chunks = transport, chunks

    def plan(self, counts: Tensor, p: LayerPass, routed: Tensor | None = None) -> PendingPlan:
        return self.transport.plan(counts, p, routed)

    def forward(self, rows: Rows, experts: Experts, p: LayerPass, plan: PendingPlan | None = None) -> Rows:
        if self not in p.decided:
            agreed = (plan or self.transport.plan(rows.counts_E, p))()
            p.decided[self] = cut(self.transport, agreed, self._chunks, rows.counts_E.device)
        pieces, order_C, inverse_C, sizes = p.decided[self]
        parts = rows.materialise().index_select(0, order_C).split(sizes)
        flights = [self.transport.start(part, piece.plan, p) for part, piece in zip(parts, pieces, strict=True)]
        p.run_deferred()
        returning: list[Flight] = []

        def feed(piece: Piece, flight: Flight) -> Feed:
            def send_back(out_RD: Tensor) -> Tensor:
                returning.append(self.transport.start_back(out_RD, piece.plan, p))
                return returning[-1].token

            counts = [piece.plan.arriving_L[expert] for expert in piece.experts]
            return Feed(flight.token, counts, piece.experts, flight.wait, send_back)

        feeds = [feed(piece, flight) for piece, flight in zip(pieces, flights, strict=True)]
        tokens = p.time("experts_time_ms", experts, *feeds)
        tokens = tokens if isinstance(tokens, tuple) else (tokens,)
        back_CD = torch.cat([flight.wait(token) for flight, token in zip(returning, tokens, strict=True)])
        return rows.outputs(back_CD.index_select(0, inverse_C))


def cut(transport: Transport, whole: Plan, chunks: int, device: torch.device) -> Pieces:
    """``chunks`` pieces of whole experts; where there are fewer local experts, each is cut in equally many parts."""
    counts_PE = whole.counts_PE
    assert counts_PE is not None, "the counts have arrived"
    rank, local = transport.group.rank, transport.local_experts
    first_E = [0, *accumulate(whole.sent_E)]
    pieces: list[Piece] = []
    runs: list[list[range]] = []
    for experts, part, parts in _ranges(local, chunks):
        mine = torch.zeros(local, dtype=torch.bool)
        mine[experts.start : experts.stop] = True
        begin_PE, end_PE = counts_PE * part // parts, counts_PE * (part + 1) // parts
        of_piece_PE = (end_PE - begin_PE) * mine.repeat(transport.group.size)
        plan = completed(transport.make_plan(of_piece_PE, device), of_piece_PE, rank)
        pieces.append(Piece(experts, plan))
        runs.append(
            [
                range(first_E[e] + int(begin_PE[rank, e]), first_E[e] + int(end_PE[rank, e]))
                for e in range(len(whole.sent_E))
                if mine[e % local]
            ]
        )
    order = torch.cat([torch.arange(run.start, run.stop) for of_piece in runs for run in of_piece])
    order_C = to_device(order, device)
    inverse_C = torch.empty_like(order_C).scatter_(0, order_C, torch.arange(len(order), device=device))
    return Pieces(pieces, order_C, inverse_C, [sum(map(len, of_piece)) for of_piece in runs])


def _ranges(local: int, chunks: int) -> list[tuple[range, int, int]]:
    """(local experts, part, number of parts) of each piece."""
    if chunks <= local:
        return [(range(local * c // chunks, local * (c + 1) // chunks), 0, 1) for c in range(chunks)]
    parts = -(-chunks // local)
    return [(range(e, e + 1), part, parts) for e in range(local) for part in range(parts)]
