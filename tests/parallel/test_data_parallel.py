"""Any layout computes the gradients, norms and updates of a single process."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from megatron_lsh.config.parallel import PrecisionConfig
from megatron_lsh.parallel.context import ParallelContext, offline_context
from megatron_lsh.parallel.data_parallel import (
    accumulate,
    clip_grad_norm,
    finalize_gradients,
    num_local_parameters,
    num_parameters,
    reshard,
    shard_model,
)
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.parameters import Init, initialize_parameters, is_expert, local, parameter
from megatron_lsh.parallel.testing import run_distributed_test
from tests.parallel.toy import backward, batch, build, config, reference


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train_like_reference(tp: int, ep: int, shard: bool, moe: bool = True) -> None:
    ctx = initialize(config(tp, ep, shard), moe)
    expected, model = reference(moe), build(ctx, moe)
    assert num_parameters(model) == num_parameters(expected)
    model = shard_model(model, ctx, PrecisionConfig())
    assert num_parameters(model) == num_parameters(expected)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    expected_optimizer = torch.optim.AdamW(expected.parameters(), lr=1e-2)
    for step in range(2):
        loss = backward(model, ctx, step)
        torch.distributed.all_reduce(loss, group=ctx.dp.process_group)
        expected_loss = expected(*batch(step))
        expected_loss.backward()
        torch.testing.assert_close(loss / ctx.dp.size, expected_loss.detach())
        finalize_gradients(model, ctx)
        for (name, param), want in zip(model.named_parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(full(param.grad), want.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: n + m)
        norm = clip_grad_norm(model, 0.2, ctx)
        expected_norm = torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.2)
        assert expected_norm > 0.2  # else clipping is not tested
        torch.testing.assert_close(norm, expected_norm)
        torch.testing.assert_close(clip_grad_norm(model, 0.0, ctx), torch.tensor(0.2), rtol=1e-4, atol=0)
        for opt in (optimizer, expected_optimizer):
            opt.step()
            opt.zero_grad()
    for (name, param), want in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(full(param), want, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)
    with torch.no_grad():  # an evaluation leaves no gathered parameters behind, which would go stale
        before = model(*batch(9))
        for param in model.parameters():
            assert isinstance(param, DTensor) and param.device_mesh.ndim >= 2
            param.mul_(0.5)
        after = model(*batch(9))
        assert not torch.equal(before, after)
    model(*batch(9))  # with gradients, but no backward
    reshard(model)
    assert all(isinstance(param, DTensor) for param in model.parameters())


def four_ranks(layouts: list[tuple[int, int, bool]]) -> None:
    for tp, ep, shard in layouts:
        train_like_reference(tp, ep, shard)


@pytest.mark.slow
def test_four_ranks_equal_one() -> None:
    layouts = [(1, 1, False), (1, 2, True), (1, 4, True), (2, 1, True), (2, 2, False), (2, 4, True), (4, 2, False)]
    run_distributed_test(four_ranks, 4, layouts)


def test_tensor_parallel_without_sequence_parallel() -> None:
    for shard in (False, True):
        run_distributed_test(train_like_reference, 4, 2, 1, shard, False)


def two_ranks() -> None:
    for tp, ep in ((1, 1), (1, 2), (2, 1), (2, 2)):
        for shard in (False, True):
            train_like_reference(tp, ep, shard)


def test_two_ranks_equal_one() -> None:
    run_distributed_test(two_ranks, 2)


@pytest.mark.slow
def test_six_ranks_with_uneven_shards() -> None:
    """DP and expert DP are 3, which divides no dimension of the model."""
    run_distributed_test(train_like_reference, 6, 2, 2, True)


def test_one_rank_equals_no_distributed() -> None:
    run_distributed_test(train_like_reference, 1, 1, 1, True)


class Scale(nn.Module):
    """y = w x, so that the gradient of each micro-batch is its input."""

    fsdp_unit = True

    def __init__(self, ctx: ParallelContext) -> None:
        super().__init__()
        self.weight = parameter((4,), ctx, init=Init("ones"))
        self.seen: list[torch.dtype] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = local(self.weight)
        self.seen.append(weight.dtype)
        return weight * x


def bf16_accumulates_in_fp32(shard: bool) -> None:
    ctx = initialize(config(shard=shard))
    model = nn.Sequential(Scale(ctx))
    initialize_parameters(model, 0)
    shard_model(model, ctx, PrecisionConfig(bf16=True))
    small = 2.0**-10  # 1 + 2**-10 is not a bf16 number
    for i, value in enumerate((1.0, small, small)):
        accumulate(model, last=i == 2)
        with CommDebugMode() as communication:
            model(torch.full((4,), value, dtype=torch.bfloat16)).sum().backward()
        # Shards are gathered for the first micro-batch, gradients reduced after the last, and nothing between.
        assert (communication.get_total_counts() > 0) == (i == 2 or (shard and i == 0))
    (weight,) = model.parameters()
    assert model[0].seen == [torch.bfloat16] * 3
    assert weight.dtype == weight.grad.dtype == torch.float32
    assert torch.equal(full(weight.grad), torch.full((4,), 1 + 2 * small))
    assert num_local_parameters(model) == (2 if shard else 4)


def test_bf16_keeps_fp32_weights_and_sums() -> None:
    for shard in (False, True):
        run_distributed_test(bf16_accumulates_in_fp32, 2, shard)


def bf16_follows_fp32() -> None:
    ctx = initialize(config(2, 4, True))
    norms = []
    for bf16 in (False, True):
        model = shard_model(build(ctx), ctx, PrecisionConfig(bf16=bf16))
        backward(model, ctx, 0)
        finalize_gradients(model, ctx)
        norms.append(clip_grad_norm(model, 1.0, ctx))
        assert all(param.grad.dtype == torch.float32 for param in model.parameters())
    torch.testing.assert_close(norms[1], norms[0], rtol=0.05, atol=0)
    assert norms[0] != norms[1]


def test_bf16_with_tensor_and_expert_parallel() -> None:
    run_distributed_test(bf16_follows_fp32, 4)


class Scales(nn.Module):
    """The gradient of `shared` is the sum of both ranks' x, that of `reused` the sum of both numbers of `uses`."""

    def __init__(self, ctx: ParallelContext) -> None:
        super().__init__()
        self.shared = parameter((3,), ctx, init=Init("ones"))
        self.reused = parameter((3,), ctx, init=Init("ones"))

    def forward(self, x: float, uses: tuple[float, float]) -> torch.Tensor:
        y = (local(self.shared, partial_grad=True) * x).sum()
        for use in uses:
            y = y + (local(self.reused) * use).sum()
        return y


