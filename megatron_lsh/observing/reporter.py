"""Writes what happens during training: log line, progress, JSONL, TensorBoard and others. One rank writes, all take part."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from megatron_lsh.config.logging import LoggingConfig
from megatron_lsh.config.moe import LSHConfig
from megatron_lsh.moe.telemetry import LayerReport
from megatron_lsh.observing.log_line import accuracy_line, evaluation_line, figures_text, perplexity
from megatron_lsh.observing.metrics import IntervalMetrics, finite
from megatron_lsh.observing.restored_error import RestoredErrors
from megatron_lsh.observing.state import StepResult, TrainState
from megatron_lsh.observing.summary import Payload
from megatron_lsh.observing.trackers import RunFacts, Writer, open_writers
from megatron_lsh.observing.writers import JsonlFile
from megatron_lsh.parallel.collectives import all_reduce_
from megatron_lsh.parallel.context import ParallelContext


@dataclass(frozen=True)
class RunFigures:
    """Constants of a run that turn times into speeds."""

    train_iters: int
    global_batch_size: int
    tokens_per_iteration: int
    flops_per_iteration: float
    """model FLOPs over all ranks, forward and backward"""
    peak_flops: float | None
    """of one rank's device"""
    experts_share: float = 0.0
    """of the FLOPs: what the routed experts do"""
    counts_images: bool = False
    """whether a sample is a picture, and speed is told in those"""


