"""Layers split over ranks compute what the unsplit layer computes; cross-entropy is F.cross_entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lsh.errors import ConfigError
from megatron_lsh.parallel.context import ParallelContext, offline_context
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.layout import ParallelLayout
from megatron_lsh.parallel.parameters import Init, initialize_parameters
from megatron_lsh.parallel.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    gather_vocabulary,
    vocab_parallel_cross_entropy,
    vocab_parallel_logits,
)
from megatron_lsh.parallel.testing import run_distributed_test
from tests.parallel.toy import config

S, B, D, F_, V = 8, 2, 8, 16, 24
INIT = Init("normal", std=0.5)


class Block(nn.Module):
    """Embedding, column and row parallel layers with biases that are not zero, tied logits."""

    def __init__(self, ctx: ParallelContext, gated: bool) -> None:
        super().__init__()
        self.embedding = VocabParallelEmbedding(V, D, ctx, init=INIT)
        self.column = ColumnParallelLinear(D, F_, ctx, init=INIT, gated=gated)
        self.row = RowParallelLinear(F_, D, ctx, init=INIT)
        self.ctx = ctx
        for module in (self.column, self.row):
            module.bias.init_spec = INIT

    def forward(self, tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
        h = self.column(self.embedding(tokens_BS))
        x_SBD = self.row(h[..., 0, :] * h[..., 1, :] if self.column.gated else h.tanh())
        return x_SBD, vocab_parallel_logits(x_SBD, self.embedding.weight, self.ctx)


def one_rank_slice(full: Tensor, name: str, gated: bool, ctx: ParallelContext) -> Tensor:
    dims = {"embedding.weight": 0, "row.weight": 1, "column.weight": int(gated), "column.bias": int(gated)}
    return full.chunk(ctx.tp.size, dims[name])[ctx.tp.rank] if name in dims else full


def block_equals_unsplit(world_size: int) -> None:
    tokens = torch.randint(V, (B, S), generator=torch.Generator().manual_seed(0))
    targets = torch.randint(V, (S, B), generator=torch.Generator().manual_seed(1))
    for sequence_parallel in (False, True):
        for gated in (False, True):
            ctx = initialize(config(world_size, 1, False, sequence_parallel), moe=False)
            alone = offline_context(device="cpu")
            model, expected = Block(ctx, gated), Block(alone, gated)
            initialize_parameters(model, 3)
            initialize_parameters(expected, 3)
            x, logits = model(tokens)
            want_x, want_logits = expected(tokens)
            if sequence_parallel:
                want_x = want_x.detach().chunk(ctx.tp.size)[ctx.tp.rank]
            torch.testing.assert_close(x, want_x)
            torch.testing.assert_close(gather_vocabulary(logits, ctx.tp), want_logits.detach())
            loss = vocab_parallel_cross_entropy(logits, targets, ctx.tp)
            want_loss = F.cross_entropy(want_logits.flatten(0, 1), targets.flatten(), reduction="none").view(S, B)
            torch.testing.assert_close(loss, want_loss)
            loss.mean().backward()
            want_loss.mean().backward()
            for (name, param), want in zip(model.named_parameters(), expected.parameters(), strict=True):
                grad = param.grad.full_tensor() if name == "row.bias" else param.grad.to_local()  # partial sums there
                torch.testing.assert_close(
                    grad, one_rank_slice(want.grad, name, gated, ctx), msg=lambda m, n=name: n + m
                )


@pytest.mark.parametrize("world_size", [2, 4])
def test_split_layers_equal_the_unsplit_layer(world_size: int) -> None:
    run_distributed_test(block_equals_unsplit, world_size, world_size)


def test_unsplit_layers_are_torch_layers() -> None:
    ctx = offline_context(device="cpu")
    column, row = ColumnParallelLinear(D, F_, ctx, init=INIT), RowParallelLinear(F_, D, ctx, init=INIT, bias=False)
    gated, embedding = (
        ColumnParallelLinear(D, F_, ctx, init=INIT, gated=True),
        VocabParallelEmbedding(V, D, ctx, init=INIT),
    )
    model = nn.ModuleList([column, row, gated, embedding])
    initialize_parameters(model, 0)
    nn.init.normal_(column.bias)
    nn.init.normal_(gated.bias)
    x, tokens = torch.randn(S, B, D), torch.randint(V, (B, S))
    torch.testing.assert_close(column(x), F.linear(x, column.weight, column.bias))
    torch.testing.assert_close(row(column(x)), F.linear(column(x), row.weight))
    assert row.bias is None
    y = gated(x)
    assert y.shape == (S, B, 2, F_)
    for half in (0, 1):
        torch.testing.assert_close(y[:, :, half], F.linear(x, gated.weight[half], gated.bias[half]))
    torch.testing.assert_close(embedding(tokens), F.embedding(tokens, embedding.weight).transpose(0, 1))


def test_indivisible_sizes_are_refused() -> None:
    ctx = offline_context(ParallelLayout(4, tp=4))
    for make in (
        lambda: ColumnParallelLinear(8, 18, ctx, init=INIT),
        lambda: RowParallelLinear(18, 8, ctx, init=INIT),
        lambda: VocabParallelEmbedding(18, 8, ctx, init=INIT),
    ):
        with pytest.raises(ConfigError, match=r"18.*tensor_model_parallel_size \(4\)"):
            make()


GROUP = offline_context(device="cpu").tp


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_cross_entropy_on_one_rank(dtype: torch.dtype, tolerance: float) -> None:
    logits = (torch.randn(S, B, V, generator=torch.Generator().manual_seed(0)) * 5).to(dtype).requires_grad_()
    targets = torch.randint(V, (S, B), generator=torch.Generator().manual_seed(1))
    targets[0, 0] = -100
    weights = torch.randn(S, B, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    before = logits.detach().clone()
    loss = vocab_parallel_cross_entropy(logits, targets, GROUP)
    assert loss.dtype == weights.dtype and loss[0, 0] == 0 and torch.equal(before, logits)
    (loss * weights).sum().backward()
    wide = logits.detach().to(weights.dtype).requires_grad_()
    want = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="none").view(S, B)
    (want * weights).sum().backward()
    torch.testing.assert_close(loss, want.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(logits.grad.to(wide.dtype), wide.grad, rtol=tolerance, atol=tolerance)


def test_cross_entropy_gradcheck() -> None:
    logits = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[0, 4], [2, -1], [1, 1]])
    assert torch.autograd.gradcheck(lambda x: vocab_parallel_cross_entropy(x, targets, GROUP), logits)


def test_cross_entropy_of_huge_logits_is_finite() -> None:
    logits = torch.tensor([[1e5, -1e5, 0.0]], requires_grad=True)
    loss = vocab_parallel_cross_entropy(logits, torch.tensor([0]), GROUP)
    loss.sum().backward()
    assert loss.item() == 0.0 and torch.isfinite(logits.grad).all()


def split_cross_entropy(world_size: int) -> None:
    group = initialize(config(world_size), moe=False).tp
    logits = torch.randn(S, B, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5
    targets = torch.randint(V, (S, B), generator=torch.Generator().manual_seed(1))
    targets[1, 1] = -1
    mine = logits.chunk(world_size, -1)[group.rank].clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(mine, targets, group)
    loss.square().sum().backward()
    logits.requires_grad_()
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-1).view(S, B)
    want.square().sum().backward()
    torch.testing.assert_close(loss, want.detach())
    torch.testing.assert_close(mine.grad, logits.grad.chunk(world_size, -1)[group.rank])


@pytest.mark.parametrize("world_size", [2, 4])
def test_cross_entropy_of_a_split_vocabulary(world_size: int) -> None:
    run_distributed_test(split_cross_entropy, world_size, world_size)
