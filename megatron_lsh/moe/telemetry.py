"""Gauges of the MoE layers: load, auxiliary losses, all-to-all bytes and time, LSH rates.

Every MoE layer adds to one :class:`MoETelemetry` while it runs; the train loop calls :meth:`MoETelemetry.collect` once
per log interval. Adding never synchronises with a GPU: tensors stay on their device until they are collected.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lsh.moe.timing import Region, Span, timed_region
from megatron_lsh.parallel.context import Group, ParallelContext

#: The parts of LSH that are timed apart.
LSH_STAGES = ("hash", "cluster", "refine", "compress", "restore")

#: Quantities that are summed over micro-batches, layers and ranks.
SUMS = (
    "load_balancing_loss",
    "z_loss",
    "alltoall_bytes",
    "alltoall_bytes_in",
    "alltoall_bytes_uncompressed",
    "alltoall_time_ms",
    "wire_time_ms",
    "experts_time_ms",
    *(f"lsh_{stage}_time_ms" for stage in LSH_STAGES),
    "lsh_rows",
    "lsh_clusters",
    "lsh_residual_energy",
    "lsh_row_energy",
    "probe_error_energy",
    "probe_output_energy",
)


@dataclass(frozen=True)
class LayerReport:
    """What one MoE layer did, on average per iteration and summed over all ranks, since the last report.

    Attributes:
        layer: number of the layer in the model, from 0.
        load_balancing_loss, z_loss: mean per micro-batch.
        load_max_over_mean: rows of the fullest expert over the mean; 1 is perfect balance.
        load_p50, load_p95: percentiles of the rows per expert.
        alltoall_bytes: payload that ranks sent to other ranks, both directions, forward and backward.
        alltoall_bytes_out_max, alltoall_bytes_in_max: payload that the busiest rank sent to others, and received from
            them. (Over all ranks what is sent is what is received.)
        alltoall_bytes_uncompressed: what an exact all-to-all would have sent for the same routing.
        alltoall_time_ms: time in all-to-alls (with the wait for slower ranks), mean over the ranks.
        wire_time_ms: time encoding rows for the wire and decoding them (``--lsh-wire-dtype``), mean over the ranks.
        lsh_compression_rate: centroids sent per row; None when LSH did not run.
        lsh_residual_energy: sum |x - c|^2 / sum |x|^2; None when LSH did not run.
        experts_time_ms: time in the experts, forward and backward, mean over the ranks.
        lsh_time_ms: time per stage of LSH (hash, cluster, refine; compress and restore with their backward passes), mean
            over the ranks; empty when LSH did not run.
        restored_error: sum |y - y_exact|^2 / sum |y_exact|^2 of the restored expert outputs, measured on probed
            micro-batches (``--lsh-probe-interval``); None without a probe.
    """

    layer: int
    load_balancing_loss: float
    z_loss: float
    load_max_over_mean: float
    load_p50: float
    load_p95: float
    alltoall_bytes: float
    alltoall_bytes_uncompressed: float
    alltoall_time_ms: float
    lsh_compression_rate: float | None
    lsh_residual_energy: float | None
    experts_time_ms: float = 0.0
    lsh_time_ms: dict[str, float] = field(default_factory=dict)
    restored_error: float | None = None
    alltoall_bytes_out_max: float = 0.0
    alltoall_bytes_in_max: float = 0.0
    wire_time_ms: float = 0.0

    @property
    def lsh_total_time_ms(self) -> float | None:
        """All stages of LSH together; None when LSH did not run."""
        return sum(self.lsh_time_ms.values()) if self.lsh_time_ms else None


class MoETelemetry:
    """Accumulates gauges of all MoE layers of one model on one rank."""

    def __init__(self, moe_layers: list[int], num_experts: int, device: torch.device) -> None:
        """
        Args:
            moe_layers: numbers of the MoE layers in the model.
            num_experts: E, the same in every layer.
            device: where layers run; GPU times are measured with events.
        """
        self._index = {layer: i for i, layer in enumerate(moe_layers)}
        self._device = device
        self._enabled = True
        self._sums: dict[tuple[str, int], float | Tensor] = {}
        self._spans: list[tuple[str, int, Span]] = []
        self._load_LE = torch.zeros(len(moe_layers), num_experts, dtype=torch.float64, device=device)
        self._micro_batches = 0

    def add(self, layer: int, name: str, value: float | Tensor) -> None:
        """Add ``value`` (a number or a 0-dim tensor, detached) to the sum ``name`` of a layer."""
        if name not in SUMS:
            raise ValueError(f"unknown gauge {name!r}; known: {', '.join(SUMS)}")
        if self._enabled:
            key = (name, self._index[layer])
            self._sums[key] = self._sums.get(key, 0.0) + value

    def add_load(self, layer: int, counts_E: Tensor) -> None:
        """Add one micro-batch's rows per expert (this rank's rows, before compression)."""
        if self._enabled:
            self._load_LE[self._index[layer]] += counts_E

    def count_micro_batch(self) -> None:
        """Note that one micro-batch passed through the model; means per micro-batch divide by this count."""
        if self._enabled:
            self._micro_batches += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore what happens inside (evaluation, generation)."""
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    @contextmanager
    def timed(self, layer: int, name: str) -> Iterator[Region]:
        """Add the milliseconds spent inside to the sum ``name`` of a layer: wall time on CPU, stream time on a GPU.

        With the region that it yields, the backward pass counts too: see :func:`megatron_lsh.moe.timing.timed_region`.
        """

        def record(span: Span) -> None:
            if self._enabled and self._device.type == "cuda":
                self._spans.append((name, layer, span))  # read when collected, so that nothing waits for the GPU
            elif self._enabled:
                self.add(layer, name, span.milliseconds())

        with timed_region(self._device, record) as region:
            yield region

    @torch.no_grad()
    def collect(self, ctx: ParallelContext, iterations: int) -> list[LayerReport]:
        """Reduce over all ranks, reset, and report per layer. Collective over the world.

        Args:
            iterations: optimizer steps since the last report; sums become means per iteration.
        """
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        spans, self._spans = self._spans, []
        for name, layer, span in spans:
            self.add(layer, name, span.milliseconds())
        num_layers = len(self._index)
        packed = torch.zeros(num_layers, len(SUMS), dtype=torch.float64, device=self._device)
        for (name, index), value in self._sums.items():
            packed[index, SUMS.index(name)] = value
        load_LE = self._load_LE.clone()
        busiest_L2 = packed[:, [SUMS.index("alltoall_bytes"), SUMS.index("alltoall_bytes_in")]]
        _reduce_over(packed, ctx.world)
        _reduce_over(load_LE, ctx.world)
        _reduce_over(busiest_L2, ctx.world, dist.ReduceOp.MAX)
        per_micro_batch = max(self._micro_batches, 1) * ctx.layout.dp
        self._sums.clear()
        self._load_LE.zero_()
        self._micro_batches = 0
        sums_L, load_LE, busiest = packed.cpu(), load_LE.cpu(), busiest_L2.tolist()
        reports = []
        for layer, i in self._index.items():
            sums = dict(zip(SUMS, sums_L[i].tolist(), strict=True))
            sums |= {"out_max": busiest[i][0], "in_max": busiest[i][1]}
            reports.append(_report(layer, sums, load_LE[i], iterations, per_micro_batch, ctx))
        return reports


