"""How fast links are inside a node and between nodes, measured: the sections `inside` and `across` of a cluster file.

All-to-alls of growing size, as the exact dispatcher's; and how the other kinds of calls compare with them for as many bytes:
all-to-alls among the ranks of one place on their nodes, reductions, sends from stage to stage. They differ by more than
their bytes: over TCP two ranks that send to each other at once may get half of what one of them gets alone, because
acknowledgements wait behind data (Zhang, Shenker and Clark, SIGCOMM 1991).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_lsh.parallel.collectives import all_reduce_
from megatron_lsh.parallel.context import Group, ParallelContext
from megatron_lsh.plan.cluster import Link
from megatron_lsh.plan.traffic import reduced

SIZES = (2**10, 2**14, 2**16, 2**18, 2**20, 2**23)
"""bytes that a rank sends in a measured all-to-all"""
LONGEST = 0.4
"""seconds after which no larger one is tried"""
_LEAST, _MOST, _ENOUGH = 3, 20, 0.5
"""calls that are timed, at least and at most, and the seconds after which they are enough"""


def measure_links(ctx: ParallelContext) -> dict[str, Any]:
    """The sections `inside` and `across`, those that there are. Collective over the world."""
    found: dict[str, Any] = {}
    several = ctx.ep_spans_nodes
    per_node = ctx.ep_local.size if several else ctx.ep.size
    if per_node > 1:
        group = ctx.ep_local if several else ctx.ep
        found["inside"] = {"ranks": group.size, "alltoall_us": _curve(group, ctx, group.size - 1, 1)}
        found["inside"]["send_efficiency"] = _sends(group, ctx, link_of(found["inside"]), 1)
    if several:
        # Of a flat all-to-all, what ranks send on their own node counts as nothing.
        pairs = ctx.ep_node if per_node > 1 else ctx.ep
        curve = _curve(ctx.ep, ctx, ctx.ep.size - per_node, per_node)
        across = found["across"] = {"ranks": pairs.size, "alltoall_us": curve}
        across["send_efficiency"] = _sends(pairs, ctx, link_of(across), per_node)
        if per_node > 1:
            across["hop_efficiency"] = _hops(pairs, ctx, link_of(across), per_node)
    name = "across" if several else "inside"
    found[name]["reduction_efficiency"] = _reductions(ctx, link_of(found[name]), several)
    return found


def link_of(section: dict[str, Any]) -> Link:
    """All-to-alls of a section that was measured."""
    return Link.of_curve(section["alltoall_us"], section["ranks"])


def _curve(group: Group, ctx: ParallelContext, far: int, senders: int) -> list[list[float]]:
    """[bytes, microseconds] of all-to-alls in which each of `senders` ranks of a node sends its share of so many bytes to
    `far` other ranks over the link; rising."""
    points: list[list[float]] = []
    for size in SIZES:
        each = max(size // (4 * far), 1)
        taken = _timed(_alltoall(group, ctx, each), ctx)
        if not points or taken * 1e6 > points[-1][1]:
            points.append([4.0 * each * far * senders, round(taken * 1e6, 3)])
        if taken > LONGEST and len(points) > 1:
            break
    if len(points) == 1:  # a link on which a million bytes are no slower than a thousand
        points.append([points[0][0] * 2, points[0][1] * 1.001])
    return points


def _alltoall(group: Group, ctx: ParallelContext, each: int) -> Callable[[], Any]:
    leaving = torch.ones(each * group.size, device=ctx.device)
    return partial(dist.all_to_all_single, torch.empty_like(leaving), leaving, group=group.process_group)


def _hops(pairs: Group, ctx: ParallelContext, link: Link, senders: int) -> float:
    """Speed of all-to-alls among ranks of the same place on their nodes, all places at once."""
    each = max(int(link.measured) // (4 * senders * (pairs.size - 1)), 1)
    taken = _timed(_alltoall(pairs, ctx, each), ctx)
    return _share(link, 4.0 * each * senders * (pairs.size - 1), taken - link.points[0][1])


def _sends(pairs: Group, ctx: ParallelContext, link: Link, senders: int) -> float:
    """Speed of sends from every second rank of these groups to the next one."""
    payload = torch.ones(max(int(link.measured) // (4 * senders), 1), device=ctx.device)
    source = pairs.rank - pairs.rank % 2
    paired = source + 1 < pairs.size

    def call() -> None:
        if paired and pairs.rank == source:
            dist.send(payload, dst=pairs.ranks[source + 1], group=pairs.process_group)
        elif paired:
            dist.recv(payload, src=pairs.ranks[source], group=pairs.process_group)

    return _share(link, 4.0 * payload.numel() * senders, _timed(call, ctx) - link.points[0][1])


def _reductions(ctx: ParallelContext, link: Link, several: bool) -> float:
    """Speed of one over everybody: each node, or without several each rank, hands on as much as `reduced` says."""
    payload = torch.ones(max(int(link.measured) // (8 if several else 16), 1), device=ctx.device)
    taken = _timed(lambda: dist.all_reduce(payload, group=ctx.world.process_group), ctx)
    sent = reduced(ctx.world.size, False, 4.0 * payload.numel(), 0.0)
    return _share(link, sent, taken - 2 * link.points[0][1])


def _share(link: Link, sent: float, moving: float) -> float:
    """How many times as fast as an all-to-all, which sends as many bytes, something moved them in so many seconds."""
    usual = link.seconds(sent, link.ranks) - link.points[0][1]
    return round(min(max(usual / max(moving, 1e-9), 0.01), 10.0), 4)


def _timed(call: Callable[[], Any], ctx: ParallelContext) -> float:
    """Mean seconds of a collective, of the slowest rank, without the longest call: training sees the mean of many, but the
    machine's stalls are not the link's."""
    taken: list[float] = []
    while len(taken) <= _LEAST or (len(taken) <= _MOST and sum(taken[1:]) < _ENOUGH):
        dist.barrier(group=ctx.world.process_group)
        finish(ctx.device)
        began = time.perf_counter()
        call()
        finish(ctx.device)
        taken.append(slowest_since(began, ctx))
    return statistics.fmean(sorted(taken[1:])[:-1])


def slowest_since(began: float, ctx: ParallelContext) -> float:
    """Seconds of the rank that took longest since its own moment ``began``."""
    seconds = torch.tensor(time.perf_counter() - began, dtype=torch.float64, device=ctx.device)
    return float(all_reduce_(seconds, ctx.world, dist.ReduceOp.MAX))


def finish(device: torch.device) -> None:
    """Wait for what the device was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_slowdown(ctx: ParallelContext, seconds: float = 0.05) -> float:
    """How much slower matrices are multiplied while an all-to-all is under way."""
    group = ctx.ep
    a = torch.ones(256, 256, device=ctx.device)

    def multiply(times: int) -> float:
        dist.barrier(group=ctx.world.process_group)
        began = time.perf_counter()
        for _ in range(times):
            torch.mm(a, a)
        finish(ctx.device)
        return time.perf_counter() - began

    times = max(int(seconds / max(multiply(10) / 10, 1e-7)), 1)
    shared = torch.tensor(float(times), device=ctx.device)
    times = int(all_reduce_(shared, ctx.world, dist.ReduceOp.MAX))
    ratios = []
    for _ in range(3):
        alone = multiply(times)
        leaving = torch.ones(group.size * 2**18, device=ctx.device)
        work = dist.all_to_all_single(torch.empty_like(leaving), leaving, group=group.process_group, async_op=True)
        ratios.append(multiply(times) / alone)
        work.wait()
    ratio = torch.tensor(statistics.median(ratios), device=ctx.device)
    return round(max(float(all_reduce_(ratio, ctx.world)) / ctx.world.size, 1.0), 4)
