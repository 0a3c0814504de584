"""Two ranks compute what one rank computes: loss and every gradient, for dense and MoE models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_lsh.config.config import Config
from megatron_lsh.models.attention import core_attention
from megatron_lsh.models.gpt import GPTModel
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.data_parallel import finalize_gradients, shard_model
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.random import seed_everything
from megatron_lsh.parallel.testing import run_distributed_test
from tests.models.model_helpers import LLAMA_LIKE, MOE, full_gradients, make_batch, make_config, make_gpt

GPT2_LIKE = {"qk_layernorm": True}  # learned positions, biases, LayerNorm, GELU, tied embeddings
SHARED = {"moe_shared_expert_intermediate_size": 16}
DROPOUT = {"attention_dropout": 0.2, "hidden_dropout": 0.2}


def connect(cfg: Config, **parallel: Any) -> ParallelContext:
    cfg.parallel.device = "cpu"
    for name, value in parallel.items():
        setattr(cfg.parallel, name, value)
    return initialize(cfg.parallel, moe=cfg.moe.num_experts is not None)


def forward_backward(model: GPTModel, batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss and gradients over micro-batches, as the train loop computes them."""
    total = torch.zeros(())
    for tokens, labels in batches:
        loss_BS, aux_loss = model(tokens, labels)
        ((loss_BS.mean() + aux_loss) / len(batches)).backward()
        total += loss_BS.detach().mean() / len(batches)
    finalize_gradients(model, model.ctx)
    return total, full_gradients(model)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert set(actual) == set(expected)
    for name, grad in expected.items():
        error = (actual[name] - grad).norm() / (grad.norm() + noise_floor(expected))
        assert error < tolerance, f"{name}: relative error {error:.2e}"


def noise_floor(grads: dict[str, Tensor]) -> Tensor:
    """Norm below which a gradient is rounding: a bias of all keys, for one, has none (softmax ignores a shift)."""
    return 1e-4 * torch.stack([grad.norm() for grad in grads.values()]).norm()


def check_tensor_parallel(settings: dict[str, Any], sharded: bool, **parallel: Any) -> None:
    """TP 2 against one rank with the same seed, with or without fully_shard."""
    cfg = make_config(**settings)
    batch = make_batch()
    loss, grads = forward_backward(make_gpt(cfg), [batch])
    model = make_gpt(cfg, connect(cfg, tensor_model_parallel_size=2, **parallel))
    if sharded:
        shard_model(model, model.ctx, cfg.precision)
    parallel_loss, parallel_grads = forward_backward(model, [batch])
    torch.testing.assert_close(parallel_loss, loss, rtol=1e-6, atol=0)
    assert_same(parallel_grads, grads)
    model.eval()
    torch.testing.assert_close(model(batch[0]), make_gpt(cfg).eval()(batch[0]), rtol=1e-5, atol=1e-5)


def dense_on_two_ranks() -> None:
    full_width = {**LLAMA_LIKE, "qk_layernorm": True, "qk_layernorm_width": "full"}
    for settings in (GPT2_LIKE, {**LLAMA_LIKE, "qk_layernorm": True}, full_width):
        for sequence_parallel in (False, True):
            for sharded in (False, True):
                check_tensor_parallel(settings, sharded, sequence_parallel=sequence_parallel)


def test_dense_tensor_parallel() -> None:
    """Includes the tied embedding, whose gradient is the sum of two uses, and head norms used by both ranks."""
    run_distributed_test(dense_on_two_ranks, 2)


def moe_on_two_ranks() -> None:
    for settings in ({**LLAMA_LIKE, **MOE, **SHARED}, {**GPT2_LIKE, **MOE}):
        check_tensor_parallel(settings, sharded=True)
        check_tensor_parallel(settings, sharded=True, expert_model_parallel_size=2)
        check_data_parallel(settings)


def check_data_parallel(settings: dict[str, Any]) -> None:
    """EP 2 over two data-parallel ranks against one rank that accumulates both micro-batches."""
    cfg = make_config(**settings)
    batches = [make_batch(seed=seed) for seed in range(2)]
    loss, grads = forward_backward(make_gpt(cfg), batches)
    model = make_gpt(cfg, connect(cfg, expert_model_parallel_size=2))
    shard_model(model, model.ctx, cfg.precision)
    own_loss, parallel_grads = forward_backward(model, [batches[model.ctx.dp.rank]])
    torch.distributed.all_reduce(own_loss)
    torch.testing.assert_close(own_loss / 2, loss, rtol=1e-6, atol=0)
    assert_same(parallel_grads, grads)


