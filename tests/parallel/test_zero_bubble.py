"""Why zero-bubble schedules are not offered: torch's give silently wrong gradients where layers are sharded one by one."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from megatron_lsh.parallel.testing import DistributedTestError, run_distributed_test

WIDTH, MICRO_BATCHES = 8, 4


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.outer(torch.tanh(self.inner(x)))
        return y


def loss(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).square().mean()


def wrong_gradients(schedule: str, per_layer: bool) -> int:
    """How many of a rank's parameters have another gradient than without stages, of two stages of two chunks."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("pp", "dp"))
    rank = mesh["pp"].get_local_rank()
    torch.manual_seed(0)
    chunks = [nn.Sequential(Layer(), Layer()) for _ in range(4)]
    alone = copy.deepcopy(chunks)
    x, target = torch.randn(2 * MICRO_BATCHES, WIDTH), torch.randn(2 * MICRO_BATCHES, WIDTH)
    for inputs, wanted in zip(x.chunk(MICRO_BATCHES), target.chunk(MICRO_BATCHES), strict=True):
        (loss(nn.Sequential(*alone)(inputs), wanted) / MICRO_BATCHES).backward()
    numbers = (0, 3) if rank == 0 else (1, 2)  # the V of ZBV
    if schedule == "Interleaved1F1B":
        numbers = (0, 2) if rank == 0 else (1, 3)
    for number in numbers:
        for layer in chunks[number] if per_layer else ():
            fully_shard(layer, mesh=mesh["dp"])
        fully_shard(chunks[number], mesh=mesh["dp"])
    group, example = mesh["pp"].get_group(), x.chunk(MICRO_BATCHES)[0].clone().requires_grad_()
    stages = [PipelineStage(chunks[n], n, 4, torch.device("cpu"), example, example, group=group) for n in numbers]
    run = get_schedule_class(schedule)(stages, n_microbatches=MICRO_BATCHES, loss_fn=loss)
    run.step(*((x,) if 0 in numbers else ()), **({"target": target} if 3 in numbers else {}))
    wrong = 0
    for number in numbers:
        for param, expected in zip(chunks[number].parameters(), alone[number].parameters(), strict=True):
            grad, right = param.grad, expected.grad
            assert right is not None
            wrong += grad is None or not torch.allclose(grad.full_tensor(), right, atol=1e-6)  # type: ignore[attr-defined]
    return wrong


def test_torchs_interleaved_schedule_is_right_with_layers_sharded_one_by_one() -> None:
    assert run_distributed_test(wrong_gradients, 2, "Interleaved1F1B", True) == [0, 0]


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="torch 2.13: no gradients or wrong ones, and no error")
def test_torchs_zero_bubble_schedule_is_right_with_layers_sharded_one_by_one() -> None:
    try:
        wrong = run_distributed_test(wrong_gradients, 2, "ZBVZeroBubble", True)
    except DistributedTestError as error:
        raise RuntimeError("the schedule itself fails, which is another matter") from error
    assert wrong == [0, 0]
