"""One training iteration: accumulate gradients over micro-batches, agree that they are finite, update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer

from megatron_lsh.families import Batch, Losses
from megatron_lsh.families.losses import MAIN, mean_of
from megatron_lsh.models.model import Model
from megatron_lsh.moe.rates import LayerRates
from megatron_lsh.moe.schedule import decide, trials
from megatron_lsh.observing.state import StepResult
from megatron_lsh.parallel.collectives import all_reduce_
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.data_parallel import clip_grad_norm, finalize_gradients, sum_tied_gradients
from megatron_lsh.training.loss_scale import LossScale
from megatron_lsh.training.pipeline import ForwardStep, Pipeline
from megatron_lsh.training.schedule import Schedule


def _say_nothing(line: str) -> None:
    pass


@dataclass(frozen=True)
class Step:
    """The parts of an iteration that stay the same throughout a run. Call it once per iteration."""

    model: Model
    optimizer: Optimizer
    schedule: Schedule
    forward_step: ForwardStep
    pipeline: Pipeline
    ctx: ParallelContext
    micro_batches: int
    global_batch_size: int
    clip_grad: float
    total_iterations: int
    loss_tokens: Callable[[Batch], int] | None = None
    """how many tokens of a micro-batch have a loss, if all of the global batch shall have the same weight in the gradient
    (--calculate-per-token-loss); None gives every micro-batch the same weight"""
    loss_scale: LossScale = field(default_factory=LossScale)
    """multiplies the loss for the backward pass, so that gradients in fp16 stand"""
    rates: LayerRates | None = None
    """moves the rates of LSH by the residual energy (--lsh-target-energy)"""
    tell: Callable[[str], None] = _say_nothing
    """writes a line to the log; called on every rank"""

    def __call__(self, batches: Iterator[Batch], iteration: int, stop: bool) -> StepResult:
        """Run the iteration that follows `iteration` complete ones. Collective over the world.

        Args:
            batches: gives at least `micro_batches` micro-batches of this data-parallel rank.
            stop: whether this rank wants to end the run.
        """
        self.model.set_iteration(iteration, self.total_iterations)
        decision = decide(trials(self.model), self.ctx)
        if decision is not None:
            self.tell(f"> {decision}")
        self.optimizer.zero_grad(set_to_none=True)
        sums = self._accumulate(batches)
        scale = self.loss_scale.value
        sum_tied_gradients(self.model.tied_parameters(), self.ctx)
        finalize_gradients(self.model, self.ctx, scale)
        grad_norm = clip_grad_norm(self.model, self.clip_grad, self.ctx)
        means, bad_loss, bad_gradient, stop, energies = self._agree(sums, grad_norm, stop)
        finite = not (bad_loss or bad_gradient)
        overflow = bad_gradient and not bad_loss and self.loss_scale.can_fall
        self.loss_scale.update(not finite)
        if finite:
            self.optimizer.step()
            self.model.update_expert_bias()
            self.schedule.step(self.global_batch_size)
            if self.rates is not None:
                self.rates.move(energies, iteration + 1)
        else:
            self.model.discard_expert_load()
        self.optimizer.zero_grad(set_to_none=True)
        loss = means.pop(MAIN)
        return StepResult(
            loss, float(grad_norm), skipped=not finite, stop=stop, further=means, loss_scale=scale, overflow=overflow
        )

    def _accumulate(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """Forward and backward of all micro-batches; gradients are reduced in the last one.

        Returns sum and count (fp64 [2]) of this rank's losses, by name.
        """
        weight = None
        if self.loss_tokens is not None:
            ahead = [next(batches) for _ in range(self.micro_batches)]
            weight, batches = self._token_weight(sum(map(self.loss_tokens, ahead))), iter(ahead)

        def objective(losses: Losses) -> Tensor:
            value = losses.objective(self.micro_batches, weight)
            return value if self.loss_scale.value == 1.0 else value * self.loss_scale.value

        return self.pipeline.train(batches, self.micro_batches, self.forward_step, objective)

    def _token_weight(self, tokens: int) -> float:
        """Data-parallel ranks per loss token of the global batch, of which this rank has `tokens`. Collective over DP."""
        total = torch.tensor(float(tokens), dtype=torch.float64, device=self.ctx.device)
        return self.ctx.dp.size / max(float(all_reduce_(total, self.ctx.dp)), 1.0)

    def _agree(
        self, sums: Mapping[str, Tensor], grad_norm: Tensor, stop: bool
    ) -> tuple[dict[str, float], bool, bool, bool, list[float]]:
        """(mean losses by name; whether on any rank a loss is not finite, the gradient norm is not, someone wants to stop;
        the sums of what the ranks have seen of LSH's energies).

        One all-reduce. Ranks decide by counts of flags, which are exact, so they cannot disagree.
        """
        found = torch.cat(list(sums.values()))
        flags = torch.stack([~torch.isfinite(found).all(), ~torch.isfinite(grad_norm)]).double()
        told = torch.tensor([float(stop)], dtype=torch.float64).to(flags.device)
        seen = found.new_zeros(0) if self.rates is None else self.rates.seen(found.device)
        values = all_reduce_(torch.cat([found, flags, told, seen]), self.ctx.world).tolist()
        pairs, energies = values[: len(found)], values[len(found) + 3 :]
        bad_losses, bad_gradients, stop_ranks = values[len(found) : len(found) + 3]
        means = {name: mean_of(pairs[2 * place : 2 * place + 2]) for place, name in enumerate(sums)}
        return means, bad_losses > 0, bad_gradients > 0, stop_ranks > 0, energies