def test_moe_tensor_and_expert_parallel() -> None:
    run_distributed_test(moe_on_two_ranks, 2)


def dropout_on_two_ranks() -> None:
    check_hidden_dropout()
    check_attention_dropout()
    check_recompute(tensor_model_parallel_size=2, expert_model_parallel_size=2)
    check_recompute(use_distributed_optimizer=True)


def check_hidden_dropout() -> None:
    """Without sequence parallelism every rank holds the whole residual stream and must drop what one rank drops."""
    cfg = make_config(**GPT2_LIKE, hidden_dropout=0.2)
    batch = make_batch()
    ctx = connect(cfg, tensor_model_parallel_size=2)
    seed_everything(1, ctx)
    loss, grads = forward_backward(make_gpt(cfg), [batch])
    model = make_gpt(cfg, ctx)
    seed_everything(1, ctx)
    parallel_loss, parallel_grads = forward_backward(model, [batch])
    torch.testing.assert_close(parallel_loss, loss, rtol=1e-6, atol=0)
    assert_same(parallel_grads, grads)


def check_attention_dropout() -> None:
    """The ranks agree on the loss and on the state of their generators although their heads drop differently."""
    cfg = make_config(attention_dropout=0.5)
    model = make_gpt(cfg, connect(cfg, tensor_model_parallel_size=2))
    seed_everything(1, model.ctx)
    loss_BS, _ = model(*make_batch())
    for value in (loss_BS.detach(), torch.get_rng_state()):
        both = [torch.empty_like(value) for _ in range(2)]
        torch.distributed.all_gather(both, value.contiguous())
        assert torch.equal(*both)
    q = torch.ones(16, 2, 2, 8)  # the same on both ranks
    out = core_attention(q, q, q, model.ctx, causal=False, mask=None, dropout=0.5)
    both = [torch.empty_like(out) for _ in range(2)]
    torch.distributed.all_gather(both, out.contiguous())
    assert not torch.equal(*both)


def check_recompute(**parallel: Any) -> None:
    """Recomputation around and inside units of fully_shard changes no bit."""
    settings = {**LLAMA_LIKE, **MOE, **SHARED, **DROPOUT, "num_layers": 3, "moe_layer_freq": "[0,1,1]"}
    settings["moe_token_dispatcher_type"] = "lsh"
    plans: tuple[dict[str, Any], ...] = (
        {},
        {"recompute_granularity": "full", "recompute_num_layers": 1},
        {"recompute_granularity": "full", "recompute_num_layers": 2},
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe", "mlp", "layernorm"]},
    )
    results = []
    for plan in plans:
        cfg = make_config(**settings, **plan)
        ctx = connect(cfg, **parallel)
        model = make_gpt(cfg, ctx)
        shard_model(model, ctx, cfg.precision)
        seed_everything(1, ctx)
        results.append(forward_backward(model, [make_batch(seed=seed) for seed in range(2)]))
    for loss, grads in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(grads[name], grad) for name, grad in results[0][1].items())


def test_dropout_and_recomputation() -> None:
    run_distributed_test(dropout_on_two_ranks, 2)


def bf16_on_two_ranks() -> None:
    for settings in (GPT2_LIKE, {**LLAMA_LIKE, **MOE}):
        cfg = make_config(**settings)
        loss, grads = forward_backward(make_gpt(cfg), [make_batch()])
        ctx = connect(cfg, tensor_model_parallel_size=2, sequence_parallel=True)
        model = make_gpt(cfg, ctx)
        cfg.precision.bf16 = True
        shard_model(model, ctx, cfg.precision)
        bf16_loss, bf16_grads = forward_backward(model, [make_batch()])
        assert bf16_loss.dtype == torch.float32
        torch.testing.assert_close(bf16_loss, loss, rtol=2e-3, atol=0)
        assert all(param.dtype == torch.float32 for param in model.parameters())
        for name, grad in grads.items():
            assert bf16_grads[name].dtype == torch.float32
            if grad.norm() < noise_floor(grads):
                continue
            alike = torch.cosine_similarity(bf16_grads[name].flatten(), grad.flatten(), dim=0)
            assert alike > 0.98, f"{name}: cosine {alike:.4f}"
        logits = model(make_batch()[0])
        assert logits.dtype == torch.bfloat16


def test_bf16_is_near_fp32() -> None:
    run_distributed_test(bf16_on_two_ranks, 2)