class Stopwatch:
    """Time spent training since the last lap; evaluation and saving are taken out."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self._excluded = 0.0

    def lap(self) -> float:
        now = time.perf_counter()
        elapsed = now - self._begun - self._excluded
        self._begun, self._excluded = now, 0.0
        return elapsed

    @contextmanager
    def paused(self) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self._excluded += time.perf_counter() - begun


class Reporter:
    """The last rank writes, as in Megatron; the others only keep the totals for the closing report."""

    def __init__(
        self,
        cfg: LoggingConfig,
        ctx: ParallelContext,
        figures: RunFigures,
        per_layer: bool = False,
        lsh: LSHConfig | None = None,
    ) -> None:
        """`per_layer`: --moe-per-layer-logging. `lsh`: settings of its probe. Nothing is opened before `open`."""
        self.cfg = cfg
        self.ctx = ctx
        self.figures = figures
        self.per_layer = per_layer
        self.writes = ctx.rank == ctx.world.size - 1
        self.watch = Stopwatch()
        self.restored_errors = RestoredErrors(lsh or LSHConfig())
        self.payload = Payload()
        """over the intervals of this process, for the closing report"""
        self.validation: list[tuple[int, float]] = []
        """(iteration, loss) of this process's first and last evaluation: memory must not grow with the length of a run"""
        self.outcomes: dict[str, dict[str, float]] = {}
        """figures of the last evaluation of each set, where they are more than a loss"""
        self._first_iteration = 0
        self._started = time.perf_counter()
        self._jsonl: JsonlFile | None = None
        self._writers: list[Writer] = []

    def open(
        self,
        iteration: int,
        settings: Mapping[str, Any] = MappingProxyType({}),
        save: str | None = None,
        *,
        trains: bool = True,
    ) -> None:
        """Prepare the outputs for a run that continues after `iteration` (0: a fresh one).

        `settings` and `save` are what writers may want to know: every setting, and the --save folder. One that only
        evaluates (not `trains`) leaves everything that the training wrote.

        Raises:
            ConfigError: a file cannot be written; on the writing rank only.
        """
        self._first_iteration = iteration
        self._started = time.perf_counter()
        if not self.writes:
            return
        self._writers = open_writers(RunFacts(self.cfg, iteration, save, settings, self.print, trains))
        if self.cfg.metrics_jsonl is not None:
            self._jsonl = JsonlFile(self.cfg.metrics_jsonl, iteration if trains else None, self.print)
            if self._jsonl.notice:
                self.print(f"> {self._jsonl.notice}")

    def print(self, text: str) -> None:
        if self.writes:
            print(text, flush=True)

    def print_of_stage(self, text: str) -> None:
        """For what each pipeline stage has to say of its own layers: its last rank prints."""
        if self.ctx.rank == self.ctx.stage.ranks[-1]:
            print(text, flush=True)

    def step(self, state: TrainState, result: StepResult, learning_rate: float) -> None:
        """After every iteration: the points that cost nothing to know."""
        if not self._writers or state.iteration % self.cfg.tensorboard_log_interval:
            return
        points = {
            "loss-scale": result.loss_scale,
            "learning-rate": learning_rate,
            "batch-size": self.figures.global_batch_size,
        }
        if not result.skipped:
            points |= {"lm loss": result.loss, **result.further, "grad-norm": result.grad_norm}
        self._points(state.iteration, points)

    def interval(
        self,
        state: TrainState,
        result: StepResult,
        learning_rate: float,
        iterations: int,
        layers: Sequence[LayerReport],
        params_norm: float | None,
        waited_ms: float | None = None,
    ) -> None:
        """At the end of a log interval: write everything about its `iterations` iterations. Collective over the world.

        `waited_ms`: per iteration, what this rank spent in all-to-alls, where it waits for slower ranks; None without any.
        `iterations` counts those of this process only; the loss mean is over those of `state`, which a resume keeps.
        """
        figures, seconds = self.figures, self.watch.lap() / max(iterations, 1)
        tflops = figures.flops_per_iteration / seconds / self.ctx.world.size / 1e12
        memory, slowest, share = self._ranks(1000.0 * seconds, waited_ms)
        metrics = IntervalMetrics(
            iteration=state.iteration,
            iterations=iterations,
            train_iters=figures.train_iters,
            consumed_samples=state.consumed_samples,
            global_batch_size=figures.global_batch_size,
            lm_loss=state.interval_loss / state.interval_steps if state.interval_steps else None,
            further_losses={name: loss / state.interval_steps for name, loss in state.interval_further.items()},
            grad_norm=result.grad_norm,
            loss_scale=result.loss_scale,
            learning_rate=learning_rate,
            iteration_time_ms=1000.0 * seconds,
            tokens_per_second=figures.tokens_per_iteration / seconds,
            images_per_second=figures.global_batch_size / seconds if figures.counts_images else None,
            tflops=tflops,
            mfu=tflops * 1e12 / figures.peak_flops if figures.peak_flops else None,
            experts_share=figures.experts_share,
            skipped=state.interval_skipped,
            nan=state.interval_skipped,
            layers=layers,
            params_norm=params_norm,
            peak_memory_gb=max(memory),
            peak_memory_gb_per_rank=memory,
            slowest_rank=slowest,
            slowest_rank_share=share,
        )
        self.payload.add(metrics)
        if not self.writes:
            return
        self.print(str(metrics.log_line(self.cfg.log_throughput)))
        if self.cfg.progress:
            self.print(metrics.progress_line(self._seconds_left(state.iteration)))
        warning, errors = self.restored_errors.look(layers), self.restored_errors
        if warning is not None:
            self.print(warning)
        if self._jsonl is not None:
            above = {"lsh_layers_above_probe_warn": sorted(errors.above)} if errors.watched else {}
            self._jsonl.write(metrics.record(self.per_layer) | above)
        self._points(state.iteration, metrics.scalars(self.per_layer), flush=True)

    def evaluation(self, iteration: int, name: str, losses: Mapping[str, float], *, final: bool) -> None:
        """Write the outcome of an evaluation.

        Args:
            name: "validation" or "test".
            losses: by how rows travelled, "as trained" or "exact" (or both). The first is *the* loss of the evaluation;
                the exact one is also written under its own name, ``validation_loss_exact``.
        """
        loss = next(iter(losses.values()))
        if name == "validation":
            self._note_validation(iteration, loss)
        if not self.writes:
            return
        where = f"iteration {iteration} on {name} set" if final or name != "validation" else f"iteration {iteration}"
        for dispatch, value in losses.items():
            self.print(evaluation_line(where if dispatch == "as trained" else f"{where} without compression", value))
        named = {"": loss} | ({" exact": losses["exact"]} if "exact" in losses else {})
        if self._jsonl is not None:
            keys = {f"{name}_loss{suffix.replace(' ', '_')}": finite(value) for suffix, value in named.items()}
            self._jsonl.write({"iteration": iteration, **keys})
        points = {f"lm loss {name}{suffix}": value for suffix, value in named.items()}
        if self.cfg.log_validation_ppl_to_tensorboard:
            points |= {f"{tag} ppl": perplexity(value) for tag, value in points.items()}
        self._points(iteration, points)

    def figures_of(
        self,
        name: str,
        outcomes: Mapping[str, Mapping[str, float]],
        iteration: int,
        weights: int,
        epoch: float | None,
    ) -> None:
        """Write the outcome of an evaluation that finds more than a loss.

        Args:
            name: "validation" or "test".
            outcomes: figures by how rows travelled, see `evaluation`; each has a "loss".
            iteration: where the run is.
            weights: the iteration whose weights were evaluated, and
            epoch: how often they have seen the training data; None if that is not known.
        """
        first = next(iter(outcomes.values()))
        self.outcomes[name] = dict(first)
        if name == "validation":
            self._note_validation(iteration, first["loss"])
        if not self.writes:
            return
        where = (
            f"{name} at iteration {weights}" if epoch is None else f"{name} after epoch {epoch:g} (iteration {weights})"
        )
        for dispatch, figures in outcomes.items():
            how = " without compression" if dispatch == "exact" else ""
            self.print(f" {where}{how} | {figures_text(figures)} |")
            accuracy = accuracy_line(f"{name}{how}", figures)
            if accuracy is not None:
                self.print(accuracy)
        named = {"": first} | ({" exact": outcomes["exact"]} if "exact" in outcomes else {})
        record: dict[str, Any] = {"iteration": iteration} | ({} if epoch is None else {"epoch": epoch})
        points = {}
        for suffix, figures in named.items():
            for figure, value in figures.items():
                record[f"{name}_{figure}{suffix.replace(' ', '_')}"] = finite(value)
                label = "lm loss" if figure == "loss" else figure.replace("_", " ")
                points[f"{label} {name}{suffix}"] = value
        self._points(iteration, points)
        if self._jsonl is not None:
            self._jsonl.write(record)

    def _note_validation(self, iteration: int, loss: float) -> None:
        self.validation = [*self.validation[:1], (iteration, loss)]

    def _points(self, iteration: int, values: Mapping[str, float], *, flush: bool = False) -> None:
        for writer in self._writers:
            writer.points(iteration, values, flush=flush)

    def close(self) -> None:
        if self._jsonl is not None:
            self._jsonl.close()
        for writer in self._writers:
            writer.close()

    def _ranks(self, iteration_ms: float, waited_ms: float | None) -> tuple[list[float], int | None, float | None]:
        """(peak memory in GB by rank; the rank that works longest, and by what share longer than the mean of all).

        Ranks wait for one another in the all-to-alls, so an iteration takes all of them as long; what is left without these
        is a rank's own: reading data, attention, experts, clustering. None where nobody waits in any.
        """
        mine = [_peak_memory_gb(self.ctx.device), iteration_ms - (waited_ms or 0.0)]
        ranks_W2 = torch.zeros(self.ctx.world.size, 2, dtype=torch.float64, device=self.ctx.device)
        ranks_W2[self.ctx.rank] = torch.tensor(mine, dtype=torch.float64)
        memory, own = all_reduce_(ranks_W2, self.ctx.world).T.tolist()
        if waited_ms is None:
            return memory, None, None
        mean = sum(own) / len(own)
        return memory, own.index(max(own)), max(own) / mean - 1.0 if mean > 0 else None

    def _seconds_left(self, iteration: int) -> float:
        """From the mean over this process, with evaluations and saves."""
        done = iteration - self._first_iteration
        return (time.perf_counter() - self._started) / max(done, 1) * (self.figures.train_iters - iteration)


def _peak_memory_gb(device: torch.device) -> float:
    """Since the process began: what torch allocated on the GPU; on a CPU, what the process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
