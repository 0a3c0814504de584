"""BERT and RoBERTa: equal to Hugging Face's, indifferent to padding, the same on one rank and on two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_lsh.families import BERT
from megatron_lsh.parallel.layout import ParallelLayout
from megatron_lsh.parallel.parameters import is_expert
from megatron_lsh.parallel.testing import run_distributed_test
from megatron_lsh.plan.counting import parameter_counts
from tests.models import families
from tests.models.families import REAL, bert_batch, bert_config, make_bert
from tests.models.model_helpers import LLAMA_LIKE, MOE, VOCAB, load, pack_qkv, randomize, shake

#: The order of norms, and the epsilon, of the original.
ORIGINAL = {"apply_residual_connection_post_layernorm": True, "norm_epsilon": 1e-12}
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LSH = {**MOE, "moe_token_dispatcher_type": "lsh"}


def encoder_weights(hf: dict[str, Tensor], root: str) -> dict[str, Tensor]:
    """Embedding and layers of a Hugging Face BERT or RoBERTa by our names. Its norms belong to what comes after them."""
    weights = {"embedding.word_embeddings.weight": hf[f"{root}embeddings.word_embeddings.weight"]}
    norms = [f"{root}embeddings.LayerNorm", *(f"{root}encoder.layer.{layer}.output.LayerNorm" for layer in range(2))]
    for layer in range(2):
        ours, theirs = f"encoder.layers.{layer}.", f"{root}encoder.layer.{layer}."
        for kind in ("weight", "bias"):
            q, k, v = (hf[f"{theirs}attention.self.{x}.{kind}"] for x in ("query", "key", "value"))
            weights |= {
                f"{ours}input_layernorm.{kind}": hf[f"{norms[layer]}.{kind}"],
                f"{ours}self_attention.linear_qkv.{kind}": pack_qkv(q, k, v, groups=4),
                f"{ours}self_attention.linear_proj.{kind}": hf[f"{theirs}attention.output.dense.{kind}"],
                f"{ours}pre_mlp_layernorm.{kind}": hf[f"{theirs}attention.output.LayerNorm.{kind}"],
                f"{ours}mlp.linear_fc1.{kind}": hf[f"{theirs}intermediate.dense.{kind}"],
                f"{ours}mlp.linear_fc2.{kind}": hf[f"{theirs}output.dense.{kind}"],
                f"encoder.final_layernorm.{kind}": hf[f"{norms[2]}.{kind}"],
            }
    return weights


@torch.no_grad()
def test_bert_is_hugging_faces() -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.BertForPreTraining(transformers.BertConfig(**SIZES, max_position_embeddings=16)).eval()
    shake(reference)
    hf = reference.state_dict()
    weights = encoder_weights(hf, "bert.") | {
        "embedding.position_embeddings.weight": hf["bert.embeddings.position_embeddings.weight"],
        "embedding.tokentype_embeddings.weight": hf["bert.embeddings.token_type_embeddings.weight"],
        "output_layer.bias": hf["cls.predictions.bias"],
    }
    for kind in ("weight", "bias"):
        weights |= {
            f"lm_head.dense.{kind}": hf[f"cls.predictions.transform.dense.{kind}"],
            f"lm_head.layer_norm.{kind}": hf[f"cls.predictions.transform.LayerNorm.{kind}"],
            f"pooler.dense.{kind}": hf[f"bert.pooler.dense.{kind}"],
            f"binary_head.{kind}": hf[f"cls.seq_relationship.{kind}"],
        }
    model = make_bert(bert_config(**ORIGINAL)).eval()
    load(model, weights)
    batch = bert_batch()
    expected = reference(batch["tokens"], attention_mask=REAL, token_type_ids=batch["token_types"])
    logits, order = model(batch["tokens"], batch["token_types"], REAL)  # type: ignore[misc]
    assert expected.prediction_logits.std() > 0.1
    torch.testing.assert_close(logits[REAL], expected.prediction_logits[REAL], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(order, expected.seq_relationship_logits, rtol=1e-4, atol=1e-4)
    loss, _, aux_loss = model(batch["tokens"], batch["token_types"], REAL, batch["labels"])  # type: ignore[misc]
    wanted = nn.functional.cross_entropy(expected.prediction_logits[REAL], batch["labels"][REAL], reduction="none")
    torch.testing.assert_close(loss[REAL], wanted, rtol=1e-4, atol=1e-4)
    assert aux_loss == 0
    hidden, _ = model.encode(batch["tokens"], batch["token_types"], REAL)
    output = reference.bert(batch["tokens"], attention_mask=REAL, token_type_ids=batch["token_types"])
    torch.testing.assert_close(hidden[REAL], output.last_hidden_state[REAL], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_roberta_is_hugging_faces() -> None:
    """Its one kind of segment is part of every position, and its positions begin behind the padding id."""
    transformers = pytest.importorskip("transformers")
    config = transformers.RobertaConfig(**SIZES, max_position_embeddings=18, type_vocab_size=1, pad_token_id=1)
    reference = transformers.RobertaForMaskedLM(config).eval()
    shake(reference)
    hf = reference.state_dict()
    positions = hf["roberta.embeddings.position_embeddings.weight"][2:]
    weights = encoder_weights(hf, "roberta.") | {
        "embedding.position_embeddings.weight": positions + hf["roberta.embeddings.token_type_embeddings.weight"],
        "output_layer.bias": hf["lm_head.bias"],
    }
    for kind in ("weight", "bias"):
        weights |= {
            f"lm_head.dense.{kind}": hf[f"lm_head.dense.{kind}"],
            f"lm_head.layer_norm.{kind}": hf[f"lm_head.layer_norm.{kind}"],
        }
    model = make_bert(bert_config(**{**ORIGINAL, "norm_epsilon": config.layer_norm_eps}, bert_binary_head=False)).eval()
    load(model, weights)
    tokens = bert_batch()["tokens"].clamp(min=2).masked_fill(~REAL, 1)
    expected = reference(tokens, attention_mask=REAL).logits
    logits, order = model(tokens, None, REAL)  # type: ignore[misc]
    assert expected.std() > 0.1 and order is None
    torch.testing.assert_close(logits[REAL], expected[REAL], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, LLAMA_LIKE], ids=["gelu", "swiglu"])
def test_experts_are_there(settings: dict[str, Any]) -> None:
    """By hand: E experts of two (SwiGLU: three) matrices [D, F], and biases if there are any, in one of two layers."""
    cfg = bert_config(**settings, **MOE)
    model = make_bert(cfg)
    expected = 4 * (3 * 32 * 16 if settings else 2 * 32 * 16 + 16 + 32)
    names = {name: p.numel() for name, p in model.named_parameters() if is_expert(p)}
    assert sum(names.values()) == expected
    assert all(name.startswith("encoder.layers.1.mlp.experts.") for name in names)
    total = sum(p.numel() for p in model.parameters())
    counts = parameter_counts(BERT, cfg, VOCAB, ParallelLayout(2, ep=2))
    assert (counts.total, counts.active, counts.expert_per_rank) == (total, total - expected // 2, expected // 2)


def test_heads_follow_the_flags() -> None:
    names = set(make_bert(bert_config(bert_binary_head=False)).state_dict())
    assert not [name for name in names if name.startswith(("pooler", "binary_head", "embedding.tokentype"))]
    assert "output_layer.weight" not in names and "output_layer.bias" in names
    untied = make_bert(bert_config(untie_embeddings_and_output_weights=True)).state_dict()
    assert untied["output_layer.weight"].shape == (VOCAB, 32)


def test_positions_see_both_sides() -> None:
    model = randomize(make_bert(bert_config())).eval()
    tokens = bert_batch()["tokens"]
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % VOCAB
    before, after = (model.encode(t)[0] for t in (tokens, changed))
    assert (before != after).any(-1).all()


@pytest.mark.parametrize(
    "settings",
    [MOE, LSH, {**MOE, "moe_expert_capacity_factor": 0.75, "moe_router_load_balancing_type": "seq_aux_loss"}],
    ids=["exact", "lsh", "capacity"],
)
def test_padding_changes_nothing(settings: dict[str, Any]) -> None:
    families.check_padding_changes_nothing(families.bert(), {**settings, **ORIGINAL})


def test_a_micro_batch_of_padding() -> None:
    families.check_all_padding(families.bert(), {**LSH, "position_embedding_type": "rope"})


@pytest.mark.parametrize("original", [False, True], ids=["pre-norm", "post-norm"])
def test_recomputation(original: bool) -> None:
    families.check_recomputation(families.bert(), {**LSH, "apply_residual_connection_post_layernorm": original})


def on_two_ranks() -> None:
    families.check_two_ranks(families.bert(), MOE)
    every_row = {**MOE, "moe_token_dispatcher_type": "lsh", "lsh_target_rate": 1.0, **ORIGINAL, **LLAMA_LIKE}
    families.check_two_ranks(families.bert(), {**every_row, "moe_router_load_balancing_type": "seq_aux_loss"})
    families.check_sharded_recomputation(families.bert(), LSH)


def test_tensor_and_expert_parallel() -> None:
    """Also that LSH is exact where it may send every row."""
    run_distributed_test(on_two_ranks, 2)
