"""Faults that only show where kinds of parallelism meet, and are silent: each of these was found in Megatron-LM.

Most are from issue 7452 of NVIDIA/Megatron-LM, whose numbers the docstrings have. What is special to models that are not
here (LLaVA, multi-token prediction, gated delta nets) is tried on what has its place here. All run once on four ranks, where
no group is the world and a rank's number is not its place in the group.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_lsh.families import GPT
from megatron_lsh.moe.router import TopKRouter
from megatron_lsh.parallel.context import ParallelContext, offline_context
from megatron_lsh.parallel.data_parallel import finalize_gradients, shard_model
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.parameters import initialize_parameters
from megatron_lsh.parallel.random import seed_everything
from megatron_lsh.parallel.tensor_parallel import vocab_parallel_cross_entropy
from megatron_lsh.parallel.testing import run_distributed_test
from megatron_lsh.training.run import set_up
from tests.models.model_helpers import LLAMA_LIKE, MOE, full_gradients, make_batch, make_config, make_gpt
from tests.training.helpers import tiny_config

TP2 = {"tensor_model_parallel_size": 2}
WITH_NORMS = {"qk_layernorm": True}  # and learned positions, biases, tied embeddings
STEP = "--eval-iters 0 --train-iters 2 --moe-layer-freq [0,1] --calculate-per-token-loss --eod-mask-loss --qk-layernorm"
RANKS = {
    "tensor parallel": "--tensor-model-parallel-size 2 --expert-model-parallel-size 4 --use-distributed-optimizer",
    "context parallel": "--context-parallel-size 2 --expert-model-parallel-size 2",
    "stages": "--pipeline-model-parallel-size 2 --tensor-model-parallel-size 2 --expert-model-parallel-size 2",
}


def connect(**parallel: Any) -> ParallelContext:
    cfg = make_config(device="cpu", **parallel)
    return initialize(cfg.parallel, moe=False)


def on_four_ranks() -> dict[str, Any]:
    ctx = connect(**TP2, sequence_parallel=True)
    return {
        "dp": ctx.dp.rank,
        "tp": ctx.tp.rank,
        "cross entropy": cross_entropy(ctx),
        "logits": logits(),
        "recomputed": [gradients(plan) for plan in ({}, {"recompute_granularity": "full", "recompute_num_layers": 1})],
        "embedded": embedded(ctx),
        "padded": padded(ctx),
        "head norms": head_norms(),
        "steps": {name: steps(flags, 4) for name, flags in RANKS.items()},
    }


def cross_entropy(ctx: ParallelContext) -> tuple[Tensor, Tensor]:
    """Loss per token, and the gradient of this rank's half of the vocabulary."""
    half = sample_logits().chunk(2, -1)[ctx.tp.rank].clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(half, sample_targets(), ctx.tp)
    loss.sum().backward()
    assert half.grad is not None
    return loss.detach(), half.grad


def sample_logits() -> Tensor:
    return torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(3)) * 4


def sample_targets() -> Tensor:
    return torch.randint(8, (5, 2), generator=torch.Generator().manual_seed(4))


def logits() -> tuple[Tensor, Tensor]:
    """The loss that the model finds, and what its logits say."""
    model = make_gpt(make_config(**LLAMA_LIKE), connect(**TP2)).eval()
    tokens, labels = make_batch()
    whole = model(tokens)
    loss, _ = model(tokens, labels)
    assert isinstance(whole, Tensor)
    return loss.detach(), F.cross_entropy(whole.detach().transpose(1, 2), labels, reduction="none")


def gradients(plan: dict[str, Any]) -> dict[str, Tensor]:
    """Of a model with tensor and data parallelism, with dropout."""
    cfg = make_config(**LLAMA_LIKE, **MOE, **plan, attention_dropout=0.2, hidden_dropout=0.2)
    cfg.parallel.device, cfg.parallel.tensor_model_parallel_size = "cpu", 2
    model = make_gpt(cfg, initialize(cfg.parallel, moe=True))
    shard_model(model, model.ctx, cfg.precision)
    seed_everything(1, model.ctx)
    loss, aux_loss = model(*make_batch(seed=model.ctx.dp.rank))
    (loss.mean() + aux_loss).backward()
    finalize_gradients(model, model.ctx)
    return full_gradients(model)


def embedded(ctx: ParallelContext) -> Tensor:
    """This rank's part of the sequence of its data-parallel rank's sample, embedded."""
    model = make_gpt(make_config(**WITH_NORMS), ctx)
    tokens, _ = make_batch(seed=ctx.dp.rank)
    assert model.embedding is not None
    result: Tensor = model.embedding(tokens, torch.arange(16))
    return result.detach()


def padded(ctx: ParallelContext) -> tuple[Tensor, Tensor]:
    """This rank's share of a router's auxiliary loss where some tokens are padding, and the gradient of all of it."""
    router = TopKRouter(*router_settings(), ctx)
    initialize_parameters(router, 0)
    x_SBD, real_SB = padded_tokens()
    x, real = (part.chunk(ctx.tp.size)[ctx.tp.rank].flatten(0, 1) for part in (x_SBD, real_SB))
    routing = router(x, real, batch_size=2)
    routing.aux_loss.backward()
    grad = router.weight.grad
    assert grad is not None
    return routing.aux_loss.detach(), grad.full_tensor()  # type: ignore[attr-defined]


def router_settings() -> tuple[Any, Any]:
    cfg = make_config(**MOE, moe_router_topk=2, add_bias_linear=False)
    return cfg.model, cfg.moe


