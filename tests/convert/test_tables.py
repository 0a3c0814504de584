"""The tables and the layouts, without files."""

from __future__ import annotations

import pytest
import torch

from megatron_lsh.convert.hf import hub_shapes
from megatron_lsh.convert.hf_config import choose_family, read_hf_config, write_hf_config
from megatron_lsh.convert.layouts import GATE_UP, GATE_UP_ROWS, QKV, SAME, Layout
from megatron_lsh.convert.source import model_shapes
from megatron_lsh.convert.tables import FAMILIES, hub_names
from megatron_lsh.errors import CheckpointError
from megatron_lsh.models.shape import ModelShape

SHAPE = ModelShape(num_layers=1, hidden=6, ffn=10, heads=4, head_dim=3, query_groups=2)


@pytest.mark.parametrize(
    ("layout", "native"),
    [(SAME, (5, 7)), (QKV, (24, 6)), (QKV, (24,)), (GATE_UP, (2, 10, 6)), (GATE_UP_ROWS, (20, 6))],
)
def test_join_and_split_are_inverses(layout: Layout, native: tuple[int, ...]) -> None:
    value = torch.randn(native)
    parts = layout.split(value, SHAPE)
    assert [tuple(part.shape) for part in parts] == layout.shapes(native, SHAPE)
    assert torch.equal(layout.join(parts, SHAPE), value)


def test_queries_keys_and_values_are_packed_per_group() -> None:
    q, k, v = (torch.arange(rows, dtype=torch.float32) + base for rows, base in ((12, 0), (6, 100), (6, 200)))
    packed = QKV.join([q, k, v], SHAPE)
    assert packed.tolist() == [*range(0, 6), 100, 101, 102, 200, 201, 202, *range(6, 12), 103, 104, 105, 203, 204, 205]


def test_names() -> None:
    row, layer = FAMILIES["mixtral"].row("decoder.layers.11.mlp.experts.linear_fc1.weight") or (None, None)
    assert row is not None and layer == 11
    assert hub_names(row, 11, 3) == [
        "model.layers.11.block_sparse_moe.experts.3.w1.weight",
        "model.layers.11.block_sparse_moe.experts.3.w3.weight",
    ]
    assert FAMILIES["mixtral"].row("decoder.layers.0.mlp.linear_fc1.weight") is None


# config.json as on the hub (Mixtral-8x7B-v0.1, Qwen3-30B-A3B, Qwen1.5-MoE-A2.7B, OLMoE-1B-7B-0924): what matters of them.
MIXTRAL = {
    "model_type": "mixtral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "num_local_experts": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
    "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32000,
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
    "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
    "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None,
    "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN2 = {
    "model_type": "qwen2_moe", "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 5632,
    "max_position_embeddings": 8192, "max_window_layers": 21, "num_attention_heads": 16, "num_hidden_layers": 24,
    "num_key_value_heads": 16, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
    "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936, "decoder_sparse_step": 1,
    "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4,
    "num_experts": 60, "norm_topk_prob": False,
}  # fmt: skip
OLMOE = {
    "model_type": "olmoe", "attention_bias": False, "clip_qkv": None, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 1024, "max_position_embeddings": 4096, "norm_topk_prob": False, "num_attention_heads": 16,
    "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "vocab_size": 50304,
}  # fmt: skip
REAL = {"mixtral": MIXTRAL, "qwen3_moe": QWEN3, "qwen2_moe": QWEN2, "olmoe": OLMOE}
BILLIONS = {"mixtral": 46.70, "qwen3_moe": 30.53, "qwen2_moe": 14.32, "olmoe": 6.92}


