"""What a model finds on data that is not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from megatron_lsh.families import Batch, Judge
from megatron_lsh.parallel.collectives import all_reduce_
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.data_parallel import reshard
from megatron_lsh.training.pipeline import Pipeline


@torch.no_grad()
def evaluate(
    pipeline: Pipeline,
    judge: Judge,
    batches: Iterable[Batch],
    stop_requested: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """The judge's figures over all batches of all ranks, the same on every rank. Collective over the world.

    The model runs with the dispatcher it trains with, unless the caller is inside `exact_dispatch`. Returns None if some
    rank asked to stop meanwhile: a run that is told to end must not wait for a long evaluation.

    Args:
        batches: micro-batches of this rank; at least one, and on every rank equally many.
    """
    model, ctx, stopped = pipeline.model, pipeline.ctx, False

    def go_on() -> bool:
        nonlocal stopped
        stopped = _anyone(stop_requested(), ctx)
        return not stopped

    was_training = model.training
    model.eval()
    try:
        found = pipeline.evaluate(batches, judge.count, go_on)
    finally:
        model.train(was_training)
        reshard(model)
    if stopped:
        return None
    assert found, "nothing to evaluate on"
    total = sum(found[1:], found[0]) if model.chunks[-1].last else torch.zeros_like(found[0])
    all_reduce_(total, ctx.pp)
    return judge.figures(
        all_reduce_(total, ctx.dp_cp).cpu()
    )  # the ranks of a tensor-parallel group saw the same tokens


def _anyone(wish: bool, ctx: ParallelContext) -> bool:
    """Whether any rank has this wish; the same answer on all of them."""
    return bool(all_reduce_(torch.tensor(float(wish), device=ctx.device), ctx.world) > 0)
