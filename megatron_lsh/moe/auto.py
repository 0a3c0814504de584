"""``--moe-token-dispatcher-type auto``: compress where it saves time, measured on the machine the run is on.

After the LSH warm-up each layer runs exact and compressed iterations in turn. A layer's time is what lies between its rows
and their outputs, forward and backward: hashing, clustering, all-to-alls, the experts and the restoration. Then all ranks
exchange their medians, and each layer keeps LSH if that is faster by :data:`MARGIN`, because compression costs loss.

The decision holds for the rest of the run. It is saved in checkpoints and taken over on resume, so a resumed run
computes what the uninterrupted one would; under another layout it is measured again.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_lsh.moe.timing import Region, Span, timed_region
from megatron_lsh.parallel.context import ParallelContext

#: LSH must save at least this share of a layer's time.
MARGIN = 0.05
#: Iterations of each kind that are run first and not measured: allocations, first calls.
SETTLE = 2


@dataclass(frozen=True)
class Decision:
    """What one layer does from now on, and why. Times are medians per iteration, averaged over the ranks."""

    lsh: bool
    exact_ms: float
    lsh_ms: float

    def __str__(self) -> str:
        return f"{'lsh' if self.lsh else 'exact'} (exact {self.exact_ms:.1f} ms, lsh {self.lsh_ms:.1f} ms)"


@dataclass
class Trial:
    """The measurement of one layer. Which iterations run how is a function of their number, so all ranks agree.

    Attributes:
        layer: number of the layer in the model.
        iterations: measured iterations of each kind.
        device: where the layer runs.
        decision: None while measuring.
    """

    layer: int
    iterations: int
    device: torch.device
    decision: Decision | None = None
    _first: int | None = None
    _now: int = -1
    _paused: bool = False
    _spans: list[Span] = field(default_factory=list)
    _exact_ms: list[float] = field(default_factory=list)
    _lsh_ms: list[float] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Whether the current iteration runs exactly, as far as this trial has a say."""
        if self.decision is not None:
            return not self.decision.lsh
        return self._first is None or (self._now - self._first) % 2 == 0

    def begin(self, iteration: int, paused: bool) -> None:
        """Iteration `iteration` begins (or is looked at again); `paused`: the schedules make it exact, do not measure."""
        if self.decision is not None or iteration == self._now:
            return
        self._close()
        self._now, self._paused = iteration, paused
        if self._first is None and not paused:
            self._first = iteration

    def timed(self) -> AbstractContextManager[Region]:
        """Context manager like :func:`megatron_lsh.moe.timing.timed_region` around the layer's work."""
        return timed_region(self.device, self._spans.append if self._measures() else _ignore)

    def due(self) -> bool:
        """Whether everything is measured and nothing decided."""
        return self.decision is None and min(len(self._exact_ms), len(self._lsh_ms)) >= self.iterations

    def medians(self) -> list[float]:
        """[exact, LSH] ms per iteration on this rank."""
        return [statistics.median(self._exact_ms), statistics.median(self._lsh_ms)]

    def _measures(self) -> bool:
        return self.decision is None and self._first is not None and not self._paused

    def _close(self) -> None:
        """Book the spans of the iteration that ended."""
        if self._spans and self._first is not None and self._now - self._first >= 2 * SETTLE:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            total = sum(span.milliseconds() for span in self._spans)
            (self._exact_ms if self.exact else self._lsh_ms).append(total)
        self._spans.clear()


def _ignore(span: Span) -> None:
    pass


def trials(model: nn.Module) -> list[Trial]:
    """Of the layers that choose by themselves; empty without ``--moe-token-dispatcher-type auto``."""
    return [trial for module in model.modules() if isinstance(trial := getattr(module, "trial", None), Trial)]


def decide(waiting: Sequence[Trial], ctx: ParallelContext) -> str | None:
    """Decide for all layers at once if their measurements are complete. Collective over the world when they are.

    Returns:
        The decision in words, or None if there was nothing to decide.
    """
    due = [trial for trial in waiting if trial.due()]
    if not due:
        return None
    mine_L2 = torch.tensor([trial.medians() for trial in due], dtype=torch.float64, device=ctx.device)
    gathered = mine_L2.new_empty(ctx.world.size * len(due), 2)
    if ctx.world.size > 1:
        # Everyone averages the same numbers in the same order, so nobody can come to another decision.
        dist.all_gather_into_tensor(gathered, mine_L2, group=ctx.world.process_group)
    else:
        gathered = mine_L2
    for trial, (exact, lsh) in zip(due, gathered.view(-1, len(due), 2).mean(0).tolist(), strict=True):
        trial.decision = Decision(lsh < (1.0 - MARGIN) * exact, exact, lsh)
    return describe(due)


def describe(decided: Sequence[Trial]) -> str:
    """One line: what each layer does and what it took either way."""
    chosen = sum(trial.decision is not None and trial.decision.lsh for trial in decided)
    layers = "; ".join(f"layer {trial.layer}: {trial.decision}" for trial in decided)
    return (
        f"auto dispatcher: LSH in {chosen} of {len(decided)} MoE layers, where it saves at least {MARGIN:.0%} of the time "
        f"from rows to outputs, forward and backward, per iteration: {layers}"
    )


def save_decisions(model: nn.Module) -> dict[str, Any]:
    """Plain JSON for a checkpoint: layer -> decision. Empty before the decision."""
    return {str(trial.layer): asdict(trial.decision) for trial in trials(model) if trial.decision is not None}


def restore_decisions(model: nn.Module, saved: dict[str, Any]) -> str | None:
    """Take over what :func:`save_decisions` returned; says so, or returns None if that is nothing."""
    taken = []
    for trial in trials(model):
        if str(trial.layer) in saved:
            trial.decision = Decision(**saved[str(trial.layer)])
            taken.append(trial)
    return f"{describe(taken)} (measured before the checkpoint)" if taken else None
