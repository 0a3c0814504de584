"""Transports: how rows reach the ranks of their experts and come back.

    plan = transport.plan(counts_E, p)             all ranks tell each other how many rows they will send
    flight = transport.start(rows_CD, plan, p)     rows set out for the ranks of their experts
    received_RD = flight.wait()                    ... and are there, sorted by expert
    flight = transport.start_back(out_RD, plan, p)
    back_CD = flight.wait()                        in the order in which they left

What is computed between a start and its wait runs while rows travel. The backward pass is the mirror image: the gradient
sets out where ``wait`` was and arrives where ``start`` was, so that what was computed in between has its backward pass in
between too. The rows themselves are kept by nobody: a flight that has arrived holds splits and an order.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lsh.moe.exchange_plan import Arrival, Plan, completed, expert_order
from megatron_lsh.moe.gauges import Gauge, averaged, busiest, summed
from megatron_lsh.moe.layer_pass import LayerPass
from megatron_lsh.moe.wire import Wire
from megatron_lsh.ops import to_device
from megatron_lsh.parallel.collectives import all_gather_single, reduce_scatter_single
from megatron_lsh.parallel.context import Group

GAUGES = (
    Gauge("alltoall_bytes", "bytes", "bytes sent per step, all ranks", summed("alltoall_bytes"),
          "payload that ranks send to other ranks, both ways, forward and backward"),
    Gauge("alltoall_bytes_network", "bytes", "bytes across the network per step", summed("alltoall_bytes_network"),
          "the part of `alltoall_bytes` that crosses the network between nodes"),
    Gauge("alltoall_bytes_node", "bytes", "bytes inside nodes per step", summed("alltoall_bytes_node"),
          "the part of `alltoall_bytes` that stays inside a node"),
    Gauge("alltoall_bytes_out_max", "bytes", "bytes sent by the busiest rank", busiest("alltoall_bytes"),
          "payload that the busiest rank sends to others", layers=None),
    Gauge("alltoall_bytes_in_max", "bytes", "bytes received by the busiest rank", busiest("alltoall_bytes_in"),
          "payload that the busiest rank receives from others", layers=None),
    Gauge("alltoall_time_ms", "ms", "all-to-all, ms per step", averaged("alltoall_time_ms"),
          "time that all-to-alls take of a rank, with the wait for slower ranks: what is exposed of them"),
    Gauge("alltoall_flight_time_ms", "ms", "all-to-all under way, ms per step", averaged("alltoall_flight_time_ms"),
          "from the start of each all-to-all until its rows are there and wanted, summed; what of it is not "
          "`alltoall_time_ms` is hidden behind computation"),
    Gauge("wire_time_ms", "ms", "wire encoding, ms per step", averaged("wire_time_ms"),
          "encoding and decoding of `--lsh-wire-dtype`"),
)  # fmt: skip

T = TypeVar("T")

#: Waits until a payload is there and returns it, one row each, in the order in which it is wanted.
Landing = Callable[[], Tensor]


class Movement(NamedTuple):
    """Rows that set out.

    Attributes:
        land: waits for the other ranks' rows.
        sent, received: rows to and from each rank of the group.
    """

    land: Landing
    sent: Sequence[int]
    received: Sequence[int]


class Transport(ABC):
    """Moves rows between the ranks of an expert-parallel group.

    A transport of another kind implements :meth:`move`, which knows neither autograd nor codecs, and :meth:`make_plan` and
    :meth:`order` if it needs others.
    """

    def __init__(
        self, group: Group, num_experts: int, wire: Wire | None = None, node_of_rank: Sequence[int] = ()
    ) -> None:
        """
        Args:
            group: the expert-parallel group; rank r holds experts [r E/EP, (r+1) E/EP).
            num_experts: E.
            wire: the numbers in which rows and gradients travel; None for those they have.
            node_of_rank: the node of each rank of the world, to tell the network's bytes from those inside a node; by
                default all ranks are on one.
        """
        self.group = group
        self.num_experts = num_experts
        self.local_experts = num_experts // group.size
        self.wire = wire or Wire()
        self.node_of_rank = tuple(node_of_rank)
        nodes = [node_of_rank[rank] if node_of_rank else 0 for rank in group.ranks]
        #: Whether each rank of the group is on this rank's node.
        self.near = [node == nodes[group.rank] for node in nodes]

    def plan(self, counts: Tensor, p: LayerPass, routed: Tensor | None = None) -> Callable[[], Plan]:
        """Start telling all ranks how many rows this one sends to each expert.

        Args:
            counts: int64 [E], rows per expert; sums to C. Or [P, E] on the host, those of all ranks of the group, if they
                are known already: then nobody is told anything, and nothing is waited for.
            routed: as ``counts``, the rows that those stand for, which nobody else needs: they come to the host with the
                counts. None where a row stands for itself.

        Returns:
            A function that returns the plan, and on its first call waits for the other ranks' counts.
        """
        routed = counts if routed is None else routed

        def read(counts_PE: Tensor, routed_PE: Tensor) -> Plan:
            return completed(self.make_plan(counts_PE, p.device), counts_PE, self.group.rank, routed_PE)

        if counts.ndim == 2:
            return functools.partial(read, counts, routed)
        return self.tell(torch.stack([counts, routed]), p, lambda counts_P2E: read(*counts_P2E.unbind(1)))

    def tell(self, counts: Tensor, p: LayerPass, read: Callable[[Tensor], T]) -> Callable[[], T]:
        """Start telling all ranks counts of this one.

        Args:
            counts: int64, of the same shape on all ranks.
            read: is given everyone's, [P, ...] on the host.

        Returns:
            A function that returns what ``read`` makes of them, and on its first call waits for them: the only place of a
            dispatch where the host waits for the device.
        """
        gathered = counts.new_empty(self.group.size, *counts.shape)
        launched = p.clock()
        work = all_gather_single(gathered.view(-1), counts.flatten(), group=self.group.process_group, async_op=True)
        arrival = Arrival(gathered, work)
        p.since(launched, "alltoall_time_ms")

        def arrive() -> T:
            began = p.clock()
            everyone = arrival.wait()
            p.elapsed(alltoall_flight_time_ms=launched, alltoall_time_ms=began)
            return read(everyone)

        return functools.cache(arrive)

    def start(self, rows_CD: Tensor, plan: Plan, p: LayerPass, columns: tuple[Tensor, ...] = ()) -> Flight:
        """Send each row to the rank that holds its expert.

        Args:
            rows_CD: rows sorted by expert; differentiable.
            plan: made of this rank's and all others' counts of these rows.
            columns: more of each row, [C, ...] each, that travels beside it in the numbers it has: ids, weights. Floating
                columns are differentiable.

        Returns:
            A flight; ``wait`` gives the rows [R, D] sorted by local expert (within an expert by source rank, then in the
            source's order), and the columns after them if there are any.
        """
        return Flight.start(self, plan, p, True, rows_CD, columns)

    def start_back(self, rows_RD: Tensor, plan: Plan, p: LayerPass, columns: tuple[Tensor, ...] = ()) -> Flight:
        """Return rows to where :meth:`start` took them from: [C, D] in the original order."""
        return Flight.start(self, plan, p, False, rows_RD, columns)

    def encode(self, rows: Tensor, p: LayerPass, gradient: bool = False) -> Tensor:
        """Rows as they travel, [C, ...]. Gradients may be rounded stochastically."""
        codec = self.wire.gradients if gradient else self.wire.rows
        if codec is None:
            return rows.contiguous()
        noise = p.noise.generator(rows.device) if gradient else None
        return p.time("wire_time_ms", codec.encode, rows.detach(), noise)

    def decode(self, payload: Tensor, width: int, dtype: torch.dtype, p: LayerPass, gradient: bool = False) -> Tensor:
        """Rows [C, width] of ``dtype`` as they were before :meth:`encode`."""
        codec = self.wire.gradients if gradient else self.wire.rows
        if codec is None:
            return payload
        return p.time("wire_time_ms", codec.decode, payload, payload.new_empty(0, width, dtype=dtype))

    def make_plan(self, counts_PE: Tensor, device: torch.device) -> Plan:
        """The plan, given all ranks' counts on the host."""
        rank, local = self.group.rank, self.local_experts
        arriving_PL = counts_PE[:, rank * local : (rank + 1) * local]
        sort_R, unsort_R = expert_order(arriving_PL, device)
        sent_P = counts_PE[rank].view(self.group.size, local).sum(1)
        return Plan(arriving_PL.sum(0), sent_P.tolist(), arriving_PL.sum(1).tolist(), sort_R, unsort_R)

    def remote_rows(self, movement: Movement) -> tuple[int, int, int]:
        """Rows of a movement to ranks of other nodes, to other ranks of this node, and from other ranks."""
        own = self.group.rank
        near = sum(rows for rows, is_near in zip(movement.sent, self.near, strict=True) if is_near)
        return sum(movement.sent) - near, near - movement.sent[own], sum(movement.received) - movement.received[own]

    def order(self, rows: Tensor, plan: Plan, outward: bool) -> Tensor:
        """Rows in the order in which they leave."""
        return rows

    @abstractmethod
    def move(self, payload: Tensor, plan: Plan, outward: bool) -> Movement:
        """Send rows towards the experts or back."""


class LocalTransport(Transport):
    """EP = 1: every expert is here and nothing moves."""

    def tell(self, counts: Tensor, p: LayerPass, read: Callable[[Tensor], T]) -> Callable[[], T]:
        arrival = Arrival(counts.unsqueeze(0))
        return functools.cache(lambda: read(arrival.wait()))

    def start(self, rows_CD: Tensor, plan: Plan, p: LayerPass, columns: tuple[Tensor, ...] = ()) -> Flight:
        return Arrived(rows_CD, columns)

    def start_back(self, rows_RD: Tensor, plan: Plan, p: LayerPass, columns: tuple[Tensor, ...] = ()) -> Flight:
        return Arrived(rows_RD, columns)

    def move(self, payload: Tensor, plan: Plan, outward: bool) -> Movement:
        return Movement(lambda: payload, [0], [0])


class AllToAllTransport(Transport):
    """One all-to-all with uneven splits each way; a row travels only to the rank of its expert."""

    def order(self, rows: Tensor, plan: Plan, outward: bool) -> Tensor:
        return rows if outward or plan.unsort_R is None else rows.index_select(0, plan.unsort_R)

    def move(self, payload: Tensor, plan: Plan, outward: bool) -> Movement:
        leaving, arriving = plan.send_splits, plan.recv_splits
        if not outward:
            leaving, arriving = arriving, leaving
        received = payload.new_empty(sum(arriving), payload.shape[1])
        work = dist.all_to_all_single(
            received, payload, arriving, leaving, group=self.group.process_group, async_op=True
        )

        def land() -> Tensor:
            work.wait()
            return received.index_select(0, plan.sort_R) if outward and plan.sort_R is not None else received

        return Movement(land, leaving, arriving)


class AllGatherTransport(Transport):
    """Every rank receives every row and keeps those of its experts; a reduce-scatter brings the outputs back.

    Sends EP - 1 times the rows of each rank, whatever the routing. It exists for small EP groups on networks where
    all-to-all is slow or missing, and as an independent check of :class:`AllToAllTransport`. Collectives want equal
    sizes, so blocks are padded to the largest rank's rows.
    """

    def make_plan(self, counts_PE: Tensor, device: torch.device) -> Plan:
        size, local, rank = self.group.size, self.local_experts, self.group.rank
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
        return Plan(mine_PL.sum(0), [int(rows_P[rank])], [block] * size, to_device(sort_R, device), None)

    def move(self, payload: Tensor, plan: Plan, outward: bool) -> Movement:
        block, size, group = plan.recv_splits[0], self.group.size, self.group.process_group
        everything = payload.new_zeros(size * block, payload.shape[1])
        sort_R = plan.sort_R
        assert sort_R is not None
        if outward:
            padded = payload.new_zeros(block, payload.shape[1])
            padded[: payload.shape[0]] = payload
            work = all_gather_single(everything, padded, group=group, async_op=True)
        else:
            # Each row has one expert, hence one non-zero contribution: the sum is exact, of encoded bytes too.
            everything.index_copy_(0, sort_R, payload)
            returned = payload.new_empty(block, payload.shape[1])
            work = reduce_scatter_single(returned, everything, group=group, async_op=True)

        def land() -> Tensor:
            work.wait()
            return everything.index_select(0, sort_R) if outward else returned[: plan.send_splits[0]]

        return Movement(land, [block] * size, [block] * size)


class Flight:
    """Rows under way.

    Attributes:
        token: a tensor of the rows' shape and dtype without memory of its own. It stands for them in autograd's graph:
            hand it to what must see that a gradient will come this way (``fully_shard`` looks at a module's arguments).
    """

    def __init__(self, token: Tensor, crossing: _Crossing) -> None:
        self.token, self._crossing = token, crossing

    @staticmethod
    def start(
        transport: Transport, plan: Plan, p: LayerPass, outward: bool, rows: Tensor, columns: tuple[Tensor, ...]
    ) -> Flight:
        crossing = _Crossing(transport, plan, p, outward)
        return Flight(_Start.apply(crossing, rows, *columns), crossing)

    def wait(self, token: Tensor | None = None) -> Any:
        """The rows, and the columns after them in a tuple if there are any.

        Args:
            token: :attr:`token`, if it went through something that autograd must see.
        """
        rows, *columns = _Wait.apply(self._crossing, self.token if token is None else token)
        return (rows, *columns) if columns else rows


class _Crossing:
    """The two movements of a flight: of rows, and of their gradient back.

    Autograd's graph holds it, so it must not hold the token, whose graph this is: in a circle all that the graph keeps would
    live until Python looks for circles, which is seldom, and recomputation would save nothing.
    """

    def __init__(self, transport: Transport, plan: Plan, p: LayerPass, outward: bool) -> None:
        self._transport, self._plan, self._pass, self.outward = transport, plan, p, outward
        self._landing: Callable[[], list[Tensor]] | None = None

    def launch(self, outward: bool, tensors: tuple[Tensor, ...], gradient: bool) -> None:
        """Send rows and columns in one movement."""
        transport, plan, p = self._transport, self._plan, self._pass
        ordered = [transport.order(tensor, plan, outward) for tensor in tensors]
        rows, *columns = ordered
        payload = transport.encode(rows, p, gradient)
        own_width, own_dtype, shapes = payload.shape[1], payload.dtype, [(c.shape[1:], c.dtype) for c in columns]
        if columns:
            payload = torch.cat([_as_bytes(t) for t in (payload, *columns)], 1)
        launched = p.clock()
        movement = transport.move(payload, plan, outward)
        land, row_bytes = movement.land, payload.shape[1] * payload.element_size()
        network, near, received = transport.remote_rows(movement)
        p.since(
            launched,
            "alltoall_time_ms",
            alltoall_bytes=(network + near) * row_bytes,
            alltoall_bytes_network=network * row_bytes,
            alltoall_bytes_node=near * row_bytes,
            alltoall_bytes_in=received * row_bytes,
        )
        width, dtype = rows.shape[1], rows.dtype

        def landing() -> list[Tensor]:
            began = p.clock()
            arrived, found = land(), []
            p.elapsed(alltoall_flight_time_ms=launched, alltoall_time_ms=began)
            if shapes:
                parts = [(torch.Size([own_width]), own_dtype), *shapes]
                arrived, *found = _from_bytes(arrived, parts)
            return [transport.decode(arrived, width, dtype, p, gradient), *found]

        self._landing = landing

    def land(self) -> list[Tensor]:
        """Wait, and forget what travelled."""
        landing, self._landing = self._landing, None
        assert landing is not None, "a flight arrives once"
        return landing()

    def __del__(self) -> None:
        # Recomputation stops as soon as it has what backward needs, perhaps between start and wait. Buffers must not go
        # while other ranks write to them.
        if self._landing is not None:
            self.land()


class Arrived(Flight):
    """Rows that had no way to go."""

    def __init__(self, rows: Tensor, columns: tuple[Tensor, ...]) -> None:
        self.token, self._columns = rows, columns

    def wait(self, token: Tensor | None = None) -> Any:
        rows = self.token if token is None else token
        return (rows, *self._columns) if self._columns else rows


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, crossing: _Crossing, rows: Tensor, *columns: Tensor) -> Tensor:
        ctx.crossing, ctx.floating = crossing, [column.is_floating_point() for column in columns]
        crossing.launch(crossing.outward, (rows, *columns), gradient=False)
        return _stand_in(rows, rows.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_rows, *of_columns = ctx.crossing.land()
        found = iter(of_columns)
        return None, grad_rows, *(next(found) if floating else None for floating in ctx.floating)


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, crossing: _Crossing, token: Tensor) -> tuple[Tensor, ...]:
        ctx.crossing, ctx.token_shape = crossing, token.shape
        rows, *columns = crossing.land()
        ctx.mark_non_differentiable(*(c for c in columns if not c.is_floating_point()))
        return rows, *columns

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        rows, *columns = (grad.contiguous() for grad in grads)
        columns = [column for column in columns if column.is_floating_point()]
        ctx.crossing.launch(not ctx.crossing.outward, (rows, *columns), gradient=True)
        return None, _stand_in(rows, ctx.token_shape)


def _stand_in(rows: Tensor, shape: torch.Size) -> Tensor:
    """Zeros of this shape that are one number in memory. Not by ``expand``: ``fully_shard`` warns of views."""
    return rows.new_empty(0).set_(rows.new_zeros(1).untyped_storage(), 0, shape, [0] * len(shape))


def _as_bytes(tensor: Tensor) -> Tensor:
    """uint8 [C, bytes of a row]."""
    return tensor.contiguous().flatten(1).view(torch.uint8) if tensor.ndim > 1 else _as_bytes(tensor.unsqueeze(1))


def _from_bytes(payload: Tensor, parts: list[tuple[torch.Size, torch.dtype]]) -> list[Tensor]:
    """The tensors, of these shapes of a row, whose :func:`_as_bytes` lie side by side."""
    widths = [shape.numel() * dtype.itemsize for shape, dtype in parts]
    return [
        columns.clone(memory_format=torch.contiguous_format).view(dtype).view(payload.shape[0], *shape)
        for columns, (shape, dtype) in zip(payload.split(widths, 1), parts, strict=True)
    ]