def sums_that_bf16_cannot_hold() -> None:
    small = 2.0**-9  # 1 + small rounds to 1 in bf16
    ctx = initialize(config(tp=2, sequence_parallel=True))
    for micro_batches in (1, 2):
        model = Scales(ctx)
        initialize_parameters(model, 0)
        shard_model(model, ctx, PrecisionConfig(bf16=True))
        for i in range(micro_batches):
            accumulate(model, last=i == micro_batches - 1)
            model((1.0, small)[ctx.rank], (1.0, small)).backward()
        for param in model.parameters():
            assert full(param.grad).tolist() == [micro_batches * (1 + small)] * 3


def test_gradients_are_summed_in_fp32_over_tensor_parallel_ranks_and_over_uses() -> None:
    run_distributed_test(sums_that_bf16_cannot_hold, 2)


def one_bad_gradient(bad: float) -> list[bool]:
    """An expert's gradient, on one of the two ranks only, is not finite."""
    ctx = initialize(config(ep=2))
    model = shard_model(build(ctx), ctx, PrecisionConfig())
    backward(model, ctx, 0)
    answers = [bool(clip_grad_norm(model, 1.0, ctx).isfinite())]
    if ctx.rank == 1:
        next(p for p in model.parameters() if is_expert(p)).grad.to_local().view(-1)[3] = bad
    answers.append(bool(clip_grad_norm(model, 1.0, ctx).isfinite()))
    return answers


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_gradient_is_known_to_all(bad: float) -> None:
    assert run_distributed_test(one_bad_gradient, 2, bad) == [[True, False]] * 2


def test_an_offline_context_cannot_shard() -> None:
    with pytest.raises(ValueError, match="initialize"):
        shard_model(reference(), offline_context(device="cpu"), PrecisionConfig())
