"""The figures of one log interval, and how each output names them: JSONL keys, TensorBoard tags, the progress line."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any

from megatron_lsh.moe.telemetry import LSH_STAGES, LayerReport
from megatron_lsh.training.log_line import LogLine


def _stage_time_ms(stage: str, layer: LayerReport) -> float | None:
    return layer.lsh_time_ms.get(stage)


#: Per-layer quantities that --moe-per-layer-logging writes: name -> value of a LayerReport, None where there is none.
PER_LAYER: dict[str, Callable[[LayerReport], float | None]] = {
    "load_balancing_loss": attrgetter("load_balancing_loss"),
    "z_loss": attrgetter("z_loss"),
    "load_max_over_mean": attrgetter("load_max_over_mean"),
    "load_p50": attrgetter("load_p50"),
    "load_p95": attrgetter("load_p95"),
    "alltoall_bytes": attrgetter("alltoall_bytes"),
    "alltoall_bytes_uncompressed": attrgetter("alltoall_bytes_uncompressed"),
    "alltoall_bytes_out_max": attrgetter("alltoall_bytes_out_max"),
    "alltoall_bytes_in_max": attrgetter("alltoall_bytes_in_max"),
    "alltoall_time_ms": attrgetter("alltoall_time_ms"),
    "wire_time_ms": attrgetter("wire_time_ms"),
    "experts_time_ms": attrgetter("experts_time_ms"),
    "lsh_time_ms": attrgetter("lsh_total_time_ms"),
    "lsh_compression_rate": attrgetter("lsh_compression_rate"),
    "lsh_residual_energy": attrgetter("lsh_residual_energy"),
    "lsh_restored_error": attrgetter("restored_error"),
    **{f"lsh_{stage}_time_ms": partial(_stage_time_ms, stage) for stage in LSH_STAGES},
}


@dataclass(frozen=True)
class IntervalMetrics:
    """What is reported for the iterations since the last report. Losses, times and bytes are means per iteration."""

    iteration: int
    iterations: int
    """how many iterations this process did since the last report"""
    train_iters: int
    consumed_samples: int
    global_batch_size: int
    lm_loss: float | None
    """None if every iteration of the interval was skipped"""
    grad_norm: float
    """of the last iteration, before clipping"""
    learning_rate: float
    """that the next iteration will use, as in Megatron's log"""
    iteration_time_ms: float
    tokens_per_second: float
    tflops: float
    """model TFLOP/s per rank"""
    mfu: float | None
    """share of the device's peak; None if the peak is unknown"""
    skipped: int = 0
    nan: int = 0
    further_losses: Mapping[str, float] = field(default_factory=dict)
    """what is minimized beside lm_loss, by its name in the log, such as "sop loss" """
    layers: Sequence[LayerReport] = field(default_factory=tuple)
    params_norm: float | None = None
    peak_memory_gb: float | None = None

    def mean(self, name: str) -> float | None:
        """Mean of a layer quantity over the MoE layers that have it; None if none has."""
        values = [value for layer in self.layers if (value := getattr(layer, name)) is not None]
        return sum(values) / len(values) if values else None

    def total(self, name: str) -> float:
        """Sum of a layer quantity over the MoE layers."""
        return sum(getattr(layer, name) for layer in self.layers)

    def moe_totals(self) -> dict[str, float | None]:
        """Bytes and times over the MoE layers, and what LSH sent and lost on average; None for LSH where it did not run.

        Layers run one after the other, so their times add up and can be compared with the iteration's.
        """
        stages = [layer.lsh_time_ms for layer in self.layers if layer.lsh_time_ms]
        stage_times = {stage: sum(times[stage] for times in stages) if stages else None for stage in LSH_STAGES}
        alltoall = self.total("alltoall_time_ms")
        return {
            "alltoall_bytes": self.total("alltoall_bytes"),
            "alltoall_bytes_uncompressed": self.total("alltoall_bytes_uncompressed"),
            "alltoall_time_ms": alltoall,
            "alltoall_share": alltoall / self.iteration_time_ms,
            "wire_time_ms": self.total("wire_time_ms"),
            "experts_time_ms": self.total("experts_time_ms"),
            "lsh_time_ms": sum(sum(times.values()) for times in stages) if stages else None,
            **{f"lsh_{stage}_time_ms": time for stage, time in stage_times.items()},
            "lsh_compression_rate": self.mean("lsh_compression_rate"),
            "lsh_residual_energy": self.mean("lsh_residual_energy"),
            "lsh_restored_error": self.mean("restored_error"),
        }

    def record(self, per_layer: bool) -> dict[str, Any]:
        """The JSONL object. What does not exist in this run (no experts, no LSH) or is not finite is null."""
        record: dict[str, Any] = {
            "iteration": self.iteration,
            "consumed_samples": self.consumed_samples,
            "lm_loss": self.lm_loss,
            **{name.replace(" ", "_"): loss for name, loss in self.further_losses.items()},
            "load_balancing_loss": self.mean("load_balancing_loss"),
            "z_loss": self.mean("z_loss"),
            "grad_norm": self.grad_norm,
            "learning_rate": self.learning_rate,
            "iteration_time_ms": self.iteration_time_ms,
            "tokens_per_second": self.tokens_per_second,
            "tflops_per_gpu": self.tflops,
            "mfu": self.mfu,
            **self.moe_totals(),
            "expert_load_max_over_mean": self.mean("load_max_over_mean"),
            "skipped_iterations": self.skipped,
            "nan_iterations": self.nan,
        }
        if self.params_norm is not None:
            record["params_norm"] = self.params_norm
        if self.peak_memory_gb is not None:
            record["peak_memory_gb"] = self.peak_memory_gb
        if per_layer and self.layers:
            record["moe_layers"] = [layer.layer for layer in self.layers]
            record |= {f"{name}_per_layer": [get(layer) for layer in self.layers] for name, get in PER_LAYER.items()}
        return {key: finite(value) for key, value in record.items()}

    def scalars(self, per_layer: bool) -> dict[str, float]:
        """TensorBoard points under Megatron's tags, without those that each iteration writes (see `Reporter.step`)."""
        points: dict[str, float | None] = {
            "iteration-time": self.iteration_time_ms / 1000.0,
            "throughput": self.tflops,
            "tokens-per-second": self.tokens_per_second,
            "mfu": self.mfu,
            "params-norm": self.params_norm,
        }
        if self.layers:
            points |= {
                "load_balancing_loss": self.mean("load_balancing_loss"),
                "z_loss": self.mean("z_loss"),
                **{f"moe/{name}": value for name, value in self.moe_totals().items()},
                "moe/expert_load_max_over_mean": self.mean("load_max_over_mean"),
            }
        for layer in self.layers if per_layer else ():
            points |= {f"moe/{name}_layer_{layer.layer}": get(layer) for name, get in PER_LAYER.items()}
        return {tag: value for tag, value in points.items() if value is not None}

    def log_line(self, with_throughput: bool) -> LogLine:
        losses = {"lm loss": self.lm_loss or 0.0, **self.further_losses}
        if self.layers:
            losses |= {name: self.mean(name) or 0.0 for name in ("load_balancing_loss", "z_loss")}
        return LogLine(
            iteration=self.iteration,
            train_iters=self.train_iters,
            consumed_samples=self.consumed_samples,
            iteration_time_ms=self.iteration_time_ms,
            learning_rate=self.learning_rate,
            global_batch_size=self.global_batch_size,
            losses=losses,
            grad_norm=self.grad_norm,
            params_norm=self.params_norm,
            skipped=self.skipped,
            nan=self.nan,
            tflops=self.tflops if with_throughput else None,
        )

    def progress_line(self, seconds_left: float) -> str:
        """For people: percent, loss, speed, what LSH sends, time to go."""
        loss = "-" if self.lm_loss is None else f"{self.lm_loss:.4f}"
        parts = [
            f" {100.0 * self.iteration / max(self.train_iters, 1):5.1f}%",
            f"loss {loss}",
            f"{self.tokens_per_second:,.0f} tokens/s",
        ]
        if self.mfu is not None:
            parts.append(f"MFU {100.0 * self.mfu:.1f}%")
        rate, energy = self.mean("lsh_compression_rate"), self.mean("lsh_residual_energy")
        if rate is not None and energy is not None:
            parts.append(f"LSH sends {100.0 * rate:.1f}% of the rows, residual energy {energy:.3f}")
        parts.append(f"ETA {duration(seconds_left)}")
        return " | ".join(parts)


def finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list):
        return [finite(item) for item in value]
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return value


def duration(seconds: float) -> str:
    """``1:02:03``"""
    hours, rest = divmod(round(max(seconds, 0.0)), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
