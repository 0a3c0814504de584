"""T5: equal to Hugging Face's, indifferent to padding, the same on one rank and on two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_lsh.config import T5Settings
from megatron_lsh.families import T5
from megatron_lsh.models.relative import RelativePositionBias, relative_buckets
from megatron_lsh.models.stacks import moe_layers
from megatron_lsh.models.t5 import t5_stacks
from megatron_lsh.parallel.context import offline_context
from megatron_lsh.parallel.layout import ParallelLayout
from megatron_lsh.parallel.parameters import Init, is_expert
from megatron_lsh.parallel.testing import run_distributed_test
from megatron_lsh.plan.counting import parameter_counts
from tests.models import families
from tests.models.families import REAL, make_t5, t5_batch, t5_config
from tests.models.model_helpers import MOE, VOCAB, load, pack_qkv, randomize, shake

RELATIVE: dict[str, Any] = {
    "position_embedding_type": "relative",
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
}
T5_LIKE = {**RELATIVE, "normalization": "RMSNorm", "norm_epsilon": 1e-6, "add_bias_linear": False}
T5_MOE = {**MOE, "moe_layer_freq": "2"}
LSH = {**T5_MOE, "moe_token_dispatcher_type": "lsh"}


def weights_of(hf: dict[str, Tensor], *, gated: bool, tied: bool) -> dict[str, Tensor]:
    """A Hugging Face T5 by our names. It does not scale scores, but the tied output: see ``T5Model``."""
    root_d = 8**0.5
    weights = {"embedding.word_embeddings.weight": hf["shared.weight"]}
    if not tied:
        weights["output_layer.weight"] = hf["lm_head.weight"]
    for stack, layers in (("encoder", 2), ("decoder", 3)):
        scale = 32**-0.5 if tied and stack == "decoder" else 1.0
        table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        weights |= {
            f"{stack}_relative_pos_emb.weight": hf[table],
            f"{stack}.final_layernorm.weight": hf[f"{stack}.final_layer_norm.weight"] * scale,
        }
        for layer in range(layers):
            ours, theirs = f"{stack}.layers.{layer}.", f"{stack}.block.{layer}.layer."
            q, k, v, out = (hf[f"{theirs}0.SelfAttention.{x}.weight"] for x in "qkvo")
            feed_forward = 2 if stack == "decoder" else 1
            dense = f"{theirs}{feed_forward}.DenseReluDense."
            fc1 = (
                torch.stack((hf[dense + "wi_0.weight"], hf[dense + "wi_1.weight"]))
                if gated
                else hf[dense + "wi.weight"]
            )
            weights |= {
                ours + "input_layernorm.weight": hf[theirs + "0.layer_norm.weight"],
                ours + "self_attention.linear_qkv.weight": pack_qkv(q * root_d, k, v, groups=4),
                ours + "self_attention.linear_proj.weight": out,
                ours + "pre_mlp_layernorm.weight": hf[f"{theirs}{feed_forward}.layer_norm.weight"],
                ours + "mlp.linear_fc1.weight": fc1,
                ours + "mlp.linear_fc2.weight": hf[dense + "wo.weight"],
            }
            if stack == "decoder":
                q, k, v, out = (hf[f"{theirs}1.EncDecAttention.{x}.weight"] for x in "qkvo")
                pairs = torch.cat([x.unflatten(0, (4, 8)) for x in (k, v)], dim=1).flatten(0, 1)
                weights |= {
                    ours + "pre_cross_attn_layernorm.weight": hf[theirs + "1.layer_norm.weight"],
                    ours + "cross_attention.linear_q.weight": q * root_d,
                    ours + "cross_attention.linear_kv.weight": pairs,
                    ours + "cross_attention.linear_proj.weight": out,
                }
    return weights


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False], ids=["tied, gelu", "untied, swiglu"])
def test_t5_is_hugging_faces(tied: bool) -> None:
    """The original shares the output with the embedding, version 1.1 does not and has gates; the activations are ours."""
    transformers = pytest.importorskip("transformers")
    reference = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCAB,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_decoder_layers=3,
            num_heads=4,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=10,
            feed_forward_proj="gelu" if tied else "gated-silu",
            tie_word_embeddings=tied,
        )
    ).eval()
    shake(reference)
    settings = {"swiglu": not tied, "untie_embeddings_and_output_weights": not tied}
    model = make_t5(t5_config(**T5_LIKE, **settings)).eval()
    load(model, weights_of(reference.state_dict(), gated=not tied, tied=tied))
    batch = t5_batch()
    real = batch["decoder_padding_mask"]
    expected = reference(
        input_ids=batch["encoder_tokens"],
        attention_mask=REAL,
        decoder_input_ids=batch["decoder_tokens"],
        decoder_attention_mask=real,
    )
    inputs = (batch["encoder_tokens"], batch["decoder_tokens"], REAL, real)
    assert expected.logits.std() > 0.1 and not real.all()
    torch.testing.assert_close(model(*inputs)[real], expected.logits[real], rtol=1e-4, atol=1e-4)
    hidden, _ = model.encode(batch["encoder_tokens"], REAL)
    torch.testing.assert_close(hidden[REAL], expected.encoder_last_hidden_state[REAL], rtol=1e-4, atol=1e-4)
    loss, aux_loss = model(*inputs, batch["labels"])
    wanted = nn.functional.cross_entropy(expected.logits[real], batch["labels"][real], reduction="none")
    torch.testing.assert_close(loss[real], wanted, rtol=1e-4, atol=1e-4)
    assert aux_loss == 0


def test_buckets() -> None:
    """Few enough to write down: 8 buckets, up to a distance of 10."""
    back = -torch.arange(14)
    assert relative_buckets(back, 8, 10, bidirectional=False).tolist() == [0, 1, 2, 3, 4, 4, 5, 6, 7, 7, 7, 7, 7, 7]
    assert relative_buckets(-back, 8, 10, bidirectional=False).tolist() == [0] * 14
    assert relative_buckets(back, 8, 10, bidirectional=True).tolist() == [0, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3]
    assert relative_buckets(-back, 8, 10, bidirectional=True).tolist() == [0, 5, 6, 6, 6] + [7] * 9


def test_buckets_of_the_published_sizes() -> None:
    """32 buckets up to 128, against Hugging Face's."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket
    distance = torch.arange(-300, 300)
    for both in (True, False):
        expected = theirs(distance, bidirectional=both, num_buckets=32, max_distance=128)
        assert torch.equal(relative_buckets(distance, 32, 128, bidirectional=both), expected)


