"""Gathers what the MoE layers measured, once per log interval, over all ranks.

Every MoE layer adds to its own :class:`LayerRecord` while it runs; the train loop calls :meth:`MoETelemetry.collect`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_lsh.moe.gauges import Gauge, Reduced
from megatron_lsh.moe.layer_pass import LayerRecord
from megatron_lsh.parallel.agreement import exchange
from megatron_lsh.parallel.collectives import all_reduce_
from megatron_lsh.parallel.context import ParallelContext


@dataclass(frozen=True)
class LayerReport:
    """What one MoE layer did since the last report.

    Attributes:
        layer: number of the layer in the model, from 0.
        gauges: by name, what was measured.
        figures: by name, the layer's figure; None where there is none.
    """

    layer: int
    gauges: Mapping[str, Gauge]
    figures: Mapping[str, float | None]

    def __getitem__(self, name: str) -> float | None:
        return self.figures[name]


class MoETelemetry:
    """The records of all MoE layers of a model, and the gauges that they are read by."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._gauges: dict[str, Gauge] = {}
        self._known: set[str] = set()
        self._records: dict[int, LayerRecord] = {}
        self._complete = False
        self.waited_ms = 0.0
        """per iteration, what all-to-alls took of this rank alone, over the last collected interval"""

    def layer(self, layer: int, num_experts: int, gauges: Iterable[Gauge]) -> LayerRecord:
        """The record of layer number ``layer``, which has E = ``num_experts`` and adds to the sums of these gauges.

        Raises:
            ValueError: another gauge has the name of one of them.
        """
        self.declare(gauges)
        if layer not in self._records:
            self._records[layer] = LayerRecord(num_experts, self._device, self._known)
        return self._records[layer]

    def declare(self, gauges: Iterable[Gauge]) -> None:
        """Make these gauges known, whether or not a layer here measures them. Raises as :meth:`layer`."""
        for gauge in gauges:
            if self._gauges.setdefault(gauge.name, gauge) != gauge:
                raise ValueError(f"there are two gauges named {gauge.name!r}: rename one of them")
            self._known.update(gauge.combine.sums)

    def count_micro_batch(self, layers: range | None = None) -> None:
        """Note that a micro-batch passed through these layers, by default all; means per micro-batch divide by the count."""
        for layer, record in self._records.items():
            if record.enabled and (layers is None or layer in layers):
                record.micro_batches += 1
                record.timing = False  # the first of a log interval was timed, and stands for all of them

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore what happens inside (evaluation, generation)."""
        before = {layer: record.enabled for layer, record in self._records.items()}
        for record in self._records.values():
            record.enabled = False
        try:
            yield
        finally:
            for layer, record in self._records.items():
                record.enabled = before[layer]

    @torch.no_grad()
    def collect(self, ctx: ParallelContext, iterations: int) -> list[LayerReport]:
        """Reduce over all ranks, reset, and report per layer of the whole model, in order. Collective over the world.

        Args:
            iterations: optimizer steps since the last report; sums become means per iteration.
        """
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._meet_other_stages(ctx)
        numbers = sorted(self._records)
        records = [self._records[layer] for layer in numbers]
        for record in records:
            spans, record.spans = record.spans, []
            for name, span in spans:
                record.add_time(name, span.milliseconds())
            times, record.times = record.times, {}
            record.add(**{name: ms * max(record.micro_batches, 1) for name, ms in times.items()})
        waited = sum(float(record.sums.get("alltoall_time_ms", 0.0)) for record in records)
        self.waited_ms = waited / max(iterations, 1)
        names = sorted(self._known)
        # Two rows per layer: the sums, and how many ranks added to each.
        packed_L2S = torch.zeros(len(records), 2, len(names), dtype=torch.float64, device=self._device)
        for sums_2S, record in zip(packed_L2S, records, strict=True):
            for column, name in enumerate(names):
                if name in record.sums:
                    sums_2S[0, column] = record.sums[name]
                    sums_2S[1, column] = 1
        largest = [
            name for name in names if any(g.combine.needs_largest and name in g.combine.sums for g in self._all())
        ]
        largest_LM = packed_L2S[:, 0, [names.index(name) for name in largest]]
        passed_L = packed_L2S.new_tensor([record.micro_batches for record in records])
        load = torch.cat([record.load_E for record in records]) if records else packed_L2S.new_zeros(0)
        # What a layer of another stage did is zero here, and counts nothing.
        for tensor in (packed_L2S, load):
            all_reduce_(tensor, ctx.world)
        for tensor in (largest_LM, passed_L):
            all_reduce_(tensor, ctx.world, dist.ReduceOp.MAX)
        load_of = load.cpu().split([record.load_E.shape[0] for record in records])
        reports = []
        for number, load_E, (sums, added), most, passed in zip(
            numbers, load_of, packed_L2S.tolist(), largest_LM.tolist(), passed_L.tolist(), strict=True
        ):
            found = Reduced(
                sums={name: value for name, value, ranks in zip(names, sums, added, strict=True) if ranks},
                largest=dict(zip(largest, most, strict=True)),
                load_E=load_E,
                iterations=max(iterations, 1),
                ranks=ctx.stage.size,
                micro_batches=max(int(passed), 1) * ctx.layout.dp,
            )
            figures = {name: gauge.figure(found) for name, gauge in self._gauges.items()}
            reports.append(LayerReport(number, self._gauges, figures))
        for record in records:
            record.sums.clear()
            record.load_E.zero_()
            record.timing = True
            record.micro_batches = 0
        return reports

    def _meet_other_stages(self, ctx: ParallelContext) -> None:
        """Add empty records for the MoE layers of other pipeline stages, to report of them here. Collective once."""
        if ctx.pp.size == 1 or self._complete:
            return
        held = {layer: record.load_E.shape[0] for layer, record in self._records.items()}
        for others in exchange(held, ctx.pp.process_group):
            for layer, num_experts in others.items():
                self.layer(layer, num_experts, ())
        self._complete = True

    def _all(self) -> Iterable[Gauge]:
        return self._gauges.values()
