"""Which way of dispatching a layer takes now: the one owner of that question.

A layer has named alternatives. ``exact`` sends every row, in the wire's numbers; ``lossless`` sends every row as it is, as
an exported model computes it; a further one approximates. The first line that applies decides:

    an exact evaluation or generation           lossless         exact_dispatch()
    warm-up, final iterations, early layers     exact            --lsh-warmup-iters, --lsh-anneal-iters, --lsh-start-layer
    --moe-token-dispatcher-type auto            the fastest      Trial, measured on the machine that the run is on
    otherwise                                   the one that --moe-token-dispatcher-type names

The trial: after the warm-up each layer runs its alternatives in turn, one per iteration. A layer's time is what lies
between its tokens and their outputs, forward and backward. Then all ranks exchange their medians, and each layer keeps the
fastest; one that approximates must be faster than the exact ones by :data:`MARGIN`, because it costs loss. The decision
holds for the rest of the run. It is saved in checkpoints and taken over on resume, so a resumed run computes what the
uninterrupted one would; under another layout it is measured again.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_lsh.config.moe import LSHConfig
from megatron_lsh.moe.dispatcher import Dispatcher, gradient_shortcut
from megatron_lsh.moe.experts import Experts
from megatron_lsh.moe.gauges import Gauge
from megatron_lsh.moe.layer_pass import LayerPass, Span, measure
from megatron_lsh.moe.router import Routing
from megatron_lsh.parallel.context import ParallelContext

#: What approximates must save at least this share of a layer's time.
MARGIN = 0.05
#: Iterations of each kind that are run first and not measured: allocations, first calls.
SETTLE = 2

EXACT, LOSSLESS, DEDUPLICATED = "exact", "lossless", "deduplicated"


@dataclass(frozen=True)
class Decision:
    """What one layer does from now on, and why. Times are medians per iteration, averaged over the ranks."""

    choice: str
    ms: Mapping[str, float]

    def __str__(self) -> str:
        return f"{self.choice} ({', '.join(f'{name} {ms:.1f} ms' for name, ms in self.ms.items())})"

    @staticmethod
    def load(saved: Mapping[str, Any]) -> Decision:
        """From a checkpoint. Until 0.1 there were two alternatives: {"lsh": bool, "exact_ms": ..., "lsh_ms": ...}."""
        if "choice" in saved:
            return Decision(str(saved["choice"]), {str(k): float(v) for k, v in saved["ms"].items()})
        return Decision("lsh" if saved["lsh"] else EXACT, {EXACT: saved["exact_ms"], "lsh": saved["lsh_ms"]})


@dataclass
class Trial:
    """The measurement of one layer. Which iterations run how is a function of their number, so all ranks agree.

    Attributes:
        layer: number of the layer in the model.
        names: the alternatives, ``exact`` first.
        iterations: measured iterations of each.
        device: where the layer runs.
        decision: None while measuring.
    """

    layer: int
    names: tuple[str, ...]
    iterations: int
    device: torch.device
    decision: Decision | None = None
    _first: int | None = None
    _now: int = -1
    _paused: bool = False
    _spans: list[Span] = field(default_factory=list)
    _ms: dict[str, list[float]] = field(default_factory=dict)

    @property
    def current(self) -> str:
        """What the current iteration runs unless a schedule makes it exact."""
        if self.decision is not None:
            return self.decision.choice
        return self.names[0 if self._first is None else (self._now - self._first) % len(self.names)]

    @property
    def measures(self) -> bool:
        """Whether the current iteration is measured."""
        return self.decision is None and self._first is not None and not self._paused

    def begin(self, iteration: int, paused: bool) -> None:
        """Iteration `iteration` begins; ``paused``: the schedules make it exact, do not measure. Calling it again for the
        same iteration does nothing."""
        if self.decision is not None or iteration == self._now:
            return
        self._close()
        self._now, self._paused = iteration, paused
        if self._first is None and not paused:
            self._first = iteration

    def add(self, span: Span) -> None:
        """Count a part of the current iteration's time."""
        self._spans.append(span)

    def due(self) -> bool:
        """Whether everything is measured and nothing decided."""
        return self.decision is None and all(len(self._ms.get(name, ())) >= self.iterations for name in self.names)

    def medians(self) -> list[float]:
        """ms per iteration of each alternative on this rank."""
        return [statistics.median(self._ms[name]) for name in self.names]

    def _close(self) -> None:
        """Book the spans of the iteration that ended."""
        if self._spans and self._first is not None and self._now - self._first >= len(self.names) * SETTLE:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._ms.setdefault(self.current, []).append(sum(span.milliseconds() for span in self._spans))
        self._spans.clear()


