"""Transports: what lies between a start and its wait runs there, forward and backward, whatever the ranks have to send."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megatron_lsh.config.model import ModelConfig
from megatron_lsh.config.moe import MoEConfig
from megatron_lsh.config.parallel import ParallelConfig
from megatron_lsh.moe.exchange_plan import Plan
from megatron_lsh.moe.experts import Experts, Feed
from megatron_lsh.moe.gauges import Gauge
from megatron_lsh.moe.layer import GAUGES
from megatron_lsh.moe.layer_pass import LayerPass, LayerRecord, ReplayMemo
from megatron_lsh.moe.transport import AllGatherTransport, AllToAllTransport, Transport
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.parameters import initialize_parameters
from megatron_lsh.parallel.testing import run_distributed_test

D, E = 8, 4
#: Rows per expert of each rank: one with many, one with none, one with single rows, one with all for one expert.
COUNTS = [[5, 0, 3, 2], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 7, 0]]


def a_record(gauges: tuple[Gauge, ...] = GAUGES) -> LayerRecord:
    return LayerRecord(E, torch.device("cpu"), {name for gauge in gauges for name in gauge.combine.sums})


def a_pass(memo: ReplayMemo | None = None, gauges: tuple[Gauge, ...] = GAUGES) -> LayerPass:
    return LayerPass(a_record(gauges), memo)


class Mark(torch.autograd.Function):
    """The identity, that writes down when it runs and when its gradient does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, events: list[str]) -> Tensor:
        ctx.name, ctx.events = name, events
        events.append(name)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.events.append(f"{ctx.name} backward")
        return grads[0], None, None


class Watched(AllToAllTransport):
    """Writes down when rows set out and when somebody waits for them."""

    events: list[str]

    def move(self, payload: Tensor, plan: Plan, outward: bool):  # type: ignore[no-untyped-def]
        movement = super().move(payload, plan, outward)
        way = "out" if outward else "back"
        self.events.append(f"start {way}")

        def watched() -> Tensor:
            self.events.append(f"wait {way}")
            return movement.land()

        return movement._replace(land=watched)