def test_bias_is_the_tables_entry() -> None:
    settings = T5Settings(relative_attention_num_buckets=8, relative_attention_max_distance=10)
    table = RelativePositionBias(settings, 4, offline_context(device="cpu"), Init("normal", 1.0), bidirectional=True)
    randomize(table)
    bias = table(6)
    assert bias.shape == (1, 4, 6, 6)
    assert torch.equal(bias[0, :, 2, 3], table.weight[5]) and torch.equal(bias[0, :, 3, 2], table.weight[1])
    bias.sum().backward()
    assert table.weight.grad is not None and table.weight.grad[0].tolist() == [6.0] * 4


@pytest.mark.parametrize("kind", ["learned_absolute", "rope", "relative", "none"])
def test_positions_matter_where_there_are_some(kind: str) -> None:
    """The encoder tells the order of two tokens that a third one sees, unless it has no positions."""
    model = randomize(make_t5(t5_config(position_embedding_type=kind))).eval()
    tokens = t5_batch()["encoder_tokens"]
    swapped = tokens[:, [1, 0, *range(2, 16)]]
    before, after = (model.encode(t)[0][:, -1] for t in (tokens, swapped))
    assert torch.allclose(before, after, atol=1e-4) == (kind == "none")


def test_the_decoder_is_causal_and_reads_the_encoder() -> None:
    model = randomize(make_t5(t5_config(**RELATIVE))).eval()
    batch = t5_batch()
    encoder, decoder = batch["encoder_tokens"], batch["decoder_tokens"]
    logits = model(encoder, decoder)
    later, other = decoder.clone(), encoder.clone()
    later[:, 7] = (later[:, 7] + 1) % VOCAB
    other[:, -1] = (other[:, -1] + 1) % VOCAB
    same = (model(encoder, later) == logits).all(-1)  # type: ignore[union-attr]
    assert same[:, :7].all() and not same[:, 7:].any()
    assert (model(other, decoder) != logits).any(-1).all()  # type: ignore[union-attr]


