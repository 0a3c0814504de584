"""What an all-to-all costs on other clusters: the LSH-MoE paper's cost model, fitted to a measurement.

From measured steps with the exact all-to-all and with LSH follows the break-even bandwidth, at which the bytes that LSH
saves take as long as its arithmetic. Predicted, and labelled so: the share of the all-to-all elsewhere (arXiv 2411.08446)

    T_all-to-all / T_compute = FLOPs / (6 B) * k / (1 + 2 k) * (w - 1) / (w h)

for top-k routing, hidden size h, w servers (here: expert-parallel ranks) of speed FLOPs, and bandwidth B per rank. FLOPs is
fitted so that the formula gives the measured ratio at the measured bandwidth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

PARTS = ("alltoall_ms", "experts_ms", "lsh_ms", "wire_ms", "rest_ms")


@dataclass(frozen=True)
class Steps:
    """Medians over the measured steps of one kind; times in ms, means over the ranks, bytes sent per rank."""

    step_ms: float
    quartiles_ms: tuple[float, float]
    alltoall_ms: float
    experts_ms: float
    lsh_ms: float
    wire_ms: float
    rest_ms: float
    """everything else: attention, router, optimizer, reduction of gradients"""
    bytes: float
    stages_ms: dict[str, float]
    """LSH by stage"""

    @property
    def compute_ms(self) -> float:
        """All but the all-to-all."""
        return self.step_ms - self.alltoall_ms

    @property
    def share(self) -> float:
        return self.alltoall_ms / self.step_ms


@dataclass(frozen=True)
class CostModel:
    """The paper's cost model, fitted to one measurement. Bandwidths are bytes/s per rank, times ms."""

    topk: int
    hidden: int
    ranks: int
    """w: over which rows are spread"""
    bandwidth: float
    """measured, effective"""
    flops: float
    """the formula's FLOPs, such that it gives the measured ratio; not a speed that the device has"""
    exact_compute_ms: float
    lsh_compute_ms: float
    lsh_bytes: float
    """as a share of the exact bytes"""
    break_even: float
    """bandwidth above which LSH costs time; infinite if it saves time even on an infinitely fast network"""

    def ratio(self, bandwidth: float, ranks: int, speed: float = 1.0) -> float:
        """T_all-to-all / T_compute, exact."""
        return paper_ratio(self.flops * speed, bandwidth, self.topk, self.hidden, ranks)

    def predict(self, bandwidth: float, ranks: int, speed: float = 1.0) -> tuple[float, float]:
        """(share of the exact all-to-all in the step, speed-up by LSH) where devices compute `speed` times as fast."""
        alltoall_ms = self.exact_compute_ms / speed * self.ratio(bandwidth, ranks, speed)
        exact_ms = self.exact_compute_ms / speed + alltoall_ms
        lsh_ms = self.lsh_compute_ms / speed + self.lsh_bytes * alltoall_ms
        return alltoall_ms / exact_ms, exact_ms / lsh_ms


def paper_ratio(flops: float, bandwidth: float, topk: int, hidden: int, ranks: int) -> float:
    """T_all-to-all / T_compute by the paper's formula."""
    return flops / (6 * bandwidth) * topk / (1 + 2 * topk) * (ranks - 1) / (ranks * hidden)


def fit(exact: Steps, lsh: Steps, *, topk: int, hidden: int, ranks: int) -> CostModel:
    """Fit the cost model to measured steps.

    The effective bandwidth is that of the exact all-to-all, with its latencies and waits for slower ranks.
    """
    bandwidth = exact.bytes / (exact.alltoall_ms / 1e3)
    measured_ratio = exact.alltoall_ms / exact.compute_ms
    costs_ms, saved_bytes = lsh.compute_ms - exact.compute_ms, exact.bytes - lsh.bytes
    return CostModel(
        topk=topk,
        hidden=hidden,
        ranks=ranks,
        bandwidth=bandwidth,
        flops=measured_ratio / paper_ratio(1.0, bandwidth, topk, hidden, ranks),
        exact_compute_ms=exact.compute_ms,
        lsh_compute_ms=lsh.compute_ms,
        lsh_bytes=lsh.bytes / exact.bytes,
        break_even=math.inf if costs_ms <= 0 else saved_bytes / (costs_ms / 1e3),
    )


