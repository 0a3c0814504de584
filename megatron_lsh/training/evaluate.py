"""The loss on data that is not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn

from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.data_parallel import reshard
from megatron_lsh.training.losses import mean_of
from megatron_lsh.training.step import Batch, ForwardStep, to_device


@torch.no_grad()
def evaluate(
    model: nn.Module,
    forward_step: ForwardStep,
    batches: Iterator[Batch],
    ctx: ParallelContext,
    iterations: int,
    micro_batches: int,
    stop_requested: Callable[[], bool] = lambda: False,
) -> float | None:
    """Mean loss over the loss tokens of `iterations` global batches, the same on every rank. Collective over the world.

    The model runs with the dispatcher it trains with, unless the caller is inside `exact_dispatch`. Returns None if some
    rank asked to stop meanwhile: a run that is told to end must not wait for a long evaluation.
    """
    was_training = model.training
    model.eval()
    try:
        total = [0.0, 0.0]
        for _ in range(iterations):
            values = torch.tensor([0.0, 0.0, float(stop_requested())], dtype=torch.float64, device=ctx.device)
            for _ in range(micro_batches):
                values[:2] += forward_step(model, to_device(next(batches), ctx.device)).main.sum_and_count()
            if ctx.world.size > 1:
                dist.all_reduce(values, group=ctx.world.process_group)
            *found, stop = values.tolist()
            if stop:
                return None
            total = [before + new for before, new in zip(total, found, strict=True)]
        return mean_of(total)
    finally:
        model.train(was_training)
        reshard(model)