def padded_tokens() -> tuple[Tensor, Tensor]:
    """The second half of the sequence has nearly all of the padding."""
    x_SBD = torch.randn(8, 2, 32, generator=torch.Generator().manual_seed(5))
    real_SB = torch.ones(8, 2, dtype=torch.bool)
    real_SB[5:, 0] = real_SB[7:, 1] = real_SB[0, 1] = False
    return x_SBD, real_SB


def head_norms() -> dict[str, Tensor]:
    """Gradients of a dense model whose ranks hold the same tokens and other heads."""
    model = make_gpt(make_config(**WITH_NORMS), connect(**TP2))
    shard_model(model, model.ctx, make_config().precision)
    loss, _ = model(*make_batch())  # the same on all data-parallel ranks
    loss.mean().backward()
    finalize_gradients(model, model.ctx)
    return full_gradients(model)


def steps(flags: str, world_size: int) -> list[tuple[float, float]]:
    """Loss and gradient norm; ranks have different numbers of tokens with a loss."""
    cfg = tiny_config(f"{STEP} {flags}", world_size)
    run = set_up(cfg, GPT, initialize(cfg.parallel))
    batches = run.batches("train")
    results = [run.step(batches, iteration, False) for iteration in range(2)]
    return [(result.loss, result.grad_norm) for result in results]


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_distributed_test(on_four_ranks, 4)


@pytest.fixture(scope="module")
def alone() -> list[tuple[float, float]]:
    result = steps("", 1)
    dist.destroy_process_group()
    return result


def test_a_loss_over_a_cut_vocabulary_is_the_same_number_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    """1: every rank added a term of its own part of the vocabulary."""
    whole = sample_logits().requires_grad_()
    expected = F.cross_entropy(whole.permute(0, 2, 1), sample_targets(), reduction="none")
    expected.sum().backward()
    assert whole.grad is not None
    for rank in ranks:
        loss, grad = rank["cross entropy"]
        assert torch.equal(loss, ranks[0]["cross entropy"][0])
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(grad, whole.grad.chunk(2, -1)[rank["tp"]])


def test_whole_logits_are_not_taken_for_a_part_of_the_vocabulary(ranks: list[dict[str, Any]]) -> None:
    """2: the loss was too large by log(TP)."""
    for rank in ranks:
        torch.testing.assert_close(*rank["logits"])


def test_a_weight_per_token_counts_the_tokens_of_all_ranks(
    ranks: list[dict[str, Any]], alone: list[tuple[float, float]]
) -> None:
    """3 (and issue 673, with context parallelism): ranks with few tokens that have a loss gave each of them more weight."""
    for name in RANKS:
        for rank in ranks:
            for step, expected in zip(rank["steps"][name], alone, strict=True):
                assert step[0] == pytest.approx(expected[0], rel=1e-5), name


def test_recomputation_gathers_from_the_ranks_of_the_first_pass(ranks: list[dict[str, Any]]) -> None:
    """4: it took activations of other replicas."""
    for rank in ranks:
        plain, recomputed = rank["recomputed"]
        assert all(torch.equal(recomputed[name], grad) for name, grad in plain.items())


def test_a_sequence_is_cut_by_the_place_in_its_own_group(ranks: list[dict[str, Any]]) -> None:
    """7, and the scatters like it: a rank kept the part that its number in another group names."""
    model = make_gpt(make_config(**WITH_NORMS))
    assert model.embedding is not None
    for rank in ranks:
        whole = model.embedding(make_batch(seed=rank["dp"])[0], torch.arange(16)).detach()
        torch.testing.assert_close(rank["embedded"], whole.chunk(2)[rank["tp"]])


def test_the_norm_counts_what_is_cut_on_every_rank_and_what_is_alike_once(
    ranks: list[dict[str, Any]], alone: list[tuple[float, float]]
) -> None:
    """8 (and issues 1628 and 5916, of experts): parameters that are cut were left out of the norm of gradients."""
    for name in RANKS:
        for rank in ranks:
            for step, expected in zip(rank["steps"][name], alone, strict=True):
                assert step[1] == pytest.approx(expected[1], rel=1e-4), name


def test_padding_leaves_an_auxiliary_loss_what_it_is_on_one_rank(ranks: list[dict[str, Any]]) -> None:
    """10: a rank's own count was overwritten by the group's, and the gradient doubled."""
    router = TopKRouter(*router_settings(), offline_context(device="cpu"))
    initialize_parameters(router, 0)
    x_SBD, real_SB = padded_tokens()
    routing = router(x_SBD.flatten(0, 1), real_SB.flatten(), batch_size=2)
    routing.aux_loss.backward()
    for first in (0, 2):
        of_group = ranks[first : first + 2]
        torch.testing.assert_close(sum(rank["padded"][0] for rank in of_group), routing.aux_loss.detach())
        for rank in of_group:
            torch.testing.assert_close(rank["padded"][1], router.weight.grad)


def test_a_parameter_alike_on_all_ranks_that_sees_other_heads_on_each_gets_the_sum(ranks: list[dict[str, Any]]) -> None:
    """11: without sequence parallelism the norm of a head was trained by the heads of one rank."""
    model = make_gpt(make_config(**WITH_NORMS))
    loss, _ = model(*make_batch())
    loss.mean().backward()
    expected = full_gradients(model)
    names = [name for name in expected if "_layernorm" in name]
    assert any("q_layernorm" in name for name in names) and any("k_layernorm" in name for name in names)
    for rank in ranks:
        for name in names:
            torch.testing.assert_close(rank["head norms"][name], expected[name], rtol=1e-4, atol=1e-7)