@pytest.mark.parametrize("kind", REAL)
def test_real_models_are_whole(kind: str) -> None:
    """Every native tensor of the published models has its place, and the number of parameters is the published one."""
    family, cfg, _ = read_hf_config(REAL[kind], "config.json")
    shapes: dict[str, tuple[int, ...]] = {}
    for native, shape in model_shapes(cfg).items():
        shapes |= hub_shapes(family, native, shape, cfg)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) / 1e9 == pytest.approx(BILLIONS[kind], abs=0.01)
    assert choose_family(cfg).model_type == kind, "an export without further hints finds the family again"
    written = write_hf_config(cfg, family, "bfloat16", REAL[kind])
    assert {key: written[key] for key in REAL[kind] if key in written and key != "sliding_window"} == {
        key: value for key, value in REAL[kind].items() if key in written and key != "sliding_window"
    }


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (MIXTRAL, {"model_type": "deepseek_v3"}, r"model_type \(deepseek_v3\) must be one of mixtral, qwen3_moe"),
        (MIXTRAL, {"model_type": None}, r"model_type \(absent\) must be one of"),
        (MIXTRAL, {"hidden_size": None}, r"hidden_size \(absent\) must be given"),
        (MIXTRAL, {"num_hidden_layers": "32"}, r"num_hidden_layers \(32\) must be a whole number .*, not a text"),
        (MIXTRAL, {"hidden_act": "gelu"}, r"hidden_act \(gelu\) must be silu"),
        (MIXTRAL, {"sliding_window": 4096}, r"sliding_window \(4096\) must be null or at least the 32768 positions"),
        (MIXTRAL, {"quantization_config": {"bits": 4}}, r"quantization_config .* must be"),
        (MIXTRAL, {"rope_theta": 10000.5}, r"rope_theta \(10000.5\) must be a whole number"),
        (
            MIXTRAL,
            {"rope_theta": None, "rope_parameters": {"rope_theta": 10000.5}},
            r"rope_parameters: rope_theta \(10000.5\) must be a whole number",
        ),
        (QWEN3, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, r"rope_scaling .*yarn.* of type default"),
        (QWEN3, {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}}, r"rope_parameters .*llama3"),
        (QWEN3, {"attention_bias": True}, r"attention_bias \(True\) must be False"),
        (QWEN3, {"use_sliding_window": True, "sliding_window": 4096}, r"sliding_window \(4096\)"),
        (QWEN3, {"mlp_only_layers": list(range(48))}, r"mlp_only_layers .* such that a layer has experts"),
        (QWEN2, {"qkv_bias": False}, r"qkv_bias \(False\) must be True"),
        (OLMOE, {"clip_qkv": 8.0}, r"clip_qkv \(8.0\) must be"),
    ],
)
def test_what_cannot_be_computed_is_refused(base: dict[str, object], change: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_hf_config({**base, **change}, "config.json")


def test_what_is_absent_means_what_it_means_to_transformers() -> None:
    mistral = {key: value for key, value in MIXTRAL.items() if "expert" not in key} | {"model_type": "mistral"}
    assert read_hf_config(mistral, "config.json")[1].model.max_position_embeddings == 32768
    del mistral["sliding_window"]
    with pytest.raises(
        CheckpointError, match=r"sliding_window \(absent, which to transformers means 4096\) must be null"
    ):
        read_hf_config(mistral, "config.json")
    qwen = {key: value for key, value in QWEN3.items() if "expert" not in key and key not in ("head_dim", *_OF_MOE)}
    assert read_hf_config({**qwen, "model_type": "qwen3"}, "config.json")[1].model.kv_channels == 128


_OF_MOE = ("decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size", "norm_topk_prob")


@pytest.mark.parametrize("key", ["qk_clip", "embedding_multiplier", "no_rope_layers", "per_layer_config"])
def test_keys_that_nobody_knows_are_refused(key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{key} \(2.0\) must be absent, .*give --ignore-settings {key}"):
        read_hf_config({**MIXTRAL, key: 2.0}, "config.json")
    _, _, notices = read_hf_config({**MIXTRAL, key: 2.0}, "config.json", ignored=[key])
    assert f"{key} (2.0) is ignored, as you asked" in notices[0]


def test_no_context_is_none_that_can_be_asked_for() -> None:
    with pytest.raises(CheckpointError, match=r"max_position_embeddings \(0\) must be at least 1"):
        read_hf_config({**MIXTRAL, "sliding_window": None}, "config.json", max_position_embeddings=0)


def test_a_model_that_training_refuses_is_not_converted() -> None:
    with pytest.raises(CheckpointError, match=r"cannot be trained here: moe.moe_router_topk \(1\) must be at least 2"):
        read_hf_config({**MIXTRAL, "num_experts_per_tok": 1}, "config.json")


def test_settings_that_vary() -> None:
    _, cfg, notices = read_hf_config({**MIXTRAL, "sliding_window": 4096}, "config.json", max_position_embeddings=4096)
    assert cfg.model.max_position_embeddings == 4096 and "sliding_window (4096) is dropped" in notices[0]
    _, cfg, _ = read_hf_config({**QWEN3, "norm_topk_prob": False, "decoder_sparse_step": 2, "num_hidden_layers": 4}, "")
    assert cfg.moe.moe_router_pre_softmax and cfg.moe.moe_layer_freq == "[0,1,0,1]"
    _, cfg, _ = read_hf_config({**MIXTRAL, "rope_theta": None, "rope_parameters": {"rope_theta": 5e5}}, "")
    assert cfg.model.rotary_base == 500000


def test_models_without_a_family_are_not_exported() -> None:
    _, cfg, _ = read_hf_config(MIXTRAL, "")
    cfg.model.normalization = "LayerNorm"
    with pytest.raises(CheckpointError, match=r"nearest, mixtral, differs: --normalization is LayerNorm, not RMSNorm"):
        choose_family(cfg)
    _, cfg, _ = read_hf_config(MIXTRAL, "")
    cfg.moe.moe_router_score_function = "sigmoid"
    with pytest.raises(CheckpointError, match=r"--moe-router-score-function is sigmoid, not softmax"):
        choose_family(cfg)
    with pytest.raises(CheckpointError, match=r"--model-type \(gpt2\) must be one of"):
        choose_family(cfg, "gpt2")
