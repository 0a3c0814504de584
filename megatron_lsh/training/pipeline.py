"""Micro-batches through a model, or through the part of it that this pipeline stage holds.

Each micro-batch's graph ends at what a stage hands on. Backward begins at two ends of it: at the hidden states, with the
gradient that the next stage sends, and at what this stage itself minimizes: the losses on the last one, the auxiliary losses
of its routers on any. So an auxiliary loss needs no way to the last stage.

Gradients have one owner, ``fully_shard``: they are reduced in the last backward pass of an iteration, see ``accumulate``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from megatron_lsh.config.config import Config, required
from megatron_lsh.families import Batch, Losses
from megatron_lsh.models.model import Model, StagePass
from megatron_lsh.models.shape import ModelShape
from megatron_lsh.parallel.context import Group, ParallelContext
from megatron_lsh.parallel.data_parallel import accumulate, compute_dtype
from megatron_lsh.parallel.links import Inlet, Outlet
from megatron_lsh.parallel.pipeline import Action, forward_order, training_order

T = TypeVar("T")

#: (model, batch on this rank's device) -> losses of the micro-batch
ForwardStep = Callable[[Any, Batch], Losses]


class HiddenStates(NamedTuple):
    """What stages hand on: [s, B, D] of this dtype."""

    shape: tuple[int, int, int]
    dtype: torch.dtype

    @classmethod
    def of(cls, cfg: Config, ctx: ParallelContext) -> HiddenStates:
        length = required(cfg.model.seq_length) // ctx.cp.size // (ctx.tp.size if ctx.sequence_parallel else 1)
        width = ModelShape.from_config(cfg.model).hidden
        return cls((length, required(cfg.training.micro_batch_size), width), compute_dtype(cfg.precision))


class _Pass(NamedTuple):
    """A forward pass that waits for its backward pass."""

    arrived_sBD: Tensor | None
    left_sBD: Tensor | None
    objective: Tensor


class _ChunkOfModel:
    """What a family's losses call instead of a model: one chunk of it, on what arrived from the one before."""

    def __init__(self, model: Model, chunk: int, arrived_sBD: Tensor | None) -> None:
        self._model, self._stage = model, StagePass(chunk, arrived_sBD)
        self._last = model.chunks[chunk].last
        self.left_sBD: Tensor | None = None

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        results = self._model(*inputs, **options, stage=self._stage)
        if self._last:
            return results
        *results, self.left_sBD = results
        return tuple(results)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class Pipeline:
    """Runs a model's micro-batches. With one stage they go through it one after the other.

    Args:
        hidden: what stages hand on; only read where there are several.
    """

    def __init__(self, model: Model, ctx: ParallelContext, hidden: HiddenStates | None) -> None:
        self.model, self.ctx = model, ctx
        links = ctx.links

        def inlet(link: Group | None) -> Inlet | None:
            return None if link is None or hidden is None else Inlet(link, hidden.shape, hidden.dtype, ctx.device)

        self._activations_in, self._gradients_in = inlet(links.activations_in), inlet(links.gradients_in)
        self._activations_out = None if links.activations_out is None else Outlet(links.activations_out)
        self._gradients_out = None if links.gradients_out is None else Outlet(links.gradients_out)

    def train(
        self,
        batches: Iterator[Batch],
        micro_batches: int,
        forward_step: ForwardStep,
        objective: Callable[[Losses], Tensor],
    ) -> dict[str, Tensor]:
        """Forward and backward passes of all micro-batches; gradients are reduced in the last one.

        Args:
            objective: what of a micro-batch's losses is to be differentiated.

        Returns:
            Sum and count (fp64 [2]) of this rank's losses, by name; of zeros where the last chunk is elsewhere.
        """
        loaded = _Loaded(batches, len(self.model.chunks), self.ctx.device)
        waiting: dict[tuple[int, int], _Pass] = {}
        totals: dict[str, Tensor] = {}

        def forward(chunk: int, micro_batch: int) -> None:
            batch = loaded.take(chunk, micro_batch)
            losses, part, arrived_sBD = self._forward(chunk, lambda model: forward_step(model, batch))
            waiting[chunk, micro_batch] = _Pass(arrived_sBD, part, objective(losses))
            for name, sums in losses.sums_and_counts().items():
                sums = sums if self.model.chunks[chunk].last else torch.zeros_like(sums)
                totals[name] = totals[name] + sums if name in totals else sums

        self._expect(micro_batches, gradients=True)
        order = training_order(self.ctx.stages, self.ctx.pp.rank, micro_batches)
        for place, action in enumerate(order):
            if action.forward:
                forward(action.chunk, action.micro_batch)
            else:
                accumulate(self.model, last=place == len(order) - 1)
                self._backward(action, waiting.pop((action.chunk, action.micro_batch)))
        self._flush()
        return totals

    @torch.no_grad()
    def evaluate(
        self, batches: Iterable[Batch], count: Callable[[Any, Batch], T], go_on: Callable[[], bool]
    ) -> list[T]:
        """What `count` (model, micro-batch) finds of all micro-batches, where the last chunk is; elsewhere without meaning.

        Stages work at the same time on as many micro-batches as there are stages. Before these, all ranks ask `go_on`, and
        end where it is false.
        """
        found: list[T] = []
        batches = iter(batches)
        stages = self.ctx.stages
        while group := list(islice(batches, stages.ranks)):
            if not go_on():
                break
            self._expect(len(group), gradients=False)
            loaded = _Loaded(iter(group), len(self.model.chunks), self.ctx.device)
            for chunk, number in forward_order(stages, len(group)):
                batch = loaded.take(chunk, number)
                result, _, _ = self._forward(chunk, lambda model, batch=batch: count(model, batch))  # type: ignore[misc]
                if chunk == len(self.model.chunks) - 1:
                    found.append(result)
            self._flush()
        return found

    def _forward(self, chunk: int, run: Callable[[Any], T]) -> tuple[T, Tensor | None, Tensor | None]:
        """(what `run` returns, hidden states that were handed on, hidden states that arrived)."""
        if self.ctx.pp.size == 1:
            return run(self.model), None, None
        arrived_sBD = None
        if not self.model.chunks[chunk].first:
            assert self._activations_in is not None
            arrived_sBD = self._activations_in.receive().requires_grad_(torch.is_grad_enabled())
        part = _ChunkOfModel(self.model, chunk, arrived_sBD)
        result = run(part)
        if part.left_sBD is not None:
            assert self._activations_out is not None
            self._activations_out.send(part.left_sBD)
        return result, part.left_sBD, arrived_sBD

    def _backward(self, action: Action, done: _Pass) -> None:
        starts: list[tuple[Tensor, Tensor | None]] = [(done.objective, None)]
        if done.left_sBD is not None:
            assert self._gradients_in is not None
            starts.append((done.left_sBD, self._gradients_in.receive()))
        starts = [(end, gradient) for end, gradient in starts if end.requires_grad]
        torch.autograd.backward([end for end, _ in starts], [gradient for _, gradient in starts])  # type: ignore[misc]
        if done.arrived_sBD is not None:
            assert self._gradients_out is not None and done.arrived_sBD.grad is not None
            self._gradients_out.send(done.arrived_sBD.grad)

    def _expect(self, micro_batches: int, gradients: bool) -> None:
        if self._activations_in is not None:
            self._activations_in.expect(micro_batches * sum(not chunk.first for chunk in self.model.chunks))
        if gradients and self._gradients_in is not None:
            self._gradients_in.expect(micro_batches * sum(not chunk.last for chunk in self.model.chunks))

    def _flush(self) -> None:
        for outlet in (self._activations_out, self._gradients_out):
            if outlet is not None:
                outlet.flush()


class _Loaded:
    """Micro-batches on the device, each until the last chunk has taken it."""

    def __init__(self, batches: Iterator[Batch], chunks: int, device: torch.device) -> None:
        self._batches, self._chunks, self._device = batches, chunks, device
        self._kept: dict[int, Batch] = {}

    def take(self, chunk: int, micro_batch: int) -> Batch:
        if chunk == 0:  # which meets them in order
            self._kept[micro_batch] = to_device(next(self._batches), self._device)
        return self._kept[micro_batch] if chunk < self._chunks - 1 else self._kept.pop(micro_batch)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`; other entries pass."""
    if device.type == "cpu":
        return batch
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
