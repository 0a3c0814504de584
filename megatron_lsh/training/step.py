"""One training iteration: accumulate gradients over micro-batches, agree that they are finite, update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from megatron_lsh.moe.schedule import decide, trials
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.data_parallel import accumulate, clip_grad_norm, finalize_gradients
from megatron_lsh.training.schedule import Schedule

Batch = Mapping[str, Any]
#: (model, batch on this rank's device) -> (mean loss of the micro-batch, auxiliary loss: this rank's share), fp32 scalars,
#: and perhaps a third: further mean losses, which are minimized too, by their name in the log (BERT's "sop loss").
ForwardStep = Callable[[nn.Module, Batch], tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Mapping[str, Tensor]]]


@dataclass(frozen=True)
class StepResult:
    """What one iteration found; the same on every rank."""

    loss: float
    """lm loss: mean over micro-batches and data-parallel ranks"""
    grad_norm: float
    """global norm before clipping"""
    skipped: bool
    """the loss or a gradient was not finite somewhere, and no rank changed anything"""
    stop: bool
    """some rank asked to stop at this iteration's end"""
    further: Mapping[str, float] = field(default_factory=dict)
    """losses that are minimized beside the lm loss, by name; means as that is"""


@dataclass(frozen=True)
class Step:
    """The parts of an iteration that stay the same throughout a run. Call it once per iteration."""

    model: nn.Module
    optimizer: Optimizer
    schedule: Schedule
    forward_step: ForwardStep
    ctx: ParallelContext
    micro_batches: int
    global_batch_size: int
    clip_grad: float
    total_iterations: int

    def __call__(self, batches: Iterator[Batch], iteration: int, stop: bool) -> StepResult:
        """Run the iteration that follows `iteration` complete ones. Collective over the world.

        Args:
            batches: gives at least `micro_batches` micro-batches of this data-parallel rank.
            stop: whether this rank wants to end the run.
        """
        model_hook(self.model, "set_iteration", iteration, self.total_iterations)
        decision = decide(trials(self.model), self.ctx)
        if decision is not None and self.ctx.rank == self.ctx.world.size - 1:  # the rank that writes the log line
            print(f"> {decision}", flush=True)
        self.optimizer.zero_grad(set_to_none=True)
        loss, further = self._accumulate(batches)
        finalize_gradients(self.model, self.ctx)
        grad_norm = clip_grad_norm(self.model, self.clip_grad, self.ctx)
        means, finite, stop = self._agree([loss, *further.values()], grad_norm, stop)
        if finite:
            self.optimizer.step()
            model_hook(self.model, "update_expert_bias")
            self.schedule.step(self.global_batch_size)
        else:
            model_hook(self.model, "discard_expert_load")
        self.optimizer.zero_grad(set_to_none=True)
        named = dict(zip(further, means[1:], strict=True))
        return StepResult(means[0], float(grad_norm), skipped=not finite, stop=stop, further=named)

    def _accumulate(self, batches: Iterator[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward and backward of all micro-batches; gradients are reduced in the last one.

        Returns this rank's loss, and its further losses by name.
        """
        total = torch.zeros((), dtype=torch.float32, device=self.ctx.device)
        further: dict[str, Tensor] = {}
        for index in range(self.micro_batches):
            accumulate(self.model, last=index == self.micro_batches - 1)
            found = self.forward_step(self.model, to_device(next(batches), self.ctx.device))
            loss, aux_loss, named = found if len(found) == 3 else (*found, {})
            (sum(named.values(), loss + aux_loss) / self.micro_batches).backward()
            total += loss.detach()
            for name, value in named.items():
                further[name] = further.get(name, 0.0) + value.detach() / self.micro_batches
        return total / self.micro_batches, further

    def _agree(self, losses: list[Tensor], grad_norm: Tensor, stop: bool) -> tuple[list[float], bool, bool]:
        """(mean losses, whether they and the gradient norm are finite on all ranks, whether any rank wants to stop).

        One all-reduce. Ranks decide by counts of flags, which are exact, so they cannot disagree.
        """
        found = torch.stack([loss.double() for loss in losses])
        bad = ~(torch.isfinite(found).all() & torch.isfinite(grad_norm))
        values = torch.cat([found, bad.double()[None], torch.tensor([float(stop)], dtype=torch.float64).to(bad.device)])
        if self.ctx.world.size > 1:
            dist.all_reduce(values, group=self.ctx.world.process_group)
        *sums, bad_ranks, stop_ranks = values.tolist()
        return [total / self.ctx.world.size for total in sums], bad_ranks == 0, stop_ranks > 0


def model_hook(model: nn.Module, name: str, *arguments: Any) -> None:
    """Call ``model.name(*arguments)`` if the model has such a method (models with experts do)."""
    method = getattr(model, name, None)
    if method is not None:
        method(*arguments)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`; other entries pass."""
    if device.type == "cpu":
        return batch
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for name, value in batch.items()
    }


