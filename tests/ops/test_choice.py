"""Kernels or plain PyTorch: who decides, and that backward passes follow."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from megatron_lsh import lsh
from megatron_lsh.config import Config
from megatron_lsh.moe.permute import permute, unpermute
from megatron_lsh.ops import choice, choose, library, reference_only
from megatron_lsh.parallel.context import offline_context
from megatron_lsh.training.startup import introduce
from tests.kernels.test_fused import routed
from tests.kernels.test_usage import Recorder


@pytest.fixture(autouse=True)
def kernels_are_built() -> None:
    if "cpu" not in library.STATUS.devices:
        pytest.skip(library.STATUS.describe("cpu"))


def every_function() -> tuple[Tensor, list[Tensor]]:
    """The sum of what each differentiable function returns, and its arguments."""
    c = routed(30, 2, 3, 8, torch.float64)
    rows, _, permutation = permute(c.x, c.ids, c.experts, c.clusters.num_rows)
    member_C = lsh.nearest_members(rows, c.clusters)
    means, residual = lsh.compress(rows, c.clusters, with_residual=True)
    members, further = lsh.compress_to_members(rows, c.clusters, member_C, with_residual=True)
    slots, p = lsh.clusters_of_slots(c.clusters, permutation.row_of_TK), permutation
    by_tokens = lsh.compress_tokens(c.x, p.token_of_row_N, c.clusters, slots)
    kept = by_tokens.detach()
    outputs = [
        unpermute(lsh.restore(means @ c.weight, residual, c.clusters), c.probs, p),
        lsh.interpolate(members @ c.weight, rows, members, c.clusters, member_C, block=8),
        further,
        lsh.restore_tokens(
            by_tokens @ c.weight, c.probs, c.x, kept, p.token_of_row_N, p.row_of_TK, c.clusters, slots
        ),
    ]  # fmt: skip
    return sum(output.square().sum() for output in outputs), [c.x, c.probs, c.weight]


@pytest.mark.parametrize("by_kernels", [True, False])
def test_backward_follows_the_forward(by_kernels: bool) -> None:
    """On a GPU autograd runs backward on a thread of its own, where no context variable of the forward is seen."""
    with nullcontext() if by_kernels else reference_only():
        total, inputs = every_function()

    def backward() -> set[str]:
        with nullcontext() if not by_kernels else reference_only(), Recorder() as recorder:
            torch.autograd.grad(total, inputs)
        return recorder.called

    with ThreadPoolExecutor(1) as another_thread:
        called = another_thread.submit(backward).result()
    assert called == ({"segment", "combine", "dots", "spread", "grouped", "grouped_outer"} if by_kernels else set())


def test_other_devices_and_dtypes_are_left_alone() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert choose(torch.empty(1, dtype=dtype)) is choice.KERNELS
    assert choose(torch.empty(1, device="meta")) is choice.PLAIN
    assert choose(torch.empty(1, dtype=torch.complex64)) is choice.PLAIN


def test_a_run_says_what_computes_its_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with_experts = Config()
    with_experts.moe.num_experts = 4

    def introduced() -> str:
        introduce(with_experts, offline_context(device="cpu"))
        return capsys.readouterr().out

    assert "\nLSH kernels: cpu\n" in introduced()
    with reference_only():
        assert "\nLSH kernels: switched off (MEGATRON_LSH_KERNELS=0); plain PyTorch instead\n" in introduced()
    monkeypatch.setattr(choice, "STATUS", library.Status(frozenset(), {"cpu": "no compiler on this machine"}))
    assert "LSH kernels: none for cpu (no compiler on this machine); plain PyTorch instead" in introduced()
    assert choose(torch.empty(1)) is choice.PLAIN


def test_the_environment_turns_kernels_off() -> None:
    command = [sys.executable, "-c", "from megatron_lsh import ops; print(ops.describe('cpu'))"]
    env = {**os.environ, "MEGATRON_LSH_KERNELS": "0"}
    assert "switched off" in subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
