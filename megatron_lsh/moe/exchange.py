"""Exchanges: how rows reach the ranks of their experts and come back.

    dispatch(rows_CD, counts_E)  -> rows of this rank's experts, sorted by expert, with counts; and a handle
    combine(rows_RD, handle)     -> the same rows, back on the ranks and in the order they came from

The backward of dispatch is combine with the same handle, and the reverse, so an exchange implements the two movements
once, without autograd, as ``_send`` and ``_return``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.moe.wire import CastCodec, WireCodec
from megatron_lsh.parallel.context import Group


@dataclass(frozen=True)
class Handle:
    """How one dispatch moved its rows; combine and both backward passes reuse it.

    Attributes:
        send_splits: rows this rank sends to each rank of the group.
        recv_splits: rows it receives from each rank.
        sort_R: int64, position in arrival order (by source rank) of each row in expert order; None if they agree.
        unsort_R: the inverse permutation.
        exact_remote_rows: rows an uncompressed all-to-all would send to other ranks (for accounting).
    """

    send_splits: list[int]
    recv_splits: list[int]
    sort_R: Tensor | None
    unsort_R: Tensor | None
    exact_remote_rows: int


class Exchange(ABC):
    """Moves rows between the ranks of an expert-parallel group."""

    def __init__(
        self, group: Group, num_experts: int, layer: int, telemetry: MoETelemetry, codec: WireCodec | None = None
    ) -> None:
        """
        Args:
            group: the expert-parallel group; rank r holds experts [r E/EP, (r+1) E/EP).
            num_experts: E.
            layer: number of the layer, for the telemetry.
            codec: the numbers in which rows travel; by default those they have.
        """
        self._group = group
        self._local_experts = num_experts // group.size
        self._layer = layer
        self._telemetry = telemetry
        self._codec = codec or CastCodec(None)
        self._noise: torch.Generator | None = None
        self._noise_seed = 0

    def reseed(self, seed: int) -> None:
        """Start the noise of stochastic rounding afresh; called with the iteration, so that a resumed run repeats it."""
        self._noise_seed = seed
        self._noise = None

    def dispatch(self, rows_CD: Tensor, counts_E: Tensor, exact_counts_E: Tensor) -> tuple[Tensor, Tensor, Handle]:
        """Send each row to the rank that holds its expert.

        Args:
            rows_CD: rows sorted by expert; differentiable.
            counts_E: int64, rows per expert; sums to C.
            exact_counts_E: int64, rows per expert before compression, for the byte accounting only.

        Returns:
            rows [R, D] sorted by local expert (within an expert by source rank, then in the source's order),
            int64 counts per local expert [E/EP] on the host, and the handle for :meth:`combine`.
        """
        local_counts, handle = self._plan(counts_E, exact_counts_E)
        return _Dispatch.apply(rows_CD, self, handle), local_counts, handle

    def combine(self, rows_RD: Tensor, handle: Handle) -> Tensor:
        """Return rows to where :meth:`dispatch` took them from: [C, D] in the original order."""
        return _Combine.apply(rows_RD, self, handle)

    @abstractmethod
    def _plan(self, counts_E: Tensor, exact_counts_E: Tensor) -> tuple[Tensor, Handle]:
        """Agree on the sizes of one dispatch; the only host synchronisation of a dispatch."""

    @abstractmethod
    def _send(self, rows_CD: Tensor, handle: Handle, gradient: bool) -> Tensor:
        """[C, D] on the source -> [R, D] on the experts' rank. ``gradient``: these rows are gradients."""

    @abstractmethod
    def _return(self, rows_RD: Tensor, handle: Handle, gradient: bool) -> Tensor:
        """[R, D] on the experts' rank -> [C, D] on the source."""

    @contextmanager
    def lossless(self) -> Iterator[None]:
        """Within this context rows travel in the numbers they have, whatever the codec."""
        before, self._codec = self._codec, CastCodec(None)
        try:
            yield
        finally:
            self._codec = before

    def _encode(self, rows: Tensor, gradient: bool) -> Tensor:
        if gradient and self._noise is None:
            self._noise = torch.Generator(rows.device).manual_seed(self._noise_seed)
        with self._telemetry.timed(self._layer, "wire_time_ms"):
            return self._codec.encode(rows, self._noise if gradient else None)

    def _decode(self, payload: Tensor, like: Tensor) -> Tensor:
        with self._telemetry.timed(self._layer, "wire_time_ms"):
            return self._codec.decode(payload, like=like)

    def _account(self, payload: Tensor, rows_sent: int, rows_received: int, handle: Handle, like: Tensor) -> None:
        """Count one movement: rows to and from other ranks, each as wide as ``payload``; without it, as ``like``."""
        payload_row, plain_row = (t.shape[1] * t.element_size() for t in (payload, like))
        self._telemetry.add(self._layer, "alltoall_bytes", rows_sent * payload_row)
        self._telemetry.add(self._layer, "alltoall_bytes_in", rows_received * payload_row)
        self._telemetry.add(self._layer, "alltoall_bytes_uncompressed", handle.exact_remote_rows * plain_row)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_CD: Tensor, exchange: Exchange, handle: Handle) -> Tensor:
        ctx.exchange, ctx.handle = exchange, handle
        return exchange._send(rows_CD, handle, gradient=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.exchange._return(grads[0].contiguous(), ctx.handle, gradient=True), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, exchange: Exchange, handle: Handle) -> Tensor:
        ctx.exchange, ctx.handle = exchange, handle
        return exchange._return(rows_RD, handle, gradient=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.exchange._send(grads[0].contiguous(), ctx.handle, gradient=True), None, None


class LocalExchange(Exchange):
    """EP = 1: every expert is here and nothing moves."""

    def _plan(self, counts_E: Tensor, exact_counts_E: Tensor) -> tuple[Tensor, Handle]:
        counts = counts_E.cpu()
        return counts, Handle([int(counts.sum())], [int(counts.sum())], None, None, exact_remote_rows=0)

    def _send(self, rows_CD: Tensor, handle: Handle, gradient: bool) -> Tensor:
        return rows_CD.view_as(rows_CD)

    def _return(self, rows_RD: Tensor, handle: Handle, gradient: bool) -> Tensor:
        return rows_RD.view_as(rows_RD)


class AllToAllExchange(Exchange):
    """One all-to-all with uneven splits each way; a row travels only to the rank of its expert."""

    def _plan(self, counts_E: Tensor, exact_counts_E: Tensor) -> tuple[Tensor, Handle]:
        size, local = self._group.size, self._local_experts
        arriving_PL = torch.empty_like(counts_E)
        with self._telemetry.timed(self._layer, "alltoall_time_ms"):
            dist.all_to_all_single(arriving_PL, counts_E.contiguous(), group=self._group.process_group)
        sent_PL, exact_PL, arriving_PL = torch.stack([counts_E, exact_counts_E, arriving_PL]).cpu().view(3, size, local)
        sort_R, unsort_R = expert_order(arriving_PL, counts_E.device)
        exact_remote = int(exact_PL.sum()) - int(exact_PL[self._group.rank].sum())
        handle = Handle(sent_PL.sum(1).tolist(), arriving_PL.sum(1).tolist(), sort_R, unsort_R, exact_remote)
        return arriving_PL.sum(0), handle

    def _send(self, rows_CD: Tensor, handle: Handle, gradient: bool) -> Tensor:
        arrived_RD = self._all_to_all(rows_CD, handle.send_splits, handle.recv_splits, handle, gradient)
        return arrived_RD if handle.sort_R is None else arrived_RD.index_select(0, handle.sort_R)

    def _return(self, rows_RD: Tensor, handle: Handle, gradient: bool) -> Tensor:
        arrival_RD = rows_RD if handle.unsort_R is None else rows_RD.index_select(0, handle.unsort_R)
        return self._all_to_all(arrival_RD, handle.recv_splits, handle.send_splits, handle, gradient)

    def _all_to_all(
        self, rows: Tensor, out_splits: list[int], in_splits: list[int], handle: Handle, gradient: bool
    ) -> Tensor:
        payload = self._encode(rows, gradient)
        received = payload.new_empty(sum(in_splits), payload.shape[1])
        with self._telemetry.timed(self._layer, "alltoall_time_ms"):
            dist.all_to_all_single(received, payload, in_splits, out_splits, group=self._group.process_group)
        rank = self._group.rank
        sent, arrived = (sum(splits) - splits[rank] for splits in (out_splits, in_splits))
        self._account(payload, sent, arrived, handle, rows)
        return self._decode(received, like=rows)


class AllGatherExchange(Exchange):
    """Every rank receives every row and keeps those of its experts; a reduce-scatter brings the outputs back.

    Sends EP - 1 times the rows of each rank, whatever the routing. It exists for small EP groups on networks where
    all-to-all is slow or missing, and as an independent check of :class:`AllToAllExchange`. Collectives want equal
    sizes, so blocks are padded to the largest rank's rows.
    """

    def _plan(self, counts_E: Tensor, exact_counts_E: Tensor) -> tuple[Tensor, Handle]:
        size, local, rank = self._group.size, self._local_experts, self._group.rank
        gathered = counts_E.new_empty(size * counts_E.shape[0])
        with self._telemetry.timed(self._layer, "alltoall_time_ms"):
            dist.all_gather_into_tensor(gathered, counts_E.contiguous(), group=self._group.process_group)
        counts_PE, exact_E = gathered.cpu().view(size, -1), exact_counts_E.cpu()
        rows_P = counts_PE.sum(1)
        block = int(rows_P.max())
        # Rows of this rank's experts lie contiguously within each source's block.
        first_P = counts_PE[:, : rank * local].sum(1) + torch.arange(size) * block
        mine_PL = counts_PE[:, rank * local : (rank + 1) * local]
        arrival_R = torch.cat(
            [torch.arange(first, first + n) for first, n in zip(first_P, mine_PL.sum(1), strict=True)]
        )
        sort_R, _ = expert_order(mine_PL, torch.device("cpu"))
        sort_R = arrival_R if sort_R is None else arrival_R[sort_R]
        exact_remote = int(exact_E.sum()) - int(exact_E.view(size, local)[rank].sum())
        handle = Handle([int(rows_P[rank])], [block] * size, sort_R.to(counts_E.device), None, exact_remote)
        return mine_PL.sum(0), handle

    def _send(self, rows_CD: Tensor, handle: Handle, gradient: bool) -> Tensor:
        block, payload = handle.recv_splits[0], self._encode(rows_CD, gradient)
        padded = payload.new_zeros(block, payload.shape[1])
        padded[: rows_CD.shape[0]] = payload
        gathered = payload.new_empty(self._group.size * block, payload.shape[1])
        with self._telemetry.timed(self._layer, "alltoall_time_ms"):
            dist.all_gather_into_tensor(gathered, padded, group=self._group.process_group)
        remote = (self._group.size - 1) * block
        self._account(payload, remote, remote, handle, rows_CD)
        assert handle.sort_R is not None
        return self._decode(gathered.index_select(0, handle.sort_R), like=rows_CD)

    def _return(self, rows_RD: Tensor, handle: Handle, gradient: bool) -> Tensor:
        block, payload = handle.recv_splits[0], self._encode(rows_RD, gradient)
        assert handle.sort_R is not None
        # Each row has one expert, hence one non-zero contribution: the sum is exact, of encoded bytes too.
        scattered = payload.new_zeros(self._group.size * block, payload.shape[1])
        scattered.index_copy_(0, handle.sort_R, payload)
        returned = payload.new_empty(block, payload.shape[1])
        with self._telemetry.timed(self._layer, "alltoall_time_ms"):
            dist.reduce_scatter_tensor(returned, scattered, group=self._group.process_group)
        remote = (self._group.size - 1) * block
        self._account(payload, remote, remote, handle, rows_RD)
        return self._decode(returned[: handle.send_splits[0]], like=rows_RD)


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
    # Blocks (p, l) arrive p-major and are wanted l-major; within a block the order stays.
    expert_R = torch.arange(local).repeat(sources).repeat_interleave(arriving_PL.flatten())
    sort_R = torch.argsort(expert_R, stable=True)
    unsort_R = torch.empty_like(sort_R)
    unsort_R[sort_R] = torch.arange(sort_R.shape[0])
    return sort_R.to(device, non_blocking=True), unsort_R.to(device, non_blocking=True)