def _reduce_over(tensor: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
    if group.process_group is not None and group.size > 1:
        dist.all_reduce(tensor, op, group=group.process_group)


def _report(
    layer: int, sums: dict[str, float], load_E: Tensor, iterations: int, per_micro_batch: int, ctx: ParallelContext
) -> LayerReport:
    """``sums`` of one layer over all ranks, with the busiest rank's bytes as ``out_max`` and ``in_max``."""
    lsh_ran = sums["lsh_rows"] > 0

    def mean_time(name: str) -> float:
        return sums[name] / max(iterations, 1) / ctx.world.size

    quantiles = torch.quantile(load_E, torch.tensor([0.5, 0.95], dtype=load_E.dtype)) / max(iterations, 1)
    return LayerReport(
        layer=layer,
        load_balancing_loss=sums["load_balancing_loss"] / per_micro_batch,
        z_loss=sums["z_loss"] / per_micro_batch,
        load_max_over_mean=(load_E.max() / load_E.mean().clamp(min=1e-12)).item(),
        load_p50=quantiles[0].item(),
        load_p95=quantiles[1].item(),
        alltoall_bytes=sums["alltoall_bytes"] / max(iterations, 1),
        alltoall_bytes_uncompressed=sums["alltoall_bytes_uncompressed"] / max(iterations, 1),
        alltoall_time_ms=mean_time("alltoall_time_ms"),
        lsh_compression_rate=sums["lsh_clusters"] / sums["lsh_rows"] if lsh_ran else None,
        lsh_residual_energy=sums["lsh_residual_energy"] / max(sums["lsh_row_energy"], 1e-30) if lsh_ran else None,
        experts_time_ms=mean_time("experts_time_ms"),
        lsh_time_ms={stage: mean_time(f"lsh_{stage}_time_ms") for stage in LSH_STAGES} if lsh_ran else {},
        wire_time_ms=mean_time("wire_time_ms"),
        alltoall_bytes_out_max=sums["out_max"] / max(iterations, 1),
        alltoall_bytes_in_max=sums["in_max"] / max(iterations, 1),
        restored_error=sums["probe_error_energy"] / probed if (probed := sums["probe_output_energy"]) > 0 else None,
    )
