"""The GPT model on one rank: parameters, loss, arguments, hooks of the train loop, counting."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_lsh.errors import ConfigError
from megatron_lsh.families import GPT
from megatron_lsh.parallel.layout import ParallelLayout
from megatron_lsh.plan.counting import parameter_counts
from tests.models.model_helpers import (
    LLAMA_LIKE,
    MOE,
    VOCAB,
    full_gradients,
    make_batch,
    make_config,
    make_gpt,
    randomize,
)


def test_keys_and_shapes_of_a_gpt2() -> None:
    model = make_gpt(make_config(num_layers=1, qk_layernorm=True))
    layer = "decoder.layers.0."
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == {
        "embedding.word_embeddings.weight": (VOCAB, 32),
        "embedding.position_embeddings.weight": (16, 32),
        layer + "input_layernorm.weight": (32,),
        layer + "input_layernorm.bias": (32,),
        layer + "self_attention.linear_qkv.weight": (96, 32),
        layer + "self_attention.linear_qkv.bias": (96,),
        layer + "self_attention.q_layernorm.weight": (8,),
        layer + "self_attention.q_layernorm.bias": (8,),
        layer + "self_attention.k_layernorm.weight": (8,),
        layer + "self_attention.k_layernorm.bias": (8,),
        layer + "self_attention.linear_proj.weight": (32, 32),
        layer + "self_attention.linear_proj.bias": (32,),
        layer + "pre_mlp_layernorm.weight": (32,),
        layer + "pre_mlp_layernorm.bias": (32,),
        layer + "mlp.linear_fc1.weight": (48, 32),
        layer + "mlp.linear_fc1.bias": (48,),
        layer + "mlp.linear_fc2.weight": (32, 48),
        layer + "mlp.linear_fc2.bias": (32,),
        "decoder.final_layernorm.weight": (32,),
        "decoder.final_layernorm.bias": (32,),
    }


def test_keys_and_shapes_of_a_mixtral() -> None:
    model = make_gpt(make_config(**LLAMA_LIKE, **MOE, add_qkv_bias=True, kv_channels=16))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    attention = {
        "input_layernorm.weight": (32,),
        "self_attention.linear_qkv.weight": (2 * (2 + 2) * 16, 32),
        "self_attention.linear_qkv.bias": (2 * (2 + 2) * 16,),
        "self_attention.linear_proj.weight": (32, 4 * 16),
        "pre_mlp_layernorm.weight": (32,),
    }
    dense = {"mlp.linear_fc1.weight": (2, 48, 32), "mlp.linear_fc2.weight": (32, 48)}
    moe = {
        "mlp.router.weight": (4, 32),
        "mlp.experts.linear_fc1.weight": (4, 32, 32),
        "mlp.experts.linear_fc2.weight": (4, 32, 16),
    }
    assert shapes == {
        "embedding.word_embeddings.weight": (VOCAB, 32),
        "decoder.final_layernorm.weight": (32,),
        "output_layer.weight": (VOCAB, 32),
        **{f"decoder.layers.0.{name}": shape for name, shape in {**attention, **dense}.items()},
        **{f"decoder.layers.1.{name}": shape for name, shape in {**attention, **moe}.items()},
    }


@pytest.mark.parametrize("settings", [{}, LLAMA_LIKE, {**LLAMA_LIKE, **MOE}], ids=["gpt2", "llama", "mixtral"])
def test_a_fresh_model_knows_nothing(settings: dict[str, Any]) -> None:
    """The loss of fresh weights is that of guessing, ln V, and every parameter receives a gradient."""
    model = make_gpt(make_config(**settings))
    loss, aux_loss = model(*make_batch(batch=8))
    assert loss.shape == (8, 16) and loss.dtype == torch.float32
    assert abs(loss.mean().item() - math.log(VOCAB)) < 0.05
    (loss.mean() + aux_loss).backward()
    assert all(torch.isfinite(grad).all() and grad.abs().sum() > 0 for grad in full_gradients(model).values())


def test_initial_weights() -> None:
    """Megatron's: normal with --init-method-std, divided by sqrt(2 layers) for what writes to the residual stream."""
    model = make_gpt(make_config(hidden_size=128, num_layers=8, init_method_std=0.1))
    layer = model.decoder.layers["3"]
    for weight, std in (
        (model.embedding.word_embeddings.weight, 0.1),
        (layer.self_attention.linear_qkv.weight, 0.1),
        (layer.mlp.linear_fc1.weight, 0.1),
        (layer.self_attention.linear_proj.weight, 0.1 / 4),
        (layer.mlp.linear_fc2.weight, 0.1 / 4),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert layer.input_layernorm.weight.eq(1).all() and layer.mlp.linear_fc2.bias.eq(0).all()
    again = make_gpt(make_config(hidden_size=128, num_layers=8, init_method_std=0.1))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    other = make_gpt(make_config(hidden_size=128, num_layers=8, init_method_std=0.1, seed=5))
    assert not torch.equal(other.decoder.layers["3"].mlp.linear_fc1.weight, layer.mlp.linear_fc1.weight)


def test_logits_and_loss_agree() -> None:
    model = make_gpt(make_config(**LLAMA_LIKE, **MOE)).eval()
    tokens, labels = make_batch()
    logits = model(tokens)
    assert logits.shape == (2, 16, VOCAB)
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(model(tokens, labels)[0], expected)


@pytest.mark.parametrize("kind", ["learned_absolute", "rope"])
def test_position_ids(kind: str) -> None:
    model = make_gpt(make_config(position_embedding_type=kind)).eval()
    tokens, _ = make_batch()
    plain = model(tokens)
    positions = torch.arange(16).expand(2, 16)
    torch.testing.assert_close(model(tokens, position_ids_BS=positions), plain)
    assert not torch.allclose(model(tokens, position_ids_BS=positions % 5), plain)


def test_encoding_is_what_the_logits_are_made_of() -> None:
    """And padding is neither attended to nor routed, on whichever side it lies."""
    model = randomize(make_gpt(make_config(**MOE, position_embedding_type="none"))).eval()
    tokens, _ = make_batch()
    hidden, _ = model.encode(tokens)
    torch.testing.assert_close(hidden @ model.embedding.word_embeddings.weight.t(), model(tokens))
    real = (torch.arange(16) >= 5).expand(2, 16)
    rows: list[int] = []
    (moe,) = model.moe_layers()
    moe.router.register_forward_hook(lambda _, __, routing: rows.append(int(routing.tokens_per_expert_E.sum())))
    padded, _ = model.encode(tokens, real)
    alone, _ = model.encode(tokens[:, 5:])
    torch.testing.assert_close(padded[:, 5:], alone)
    assert rows == [2 * 2 * 11] * 2


def test_attention_mask_narrows_causality() -> None:
    model = make_gpt(make_config()).eval()
    tokens, _ = make_batch()
    everything = torch.ones(2, 1, 16, 16, dtype=torch.bool)
    torch.testing.assert_close(model(tokens, attention_mask=everything), model(tokens))
    only_self = torch.eye(16, dtype=torch.bool).expand(2, 1, 16, 16)
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % VOCAB
    same = model(tokens, attention_mask=only_self) == model(changed, attention_mask=only_self)
    assert same.all(dim=(0, 2)).tolist() == [position != 3 for position in range(16)]


def test_too_long_a_sequence_is_refused() -> None:
    model = make_gpt(make_config())
    with pytest.raises(ValueError, match=r"17 tokens .* --max-position-embeddings \(16\)"):
        model(torch.zeros(1, 17, dtype=torch.long))


def test_hooks_of_the_train_loop_reach_the_experts() -> None:
    settings = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    model = make_gpt(make_config(**LLAMA_LIKE, **MOE, **settings, moe_token_dispatcher_type="lsh", lsh_warmup_iters=2))
    (moe,) = model.moe_layers()
    model.set_iteration(0)
    model(*make_batch())
    model.update_expert_bias()
    bias = moe.router.expert_bias.clone()
    assert bias.abs().sum() > 0
    (report,) = model.telemetry.collect(model.ctx, iterations=1)
    assert report["lsh_compression_rate"] is None
    model.set_iteration(2)
    model(*make_batch())
    model.discard_expert_load()
    model.update_expert_bias()
    assert torch.equal(moe.router.expert_bias, bias)
    (report,) = model.telemetry.collect(model.ctx, iterations=1)
    assert report["lsh_compression_rate"] is not None


def test_counting() -> None:
    """By hand: attention 4 D^2 with half the key/value heads, SwiGLU 3 D F, norms D, embeddings V D."""
    cfg = make_config(**LLAMA_LIKE, **MOE)
    attention = 32 * 32 * 2 + 2 * 32 * 16
    norms, embeddings, expert = 5 * 32, 2 * VOCAB * 32, 3 * 32 * 16
    dense = 2 * attention + 3 * 32 * 48 + norms + embeddings + 4 * 32
    counts = parameter_counts(GPT, cfg, VOCAB, ParallelLayout(4, tp=2, ep=4))
    assert counts.total == dense + 4 * expert == sum(p.numel() for p in make_gpt(cfg).parameters())
    assert counts.active == dense + 2 * expert
    replicated = norms + 4 * 32
    assert counts.dense_per_rank == (dense - replicated) // 2 + replicated
    assert counts.expert_per_rank == expert
    assert counts.per_rank == counts.dense_per_rank + counts.expert_per_rank


def test_counts_of_mixtral_8x7b() -> None:
    """The published 46.7 B parameters, 12.9 B of them active, without allocating any."""
    cfg = make_config(
        **{**LLAMA_LIKE, "num_query_groups": 8},
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        num_experts=8,
        moe_token_dispatcher_type="lsh",
    )
    counts = parameter_counts(GPT, cfg, 32000, ParallelLayout(32, ep=8))
    assert counts.total == 46_702_792_704
    assert counts.active == 12_879_925_248
    assert counts.expert_per_rank == 32 * 3 * 4096 * 14336


def test_a_tied_embedding_counts_once() -> None:
    tied, untied = (
        parameter_counts(GPT, make_config(untie_embeddings_and_output_weights=untie), VOCAB, ParallelLayout(1))
        for untie in (False, True)
    )
    assert untied.total - tied.total == VOCAB * 32
    assert tied.active == tied.total == tied.per_rank


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": None}, r"model.hidden_size \(absent\) must be at least 1: set --hidden-size"),
        ({"ffn_hidden_size": None}, r"model.ffn_hidden_size \(absent\)"),
        ({"hidden_size": 30}, r"model.hidden_size \(30\) must be divisible by model.num_attention_heads \(4\): change"),
        ({"group_query_attention": True, "num_query_groups": 3}, r"model.num_query_groups \(3\)"),
        ({"max_position_embeddings": None}, "--max-position-embeddings"),
    ],
)
def test_impossible_sizes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_gpt(make_config(**settings))


def test_padding_of_the_vocabulary_has_no_probability() -> None:
    """A vocabulary of 50 padded to 64 gives the loss of one that is not padded."""
    losses = []
    for padded in (50, 64):
        model = make_gpt(make_config(vocab_size=50), vocab_size=padded)
        weight = model.embedding.word_embeddings.weight
        with torch.no_grad():
            weight[:50] = torch.linspace(-1, 1, 50 * 32).sin().view(50, 32)
        tokens, labels = make_batch(vocab_size=50)
        loss, _ = model(tokens, labels)
        loss.mean().backward()
        assert weight.grad is not None and (weight.grad[50:] == 0).all()
        assert (model(tokens)[..., 50:] == float("-inf")).all()
        losses.append(loss)
    torch.testing.assert_close(*losses)


def test_losses_of_one_sample_are_no_view() -> None:
    """``fully_shard`` would warn of wrong gradients in every run with one sample per micro-batch."""
    losses_BS, _ = make_gpt(make_config(**LLAMA_LIKE))(*make_batch(1, 16))
    assert losses_BS.shape == (1, 16) and not losses_BS._is_view()
