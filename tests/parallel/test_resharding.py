"""What one layout saves through torch.distributed.checkpoint, any other loads: weights and optimizer state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from megatron_lsh.config.parallel import PrecisionConfig
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.data_parallel import clip_grad_norm, finalize_gradients, shard_model
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.testing import run_distributed_test
from tests.parallel.toy import ToyModel, backward, build, config


def prepare(tp: int, ep: int, shard: bool, steps: int) -> tuple[ToyModel, torch.optim.Optimizer, ParallelContext]:
    ctx = initialize(config(tp, ep, shard))
    model = shard_model(build(ctx), ctx, PrecisionConfig())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    train(model, optimizer, ctx, range(steps))
    return model, optimizer, ctx


def train(model: ToyModel, optimizer: torch.optim.Optimizer, ctx: ParallelContext, steps: range) -> None:
    for step in steps:
        backward(model, ctx, step, micro_batches=1)
        finalize_gradients(model, ctx)
        clip_grad_norm(model, 1.0, ctx)
        optimizer.step()
        optimizer.zero_grad()


def everything(model: ToyModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def gathered(tree: Any, path: str = "") -> dict[str, torch.Tensor]:
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in gathered(value, f"{path}/{key}").items()}
    if isinstance(tree, DTensor):
        return {path: tree.full_tensor()}
    return {path: tree} if isinstance(tree, torch.Tensor) else {}


def save(folder: str, tp: int, ep: int, shard: bool) -> dict[str, torch.Tensor]:
    model, optimizer, ctx = prepare(tp, ep, shard, steps=2)
    dcp.save(everything(model, optimizer), checkpoint_id=folder)
    train(model, optimizer, ctx, range(2, 3))
    return gathered(everything(model, optimizer))


def load(folder: str, layouts: list[tuple[int, int, bool]]) -> list[dict[str, torch.Tensor]]:
    results = []
    for tp, ep, shard in layouts:
        model, optimizer, ctx = prepare(tp, ep, shard, steps=0)
        state = everything(model, optimizer)
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        train(model, optimizer, ctx, range(2, 3))
        results.append(gathered(everything(model, optimizer)))
    return results


def test_a_checkpoint_loads_under_any_layout(tmp_path: Path) -> None:
    """Save at TP 2 EP 2 after two steps, load elsewhere, train one step: as if the layout had never changed."""
    expected = run_distributed_test(save, 4, str(tmp_path), 2, 2, True)[0]
    assert len(expected) > 40
    alone = run_distributed_test(load, 1, str(tmp_path), [(1, 1, False)])[0]
    four = run_distributed_test(load, 4, str(tmp_path), [(1, 4, True), (4, 1, False), (2, 2, True)])[0]
    for result in alone + four:
        assert result.keys() == expected.keys()
        for key, want in expected.items():
            torch.testing.assert_close(result[key], want, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: k + m)
    for key, want in expected.items():  # the same layout continues to the bit
        assert torch.equal(four[2][key], want), key