def test_experts_are_there() -> None:
    """Every second layer of each stack: one of two in the encoder, two of three in the decoder; E * 2 D F in each."""
    cfg = t5_config(**T5_LIKE, **T5_MOE)
    model = make_t5(cfg)
    names = {name: p.numel() for name, p in model.named_parameters() if is_expert(p)}
    assert sum(names.values()) == 3 * 4 * 2 * 32 * 16
    layers = {name.split(".mlp")[0] for name in names}
    assert layers == {"encoder.layers.0", "decoder.layers.0", "decoder.layers.2"}
    assert moe_layers(t5_stacks(cfg)) == [0, 2, 4]
    total, expert = sum(p.numel() for p in model.parameters()), sum(names.values())
    counts = parameter_counts(T5, cfg, VOCAB, ParallelLayout(4, tp=2, ep=4))
    assert (counts.total, counts.active, counts.expert_per_rank) == (total, total - expert // 2, expert // 4)


def test_layers_hash_differently() -> None:
    """The decoder's layers are counted after the encoder's, so no two share a rotation, and each has its gauges."""
    model = make_t5(t5_config(**LSH))
    rotations = [
        layer.dispatcher.alternatives["lsh"].path.compressor.cluster.rotation_DQW for layer in model.moe_layers()
    ]  # type: ignore[attr-defined]
    assert len(rotations) == 3 and not any(torch.equal(rotations[0], other) for other in rotations[1:])
    result = families.forward_backward(families.t5(), model, [t5_batch()])
    assert [report.layer for report in result.reports] == [0, 2, 4]


def test_only_real_tokens_are_routed() -> None:
    model = make_t5(t5_config(**LSH))
    rows: list[int] = []
    for layer in model.moe_layers():
        layer.router.register_forward_hook(lambda _, __, routing: rows.append(int(routing.tokens_per_expert_E.sum())))
    families.t5_loss(model, t5_batch())
    read, written = int(REAL.sum()), int(t5_batch()["decoder_padding_mask"].sum())
    assert rows == [2 * read, 2 * written, 2 * written] and written < 2 * 12


def test_keys_are_megatrons() -> None:
    names = set(make_t5(t5_config(**RELATIVE)).state_dict())
    layer = "decoder.layers.2."
    for name in (
        "pre_cross_attn_layernorm",
        "cross_attention.linear_q",
        "cross_attention.linear_kv",
        "cross_attention.linear_proj",
    ):
        assert {f"{layer}{name}.weight", f"{layer}{name}.bias"} <= names
    assert not [name for name in names if name.startswith("encoder.") and "cross" in name]
    assert not [name for name in names if "position_embeddings" in name]


@pytest.mark.parametrize(
    "settings",
    [
        {**T5_MOE, **RELATIVE},
        {**LSH, "position_embedding_type": "rope"},
        {**LSH, **T5_LIKE, "moe_expert_capacity_factor": 0.75},
    ],
    ids=["exact, relative", "lsh, rope", "lsh, capacity"],
)
def test_padding_changes_nothing(settings: dict[str, Any]) -> None:
    families.check_padding_changes_nothing(families.t5(), settings)


@pytest.mark.parametrize("kind", ["learned_absolute", "rope", "relative"])
def test_a_micro_batch_of_padding(kind: str) -> None:
    families.check_all_padding(families.t5(), {**LSH, **RELATIVE, "position_embedding_type": kind})


def test_recomputation() -> None:
    families.check_recomputation(families.t5(), {**LSH, **RELATIVE})


def on_two_ranks() -> None:
    families.check_two_ranks(families.t5(), {**T5_MOE, **RELATIVE})
    every_row = {**T5_MOE, "moe_token_dispatcher_type": "lsh", "lsh_target_rate": 1.0}
    grouped = {"group_query_attention": True, "num_query_groups": 2, "position_embedding_type": "rope"}
    families.check_two_ranks(families.t5(), {**every_row, **grouped, "untie_embeddings_and_output_weights": True})
    families.check_sharded_recomputation(families.t5(), {**LSH, **RELATIVE})


@pytest.mark.slow
def test_tensor_and_expert_parallel() -> None:
    """Also that LSH is exact where it may send every row."""
    run_distributed_test(on_two_ranks, 2)