def measured_text(exact: Steps, lsh: Steps, model: CostModel) -> str:
    """What was measured, for people."""
    both = (exact, lsh)
    rows = [("measured, per step", ["exact", "LSH"])]
    rows.append(
        ("step (quartiles)", [f"{s.step_ms:.1f} ms ({s.quartiles_ms[0]:.1f}-{s.quartiles_ms[1]:.1f})" for s in both])
    )
    for part, name in zip(PARTS, ("all-to-all", "experts", "LSH", "encoding", "rest"), strict=True):
        rows.append((name, [f"{(ms := getattr(s, part)):.1f} ms {ms / s.step_ms:5.0%}" for s in both]))
    rows.append(("sent per rank", [f"{s.bytes / 1e6:.2f} MB" for s in both]))
    lines = [f"{name:20} {cells[0]:>26} {cells[1]:>26}" for name, cells in rows]
    stages = ", ".join(f"{stage} {ms:.1f}" for stage, ms in lsh.stages_ms.items())
    lines.append(f"LSH by stage, ms: {stages}")
    if lsh.alltoall_ms > 1.5 * model.lsh_bytes * exact.alltoall_ms:
        lines.append(
            f"note: with {model.lsh_bytes:.0%} of the bytes the all-to-all took {lsh.alltoall_ms / exact.alltoall_ms:.0%} "
            "of the time: much of it is latency or waiting for slower ranks, which compression does not shorten"
        )
    speedup = exact.step_ms / lsh.step_ms
    effective = f"effective bandwidth {gbit(model.bandwidth)} per rank"
    lines.append(f"LSH step: {speedup:.2f}x the speed of the exact one; {effective}")
    if math.isinf(model.break_even):
        lines.append("break-even bandwidth: none, LSH saves time here on any network (the experts run on fewer rows)")
    else:
        lines.append(
            f"break-even bandwidth: {gbit(model.break_even)} per rank; where the all-to-all is faster than that, LSH "
            f"costs time ({lsh.compute_ms - exact.compute_ms:.1f} ms per step of arithmetic)"
        )
    return "\n".join(lines)


def predicted_text(model: CostModel, bandwidths_gbit: Sequence[float], ranks: int, speeds: Sequence[float]) -> str:
    """A table of predictions, for people: share of the exact all-to-all and speed-up by LSH."""
    lines = [
        f"A MODEL, NOT A MEASUREMENT: the paper's cost formula fitted to this machine ({gbit(model.bandwidth)} per rank, "
        f"{model.ranks} ranks), for {ranks} ranks.",
        "Columns: how many times as fast devices compute. Cells: share of the exact all-to-all, speed-up by LSH.",
        f"{'per rank':>12} " + "".join(f"{f'{speed:g}x compute':>16}" for speed in speeds),
    ]
    for bandwidth in bandwidths_gbit:
        cells = [model.predict(bandwidth * 1e9 / 8, ranks, speed) for speed in speeds]
        texts = (f"{share:.0%}, {speedup:.2f}x" for share, speedup in cells)
        lines.append(f"{f'{bandwidth:g} Gbit/s':>12} " + "".join(f"{text:>16}" for text in texts))
    return "\n".join(lines)


def as_json(exact: Steps, lsh: Steps, model: CostModel) -> dict[str, Any]:
    """Everything measured and fitted, as plain JSON (an infinite break-even is null)."""
    fitted = asdict(model) | {"break_even": None if math.isinf(model.break_even) else model.break_even}
    return {"exact": asdict(exact), "lsh": asdict(lsh), "cost_model": fitted}


def gbit(bytes_per_second: float) -> str:
    """``12.3 Gbit/s``"""
    return f"{bytes_per_second * 8e-9:.3g} Gbit/s"