def rows_of(rank: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return (scale * torch.randn(sum(COUNTS[rank]), D, generator=generator)).requires_grad_()


class Unit(nn.Module):
    """What a MoE layer does with rows, with work in between on the way out."""

    def __init__(self, transport: Transport, experts: Experts, events: list[str]) -> None:
        super().__init__()
        self.experts, self.weight = experts, nn.Parameter(torch.full((D,), 0.5))
        self._transport, self._events = transport, events

    def forward(self, rows: Tensor, counts_E: Tensor, other: Tensor, memo: ReplayMemo) -> Tensor:
        p, transport = a_pass(memo), self._transport
        if self not in memo:
            memo[self] = transport.plan(counts_E, p)()
        plan: Plan = memo[self]
        flight = transport.start(Mark.apply(rows, "before", self._events), plan, p)
        meanwhile = Mark.apply(other * self.weight, "meanwhile", self._events)
        received = flight.wait()
        out = self.experts(Feed(Mark.apply(received, "experts", self._events), plan.counts_L))
        back = transport.start_back(out, plan, p).wait()
        return Mark.apply(back, "after", self._events).sum() + meanwhile.square().sum()


def a_unit(ctx, events: list[str], shard: bool) -> Unit:  # type: ignore[no-untyped-def]
    model = ModelConfig(hidden_size=D, num_layers=1, ffn_hidden_size=12, swiglu=True, add_bias_linear=False)
    experts = Experts(model, MoEConfig(num_experts=E), ctx)
    initialize_parameters(experts, 1)
    transport = Watched(ctx.ep, E)
    transport.events = events
    unit = Unit(transport, experts, events)
    if shard:
        fully_shard(experts, mesh=ctx.expert_mesh["edp_replicate", "edp_shard"])
        fully_shard(unit, mesh=ctx.dense_mesh["dp_replicate", "dp_shard"])
    return unit


FORWARD = ["before", "start out", "meanwhile", "wait out", "experts", "start back", "wait back", "after"]
BACKWARD = [
    "after backward", "start out", "wait out", "experts backward", "start back", "meanwhile backward", "wait back",
    "before backward",
]  # fmt: skip


def event_order_on_four_ranks() -> None:
    ctx = initialize(ParallelConfig(expert_model_parallel_size=4))
    counts_E, other = torch.tensor(COUNTS[ctx.rank]), torch.ones(3, D, requires_grad=True)
    expected: list[Tensor] | None = None
    for shard in (False, True):
        for recompute in (False, True):
            events: list[str] = []
            unit = a_unit(ctx, events, shard)
            rows, memo = rows_of(ctx.rank), ReplayMemo()
            if recompute:
                loss = checkpoint(unit, rows, counts_E, other, memo, use_reentrant=False)
            else:
                loss = unit(rows, counts_E, other, memo)
            assert events == FORWARD, events
            events.clear()
            loss.backward()
            forward_again = [event for event in FORWARD if event != "after"] if recompute else []
            replayed, backward = events[: len(events) - len(BACKWARD)], events[-len(BACKWARD) :]
            # Marks before the gradient's first use of a saved tensor may run before the replay.
            assert sorted(replayed + backward) == sorted([*replayed, *BACKWARD]), events
            if not recompute:
                assert events == BACKWARD, events
            else:
                collectives = [event for event in events if "start" in event or "wait" in event]
                assert collectives[:4] == [e for e in forward_again if "start" in e or "wait" in e], events
                assert collectives[4:] == [e for e in BACKWARD if "start" in e or "wait" in e], events
                place = {event: len(events) - 1 - events[::-1].index(event) for event in BACKWARD}
                assert place["start back"] < place["meanwhile backward"] < place["wait back"], events
            assert rows.grad is not None
            if expected is None:
                expected = [loss.detach(), rows.grad]
            assert all(torch.equal(a, b) for a, b in zip([loss.detach(), rows.grad], expected, strict=True))
            other.grad = None


class Issued(TorchDispatchMode):
    """The collectives that this rank issues, in order, whichever communicator they are of."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self.names.append(function._schema.name.removeprefix("c10d::").strip("_"))
        return function(*args, **(kwargs or {}))


def collectives_are_issued_in_one_order() -> None:
    """Rows are under way while ``fully_shard`` gathers parameters and reduces gradients on other communicators. On GPUs
    ranks that issue these in different orders may wait for each other for ever: there is one order, that of the program."""
    for sharded in (False, True):
        ctx = initialize(ParallelConfig(expert_model_parallel_size=2, use_distributed_optimizer=sharded))
        reduction = "reduce_scatter_base" if sharded else "allreduce"
        for recompute in (False, True):
            unit = a_unit(ctx, [], shard=True)
            counts_E, other = torch.tensor(COUNTS[ctx.rank]), torch.ones(3, D, requires_grad=True)
            arguments = (rows_of(ctx.rank), counts_E, other, ReplayMemo())
            with Issued() as issued:
                loss = checkpoint(unit, *arguments, use_reentrant=False) if recompute else unit(*arguments)
                loss.backward()
            everyone: list[Any] = [None] * 4
            dist.all_gather_object(everyone, issued.names)
            assert all(names == issued.names for names in everyone), everyone
            # The experts' gradients are reduced while those of rows travel.
            place = issued.names.index(reduction)
            assert "alltoall_base" in issued.names[:place] and "alltoall_base" in issued.names[place:], issued.names


def columns_travel_beside_rows() -> None:
    """Ids and weights arrive with their rows, and the gradients of weights come back with theirs."""
    ctx = initialize(ParallelConfig(expert_model_parallel_size=4))
    counts_E = torch.tensor(COUNTS[ctx.rank])
    for kind in (AllToAllTransport, AllGatherTransport):
        transport, p = kind(ctx.ep, E), a_pass()
        plan = transport.plan(counts_E, p)()
        rows = rows_of(ctx.rank)
        expert_N = torch.arange(E).repeat_interleave(counts_E)
        ids = torch.stack([torch.full_like(expert_N, ctx.rank), expert_N], 1)
        weights = torch.arange(len(rows), dtype=torch.float64).requires_grad_()
        fixed = weights.detach().float()
        received, *columns = transport.start(rows, plan, p, (ids, fixed, weights.unsqueeze(1))).wait()
        arrived_ids, arrived_fixed, arrived_weights = columns
        assert arrived_ids.shape == (int(plan.counts_L.sum()), 2) and (arrived_ids[:, 1] == ctx.ep.rank).all()
        assert torch.equal(arrived_ids[:, 0], arrived_ids[:, 0].sort(stable=True).values)
        assert torch.equal(arrived_fixed.double(), arrived_weights.detach().squeeze(1))
        weighted = received * arrived_weights.float()
        back, own_ids = transport.start_back(weighted, plan, p, (arrived_ids,)).wait()
        assert torch.equal(own_ids, ids)
        torch.testing.assert_close(back, rows * weights.unsqueeze(1).float())
        back.square().sum().backward()
        assert rows.grad is not None and weights.grad is not None
        torch.testing.assert_close(rows.grad, 2 * rows.detach() * weights.detach().float().square().unsqueeze(1))
        expected = (2 * rows.detach().square().sum(1).double() * weights.detach()).float()
        torch.testing.assert_close(weights.grad.float(), expected)


def abandoned_flights_arrive() -> None:
    """Recomputation may stop between a start and its wait; the ranks' next collectives must find each other."""
    ctx = initialize(ParallelConfig(expert_model_parallel_size=4))
    transport, p = AllToAllTransport(ctx.ep, E), a_pass()
    plan = transport.plan(torch.tensor(COUNTS[ctx.rank]), p)()
    for _ in range(3):
        flight = transport.start(rows_of(ctx.rank), plan, p)
        del flight
    total = torch.ones(())
    dist.all_reduce(total, group=ctx.ep.process_group)
    assert total == 4
    arrived = transport.start(rows_of(ctx.rank), plan, p).wait()
    assert arrived.shape == (int(plan.counts_L.sum()), D)


def time_under_way_and_time_exposed() -> None:
    """What is computed between a start and its wait counts for the one and not for the other, also where it is long enough
    for all rows to arrive."""
    ctx = initialize(ParallelConfig(expert_model_parallel_size=4))
    transport, record = AllToAllTransport(ctx.ep, E), a_record()
    p = LayerPass(record)
    plan = transport.plan(torch.tensor(COUNTS[ctx.rank]), p)()
    record.times.clear()
    flight = transport.start(rows_of(ctx.rank), plan, p)
    dist.barrier(group=ctx.ep.process_group)  # everyone's rows have set out
    time.sleep(0.2)
    flight.wait()
    assert record.times["alltoall_flight_time_ms"] >= 200 > record.times["alltoall_time_ms"], record.times
    record.timing, before = False, dict(record.times)
    untimed = LayerPass(record)
    transport.start(rows_of(ctx.rank), plan, untimed).wait()
    assert record.times == before


def nothing_is_kept_after_arrival() -> None:
    ctx = initialize(ParallelConfig(expert_model_parallel_size=4))
    transport, p = AllToAllTransport(ctx.ep, E), a_pass()
    plan = transport.plan(torch.tensor(COUNTS[ctx.rank]), p)()
    flight = transport.start(rows_of(ctx.rank), plan, p)
    assert not flight.token._is_view()  # fully_shard would warn
    assert flight.token.stride() == (0, 0) and flight.token.shape == rows_of(ctx.rank).shape
    flight.wait()
    kept = [
        value for value in vars(flight).values() if isinstance(value, Tensor) and value.untyped_storage().nbytes() > 8
    ]
    assert kept == []


def all_of_them() -> None:
    event_order_on_four_ranks()
    collectives_are_issued_in_one_order()
    columns_travel_beside_rows()
    abandoned_flights_arrive()
    time_under_way_and_time_exposed()
    nothing_is_kept_after_arrival()


def test_start_and_wait_on_four_ranks() -> None:
    run_distributed_test(all_of_them, 4)