class Scheduled(nn.Module):
    """A dispatcher that is one of several, by schedule.

    Attributes:
        alternatives: by name; ``exact`` and ``lossless`` are among them.
        gauges: of all of them.
        trial: decides between some of them; None where a name on the command line does.
    """

    def __init__(
        self,
        alternatives: Mapping[str, Dispatcher],
        chosen: str,
        cfg: LSHConfig,
        layer: int,
        trial: Trial | None = None,
        *,
        shortcut: bool = False,
    ) -> None:
        """
        Args:
            chosen: the alternative that the schedules below leave alone.
            shortcut: whichever runs, with ``gradient_shortcut``.
            cfg: ``lsh_warmup_iters``, ``lsh_anneal_iters`` and ``lsh_start_layer`` are read.
            layer: number of the layer in the model.
        """
        super().__init__()
        self.alternatives = dict(alternatives)
        for name, alternative in alternatives.items():
            if isinstance(alternative, nn.Module):
                self.add_module(name, alternative)
        self.trial = trial
        self._chosen, self._cfg, self._layer, self._shortcut = chosen, cfg, layer, shortcut
        self._held: str | None = None
        self._scheduled_exact = self._exact_at(0, None)
        found = {g.name: g for alternative in alternatives.values() for g in getattr(alternative, "gauges", ())}
        self.gauges: tuple[Gauge, ...] = tuple(found.values())

    @property
    def current(self) -> str:
        """The name of the alternative that runs now."""
        if self._held is not None:
            return self._held
        if self._scheduled_exact:
            return EXACT
        return self._chosen if self.trial is None else self.trial.current

    def set_iteration(self, iteration: int, total: int | None = None) -> None:
        """Tell the schedules how many iterations are complete, and how many there will be; called before each one."""
        self._scheduled_exact = self._exact_at(iteration, total)
        if self.trial is not None:
            self.trial.begin(iteration, paused=self._scheduled_exact)
        for alternative in self.alternatives.values():
            for part in alternative.modules() if isinstance(alternative, nn.Module) else (alternative,):
                listens = getattr(part, "set_iteration", None)
                if callable(listens):
                    listens(iteration, total)

    def forward(self, x_TD: Tensor, routing: Routing, experts: Experts, p: LayerPass) -> Tensor:
        dispatch = self.alternatives[self.current]
        trial = self.trial
        if trial is not None and self.training and trial.measures:
            y_TD = measure(trial.device, trial.add, dispatch, x_TD, routing, experts, p)
        else:
            y_TD = dispatch(x_TD, routing, experts, p)
        return gradient_shortcut(y_TD, x_TD, routing) if self._shortcut else y_TD

    @contextmanager
    def held(self, name: str) -> Iterator[None]:
        """Within this context the alternative ``name`` runs, whatever the schedules say."""
        before, self._held = self._held, name
        try:
            yield
        finally:
            self._held = before

    def _exact_at(self, iteration: int, total: int | None) -> bool:
        cfg = self._cfg
        annealing = total is not None and iteration >= total - cfg.lsh_anneal_iters
        return iteration < cfg.lsh_warmup_iters or annealing or self._layer < cfg.lsh_start_layer


@contextmanager
def exact_dispatch(model: nn.Module) -> Iterator[None]:
    """Within this context every MoE layer of ``model`` runs as an exported model does: every row travels, in the numbers
    it has (generation, exact evaluation)."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, Scheduled):
                stack.enter_context(module.held(LOSSLESS))
        yield


def trials(model: nn.Module) -> list[Trial]:
    """The trials of all layers that choose their dispatcher; empty without ``--moe-token-dispatcher-type auto``."""
    return [module.trial for module in model.modules() if isinstance(module, Scheduled) and module.trial is not None]


def decide(waiting: Sequence[Trial], ctx: ParallelContext) -> str | None:
    """Decide for all layers of a pipeline stage at once if their measurements are complete; then collective over it.

    Returns:
        The decision in words, or None if there was nothing to decide.
    """
    due = [trial for trial in waiting if trial.due()]
    if not due:
        return None
    # Everyone averages the same numbers in the same order, so nobody can come to another decision.
    mine = torch.tensor([ms for trial in due for ms in trial.medians()], dtype=torch.float64, device=ctx.device)
    gathered = [mine]
    if ctx.stage.size > 1:
        gathered = [torch.empty_like(mine) for _ in range(ctx.stage.size)]
        dist.all_gather(gathered, mine, group=ctx.stage.process_group)
    means = iter(torch.stack(gathered).mean(0).tolist())
    for trial in due:
        ms = {name: next(means) for name in trial.names}
        all_rows = [name for name in trial.names if name in (EXACT, DEDUPLICATED)]
        exact = min(all_rows, key=ms.__getitem__)
        faster = [name for name in trial.names if name not in all_rows and ms[name] < (1.0 - MARGIN) * ms[exact]]
        trial.decision = Decision(min(faster, key=ms.__getitem__, default=exact), ms)
    return describe(due)


def describe(decided: Sequence[Trial]) -> str:
    """One line: what each layer does and what it took either way."""
    chosen = sum(trial.decision is not None and "lsh" in trial.decision.choice for trial in decided)
    layers = "; ".join(f"layer {trial.layer}: {trial.decision}" for trial in decided)
    return (
        f"auto dispatcher: LSH in {chosen} of {len(decided)} MoE layers, where it saves at least {MARGIN:.0%} of the time "
        f"from tokens to outputs, forward and backward, per iteration: {layers}"
    )


def save_decisions(model: nn.Module) -> dict[str, Any]:
    """Plain JSON for a checkpoint: layer -> decision. Empty before the decision."""
    decided = [(trial.layer, trial.decision) for trial in trials(model) if trial.decision is not None]
    return {str(layer): {"choice": decision.choice, "ms": dict(decision.ms)} for layer, decision in decided}


def restore_decisions(model: nn.Module, saved: dict[str, Any]) -> str | None:
    """Take over what :func:`save_decisions` returned; says so, or returns None if that is nothing."""
    taken = []
    for trial in trials(model):
        decision = Decision.load(saved[str(trial.layer)]) if str(trial.layer) in saved else None
        if decision is not None and decision.choice in trial.names:
            trial.decision = decision
            taken.append(trial)
    return f"{describe(taken)} (measured before the checkpoint)" if taken else None
