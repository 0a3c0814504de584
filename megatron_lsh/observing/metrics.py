"""The figures of one log interval, and how each output names them: JSONL keys, TensorBoard tags, the progress line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_lsh.moe.gauges import Gauge
from megatron_lsh.moe.layer import GAUGES
from megatron_lsh.moe.telemetry import LayerReport
from megatron_lsh.observing.log_line import LogLine


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
    experts_share: float = 0.0
    """of the model's FLOPs: what the routed experts do where all rows are sent"""
    skipped: int = 0
    nan: int = 0
    loss_scale: float = 1.0
    """of the last iteration"""
    further_losses: Mapping[str, float] = field(default_factory=dict)
    """what is minimized beside lm_loss, by its name in the log, such as "sop loss" """
    layers: Sequence[LayerReport] = field(default_factory=tuple)
    images_per_second: float | None = None
    """None where samples are no pictures"""
    params_norm: float | None = None
    peak_memory_gb: float | None = None
    """of the fullest rank, since its process began: on a GPU allocated by torch, on a CPU held by the process"""
    peak_memory_gb_per_rank: Sequence[float] = ()
    slowest_rank: int | None = None
    """the rank whose own work took longest, all-to-alls left out; None where there are none"""
    slowest_rank_share: float | None = None
    """by what share longer than the mean of all ranks"""

    def moe_figures(self) -> dict[str, float | None]:
        """What the gauges of the MoE layers say of the whole model; None where nobody measured it.

        Layers run one after the other, so their times add up and can be compared with the iteration's.
        """
        found: dict[str, float | None] = {}
        for gauge in self._gauges():
            if gauge.layers is not None:
                values = [value for layer in self.layers if (value := layer[gauge.name]) is not None]
                nothing = None if gauge.optional or gauge.layers == "mean" else 0.0
                total = sum(values) / (len(values) if gauge.layers == "mean" else 1) if values else nothing
                found[gauge.model_name or gauge.name] = total
        found["alltoall_share"] = (found["alltoall_time_ms"] or 0.0) / self.iteration_time_ms
        return found

    def mfu_done(self) -> float | None:
        """MFU of the arithmetic that was done: the experts' less the rows that were not sent to them. (What clustering and
        restoring rows takes is overhead, and not in it.) None where all of it was done, or the peak is unknown."""
        names = ("expert_rows_rate", "lsh_compression_rate")
        sent = [next((r for n in names if (r := layer.figures.get(n)) is not None), None) for layer in self.layers]
        if self.mfu is None or not self.experts_share or all(rate is None for rate in sent):
            return None
        spared = sum(1.0 - rate for rate in sent if rate is not None) / len(sent)
        return self.mfu * (1.0 - self.experts_share * spared)

    def _gauges(self) -> Iterable[Gauge]:
        """A model without experts has the figures of one with them, and nothing to say of them."""
        return self.layers[0].gauges.values() if self.layers else GAUGES

    def record(self, per_layer: bool) -> dict[str, Any]:
        """The JSONL object. What does not exist in this run (no experts, no LSH) or is not finite is null."""
        record: dict[str, Any] = {
            "iteration": self.iteration,
            "consumed_samples": self.consumed_samples,
            "lm_loss": self.lm_loss,
            **{name.replace(" ", "_"): loss for name, loss in self.further_losses.items()},
            "grad_norm": self.grad_norm,
            "loss_scale": self.loss_scale,
            "learning_rate": self.learning_rate,
            "iteration_time_ms": self.iteration_time_ms,
            "tokens_per_second": self.tokens_per_second,
            "tflops_per_gpu": self.tflops,
            "mfu": self.mfu,
            "mfu_done": self.mfu_done(),
            **self.moe_figures(),
            "skipped_iterations": self.skipped,
            "nan_iterations": self.nan,
        }
        if self.images_per_second is not None:
            record["images_per_second"] = self.images_per_second
        if self.params_norm is not None:
            record["params_norm"] = self.params_norm
        if self.peak_memory_gb is not None:
            record["peak_memory_gb"] = self.peak_memory_gb
            record["peak_memory_gb_per_rank"] = list(self.peak_memory_gb_per_rank)
        if self.slowest_rank is not None:
            record["slowest_rank"] = self.slowest_rank
            record["slowest_rank_share"] = self.slowest_rank_share
        if per_layer and self.layers:
            record["moe_layers"] = [layer.layer for layer in self.layers]
            record |= {f"{g.name}_per_layer": [layer[g.name] for layer in self.layers] for g in self._gauges()}
        return {key: finite(value) for key, value in record.items()}

    def scalars(self, per_layer: bool) -> dict[str, float]:
        """TensorBoard points under Megatron's tags, without those that each iteration writes (see `Reporter.step`)."""
        points: dict[str, float | None] = {
            "iteration-time": self.iteration_time_ms / 1000.0,
            "throughput": self.tflops,
            "tokens-per-second": self.tokens_per_second,
            "images-per-second": self.images_per_second,
            "mfu": self.mfu,
            "params-norm": self.params_norm,
            "peak-memory-gb": self.peak_memory_gb,
            "slowest-rank-share": self.slowest_rank_share,
        }
        if self.layers:
            # Megatron's own tags, and ours apart from them.
            points |= {
                name if name in ("load_balancing_loss", "z_loss") else f"moe/{name}": value
                for name, value in self.moe_figures().items()
            }
        for layer in self.layers if per_layer else ():
            points |= {f"moe/{name}_layer_{layer.layer}": value for name, value in layer.figures.items()}
        return {tag: value for tag, value in points.items() if value is not None}

    def log_line(self, with_throughput: bool) -> LogLine:
        losses = {"lm loss": self.lm_loss or 0.0, **self.further_losses}
        if self.layers:
            found = self.moe_figures()
            losses |= {name: found[name] or 0.0 for name in ("load_balancing_loss", "z_loss")}
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
            loss_scale=self.loss_scale,
            tflops=self.tflops if with_throughput else None,
        )

    def progress_line(self, seconds_left: float) -> str:
        """For people: percent, loss, speed, what LSH sends, time to go."""
        loss = "-" if self.lm_loss is None else f"{self.lm_loss:.4f}"
        parts = [
            f" {100.0 * self.iteration / max(self.train_iters, 1):5.1f}%",
            f"loss {loss}",
            f"{self.tokens_per_second:,.0f} tokens/s"
            if self.images_per_second is None
            else f"{self.images_per_second:,.1f} images/s",
        ]
        if self.mfu is not None:
            done = self.mfu_done()
            parts.append(
                f"MFU {100.0 * self.mfu:.1f}%"
                if done is None
                else f"MFU {100.0 * done:.1f}% (an exact model at this speed: {100.0 * self.mfu:.1f}%)"
            )
        found = self.moe_figures()
        rate, energy = found["lsh_compression_rate"], found["lsh_residual_energy"]
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
