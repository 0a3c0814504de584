"""The plan of an exchange: how many rows go where, as all ranks have told each other, and the orders that follow from that.

Legend: P ranks of the group, E experts, L those of this rank, R rows that this rank receives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_lsh.ops import to_device


@dataclass(frozen=True)
class Plan:
    """How the rows of one dispatch move; the way back and both backward passes reuse it.

    Attributes:
        counts_L: int64 on the host, rows that arrive for each expert of this rank; sums to R.
        send_splits: rows this rank sends to each rank of the group.
        recv_splits: rows it receives from each rank.
        sort_R: int64, position in arrival order (by source rank) of each row in expert order; None if they agree.
        unsort_R: the inverse permutation.
        sent_E: rows this rank sends to each expert,
        routed_E: rows that those stand for, and
        arriving_L: ``counts_L``, as numbers; filled in when the counts arrive, and
        counts_PE: int64 on the host, rows from each rank of the group to each expert, which all of this follows from.
        onward: of the next hop, where the same counts say it.
    """

    counts_L: Tensor
    send_splits: list[int]
    recv_splits: list[int]
    sort_R: Tensor | None
    unsort_R: Tensor | None
    sent_E: tuple[int, ...] = ()
    routed_E: tuple[int, ...] = ()
    arriving_L: tuple[int, ...] = ()
    counts_PE: Tensor | None = None
    onward: Plan | None = None


class Arrival:
    """Counts on their way to the host. The one place of a dispatch where the host waits for the device."""

    def __init__(self, counts: Tensor, work: Any = None) -> None:
        """
        Args:
            counts: int64, on any device, once ``work`` is done.
            work: what a collective returned; None if the counts are there.
        """
        self._counts, self._work, self._done = counts, work, None
        if counts.is_cuda:
            # On a stream of its own, into pinned memory: nothing that was launched since need be done.
            stream = torch.cuda.Stream(counts.device)
            stream.wait_stream(torch.cuda.current_stream(counts.device))
            self._counts = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
            with torch.cuda.stream(stream):
                if work is not None:
                    work.wait()
                self._counts.copy_(counts, non_blocking=True)
                self._done = torch.cuda.Event()
                self._done.record(stream)
            counts.record_stream(stream)

    def wait(self) -> Tensor:
        """The counts, on the host."""
        if self._done is not None:
            self._done.synchronize()
        elif self._work is not None:
            self._work.wait()
        return self._counts


def completed(plan: Plan, counts_PE: Tensor, rank: int, routed_PE: Tensor | None = None) -> Plan:
    """The plan with the counts that it was made of, for the ``rank``-th of these ranks."""
    sent_E, arriving_L = tuple(counts_PE[rank].tolist()), tuple(plan.counts_L.tolist())
    routed_E = () if routed_PE is None else tuple(routed_PE[rank].tolist())
    return replace(plan, sent_E=sent_E, routed_E=routed_E, arriving_L=arriving_L, counts_PE=counts_PE)


def expert_order(arriving_PL: Tensor, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Permutations between arrival order (source rank, then expert) and expert order (expert, then source rank).

    Args:
        arriving_PL: int64 on the host, rows from source rank p for local expert l.

    Returns:
        (sort, unsort) int64 [R] on ``device``, or (None, None) when both orders are the same.
    """
    sources, local = arriving_PL.shape
    if sources == 1 or local == 1:
        return None, None
    # Blocks (p, l) arrive p-major and are wanted l-major; within a block the order stays. So each row moves by as much as
    # its block does, and only blocks are counted on the host.
    wanted_LP = arriving_PL.t().contiguous()
    first_arriving_PL = (arriving_PL.flatten().cumsum(0) - arriving_PL.flatten()).view(sources, local)
    first_wanted_LP = (wanted_LP.flatten().cumsum(0) - wanted_LP.flatten()).view(local, sources)
    moves_PL = first_wanted_LP.t() - first_arriving_PL
    blocks = torch.stack([arriving_PL.flatten(), moves_PL.flatten(), wanted_LP.flatten(), -moves_PL.t().flatten()])
    rows = int(arriving_PL.sum())
    arriving, moves, wanted, moves_back = to_device(blocks, device)
    place_R = torch.arange(rows, device=device)
    unsort_R = place_R + moves.repeat_interleave(arriving, output_size=rows)
    return place_R + moves_back.repeat_interleave(wanted, output_size=rows), unsort_R
