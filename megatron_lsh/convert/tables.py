"""Which native tensor is which Hugging Face tensor: one row per tensor family, one table per model family.

`{i}` is the layer, `{e}` the expert: a row with `{e}` holds for every expert's slice of a stacked native tensor. A name with
`{q,k,v}` stands for several tensors, which `layout` joins. `fused` is the name in transformers 5's in-memory layout, where
the tensor equals the native one. A native tensor that the model does not have needs no row, and has none.

To add a model: its rows, its traits and its name in FAMILIES; hf_config.py reads and writes config.json by the traits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

from megatron_lsh.convert.layouts import GATE_UP, GATE_UP_ROWS, QKV, SAME, Layout


@dataclass(frozen=True)
class Row:
    """One tensor family."""

    native: str
    hub: str
    layout: Layout = SAME
    fused: str | None = None


COMMON = (
    Row("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    Row("decoder.layers.{i}.input_layernorm.weight", "model.layers.{i}.input_layernorm.weight"),
    Row("decoder.layers.{i}.self_attention.linear_qkv.weight", "model.layers.{i}.self_attn.{q,k,v}_proj.weight", QKV),
    Row("decoder.layers.{i}.self_attention.linear_proj.weight", "model.layers.{i}.self_attn.o_proj.weight"),
    Row("decoder.layers.{i}.pre_mlp_layernorm.weight", "model.layers.{i}.post_attention_layernorm.weight"),
    Row("decoder.final_layernorm.weight", "model.norm.weight"),
    Row("output_layer.weight", "lm_head.weight"),
)
QKV_BIAS = (
    Row("decoder.layers.{i}.self_attention.linear_qkv.bias", "model.layers.{i}.self_attn.{q,k,v}_proj.bias", QKV),
)
QK_NORM = (
    Row("decoder.layers.{i}.self_attention.q_layernorm.weight", "model.layers.{i}.self_attn.q_norm.weight"),
    Row("decoder.layers.{i}.self_attention.k_layernorm.weight", "model.layers.{i}.self_attn.k_norm.weight"),
)
DENSE_MLP = (
    Row("decoder.layers.{i}.mlp.linear_fc1.weight", "model.layers.{i}.mlp.{gate,up}_proj.weight", GATE_UP),
    Row("decoder.layers.{i}.mlp.linear_fc2.weight", "model.layers.{i}.mlp.down_proj.weight"),
)
ROUTER = (Row("decoder.layers.{i}.mlp.router.weight", "model.layers.{i}.mlp.gate.weight"),)
EXPERT_BIAS = (Row("decoder.layers.{i}.mlp.router.expert_bias", "model.layers.{i}.mlp.gate.e_score_correction_bias"),)
EXPERTS = (
    *ROUTER,
    Row(
        "decoder.layers.{i}.mlp.experts.linear_fc1.weight",
        "model.layers.{i}.mlp.experts.{e}.{gate,up}_proj.weight",
        GATE_UP_ROWS,
        fused="model.layers.{i}.mlp.experts.gate_up_proj",
    ),
    Row(
        "decoder.layers.{i}.mlp.experts.linear_fc2.weight",
        "model.layers.{i}.mlp.experts.{e}.down_proj.weight",
        fused="model.layers.{i}.mlp.experts.down_proj",
    ),
)
SHARED_EXPERT = (
    Row(
        "decoder.layers.{i}.mlp.shared_experts.linear_fc1.weight",
        "model.layers.{i}.mlp.shared_expert.{gate,up}_proj.weight",
        GATE_UP,
    ),
    Row(
        "decoder.layers.{i}.mlp.shared_experts.linear_fc2.weight", "model.layers.{i}.mlp.shared_expert.down_proj.weight"
    ),
    Row("decoder.layers.{i}.mlp.shared_experts.gate_weight", "model.layers.{i}.mlp.shared_expert_gate.weight"),
)
SHARED_EXPERTS = (
    Row(
        "decoder.layers.{i}.mlp.shared_experts.linear_fc1.weight",
        "model.layers.{i}.mlp.shared_experts.{gate,up}_proj.weight",
        GATE_UP,
    ),
    Row(
        "decoder.layers.{i}.mlp.shared_experts.linear_fc2.weight",
        "model.layers.{i}.mlp.shared_experts.down_proj.weight",
    ),
)
MIXTRAL_EXPERTS = (
    Row(
        "decoder.layers.{i}.mlp.router.weight",
        "model.layers.{i}.block_sparse_moe.gate.weight",
        fused="model.layers.{i}.mlp.gate.weight",
    ),
    Row(
        "decoder.layers.{i}.mlp.experts.linear_fc1.weight",
        "model.layers.{i}.block_sparse_moe.experts.{e}.{w1,w3}.weight",
        GATE_UP_ROWS,
        fused="model.layers.{i}.mlp.experts.gate_up_proj",
    ),
    Row(
        "decoder.layers.{i}.mlp.experts.linear_fc2.weight",
        "model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight",
        fused="model.layers.{i}.mlp.experts.down_proj",
    ),
)
MINIMAX_EXPERT_BIAS = (
    Row(
        "decoder.layers.{i}.mlp.router.expert_bias",
        "model.layers.{i}.block_sparse_moe.e_score_correction_bias",
        fused="model.layers.{i}.mlp.e_score_correction_bias",
    ),
)
GRANITE_EXPERTS = (  # the hub's files hold the experts of a layer stacked, as native tensors do
    Row(
        "decoder.layers.{i}.mlp.router.weight",
        "model.layers.{i}.block_sparse_moe.router.layer.weight",
        fused="model.layers.{i}.block_sparse_moe.router.weight",
    ),
    Row(
        "decoder.layers.{i}.mlp.experts.linear_fc1.weight",
        "model.layers.{i}.block_sparse_moe.input_linear.weight",
        fused="model.layers.{i}.block_sparse_moe.experts.gate_up_proj",
    ),
    Row(
        "decoder.layers.{i}.mlp.experts.linear_fc2.weight",
        "model.layers.{i}.block_sparse_moe.output_linear.weight",
        fused="model.layers.{i}.block_sparse_moe.experts.down_proj",
    ),
)


@dataclass(frozen=True)
class Traits:
    """What transformers' class of a family computes, and under which keys its config.json says the rest.

    Attributes:
        defaults: what transformers takes for absent keys, where that is not nothing.
        qkv_bias: whether queries, keys and values have biases: "no", "yes", or as the key `attention_bias` says.
        qk_norm: over what queries and keys are normalised: "no", "head", "full", or "head" as the key `use_qk_norm` says.
        own_head_dim: the key `head_dim` may differ from hidden_size / num_attention_heads.
        window: when attention is windowed: "no", by the key `sliding_window` alone ("always"), with `use_sliding_window`
            ("switch"), or in layers from `max_window_layers` on ("layers").
        partial_rotary: a share of the channels may be rotated.
        scores: of the router, "softmax" or "sigmoid" (with an expert bias); empty for a dense family.
        num_experts: key with the number of experts.
        expert_width: key with the width of an expert.
        dense_layers: which layers have no experts: none (""), by `decoder_sparse_step` and `mlp_only_layers` ("step"), or
            the first `first_k_dense_replace` ("first").
        weights_normalised: routing weights always add up to one; else as the key `norm_topk_prob` says.
        shared: shared expert: none (""), with a gate ("gated"), or `n_shared_experts` times as wide as an expert ("plain").
        multipliers: embeddings, attention, residuals and logits are scaled by keys.
        fixed: keys that may be there, with the values under which they ask for nothing else.
        unused: further keys of its files that transformers does not read.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    qkv_bias: str = "no"
    qk_norm: str = "no"
    own_head_dim: bool = True
    window: str = "no"
    partial_rotary: bool = False
    scores: str = ""
    num_experts: str = "num_experts"
    expert_width: str = "intermediate_size"
    dense_layers: str = ""
    weights_normalised: bool = False
    shared: str = ""
    multipliers: bool = False
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """One architecture of transformers: its ``model_type``, its class, its table, and the rest of it."""

    model_type: str
    architecture: str
    rows: tuple[Row, ...]
    traits: Traits

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], Row]]:
        return [(re.compile(re.escape(row.native).replace(r"\{i\}", r"(\d+)")), row) for row in self.rows]

    def row(self, native: str) -> tuple[Row, int] | None:
        """The row of a native tensor and its layer (0 outside the layers); None if this family has no such tensor."""
        for pattern, row in self._patterns:
            if match := pattern.fullmatch(native):
                return row, int(match[1]) if match.groups() else 0
        return None


MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
_QWEN = {"rms_norm_eps": 1e-6, "sliding_window": 4096, "use_sliding_window": False}
_BALANCED = {  # the routing of DeepSeek-V3: sigmoid scores, an expert bias, groups
    "rms_norm_eps": 1e-5, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "n_shared_experts": 1,
    "norm_topk_prob": True,
}  # fmt: skip
_SIGMOID_FIXED = {
    "scoring_func": ("sigmoid", "noaux_tc", None), "topk_method": ("noaux_tc", None), "moe_layer_freq": (1, None),
}  # fmt: skip

# Where more than one fits a model, the first is chosen.
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.model_type: family
        for family in (
            Family(
                "mixtral", "MixtralForCausalLM", (*COMMON, *MIXTRAL_EXPERTS),
                Traits(
                    {"rope_theta": 1e6, "rms_norm_eps": 1e-5}, window="always", scores="softmax",
                    num_experts="num_local_experts", weights_normalised=True,
                ),
            ),
            Family(
                "qwen3_moe", "Qwen3MoeForCausalLM", (*COMMON, *QK_NORM, *DENSE_MLP, *EXPERTS),
                Traits(
                    _QWEN, qk_norm="head", window="switch", scores="softmax", expert_width="moe_intermediate_size",
                    dense_layers="step",
                ),
            ),
            Family(
                "qwen2_moe", "Qwen2MoeForCausalLM", (*COMMON, *QKV_BIAS, *DENSE_MLP, *EXPERTS, *SHARED_EXPERT),
                Traits(
                    _QWEN, qkv_bias="yes", own_head_dim=False, window="switch", scores="softmax",
                    expert_width="moe_intermediate_size", dense_layers="step", shared="gated",
                    fixed={"qkv_bias": (True, None)},
                ),
            ),
            Family(
                "olmoe", "OlmoeForCausalLM", (*COMMON, *QK_NORM, *EXPERTS),
                Traits(
                    {"rms_norm_eps": 1e-5}, qk_norm="full", own_head_dim=False, scores="softmax",
                    fixed={"clip_qkv": (None,)},
                ),
            ),
            Family("llama", "LlamaForCausalLM", (*COMMON, *DENSE_MLP), Traits(fixed={"mlp_bias": (False, None)})),
            Family(
                "mistral", "MistralForCausalLM", (*COMMON, *DENSE_MLP), Traits({"sliding_window": 4096}, window="always")
            ),
            Family(
                "qwen3", "Qwen3ForCausalLM", (*COMMON, *QK_NORM, *DENSE_MLP),
                Traits({**_QWEN, "head_dim": 128}, qk_norm="head", window="switch"),
            ),
            Family(
                "qwen2", "Qwen2ForCausalLM", (*COMMON, *QKV_BIAS, *DENSE_MLP),
                Traits(_QWEN, qkv_bias="yes", window="switch"),
            ),
            Family(
                "dots1", "Dots1ForCausalLM", (*COMMON, *QK_NORM, *DENSE_MLP, *EXPERTS, *EXPERT_BIAS, *SHARED_EXPERTS),
                Traits(
                    {
                        **_BALANCED, "rms_norm_eps": 1e-6, "n_shared_experts": None, "norm_topk_prob": False,
                        "sliding_window": 4096, "max_window_layers": 62, "first_k_dense_replace": 0,
                    },
                    qk_norm="head", window="layers", scores="sigmoid", num_experts="n_routed_experts",
                    expert_width="moe_intermediate_size", dense_layers="first", shared="plain", fixed=_SIGMOID_FIXED,
                    unused=("use_sliding_window",),
                ),
            ),
            Family(
                "glm4_moe", "Glm4MoeForCausalLM",
                (*COMMON, *QKV_BIAS, *QK_NORM, *DENSE_MLP, *EXPERTS, *EXPERT_BIAS, *SHARED_EXPERTS),
                Traits(
                    {**_BALANCED, "partial_rotary_factor": 0.5, "first_k_dense_replace": 1, "use_qk_norm": False},
                    qkv_bias="key", qk_norm="key", partial_rotary=True, scores="sigmoid", num_experts="n_routed_experts",
                    expert_width="moe_intermediate_size", dense_layers="first", shared="plain", fixed=_SIGMOID_FIXED,
                ),
            ),
            Family(
                "solar_open", "SolarOpenForCausalLM",
                (*COMMON, *QKV_BIAS, *EXPERTS, *EXPERT_BIAS, *SHARED_EXPERTS),
                Traits(
                    {**_BALANCED, "rope_theta": 1e6, "head_dim": 128}, qkv_bias="key", scores="sigmoid",
                    num_experts="n_routed_experts", expert_width="moe_intermediate_size", shared="plain",
                    fixed={**_SIGMOID_FIXED, "first_k_dense_replace": (0, None), "use_qk_norm": (False, None)},
                    unused=("intermediate_size",),
                ),
            ),
            Family(
                "minimax_m2", "MiniMaxM2ForCausalLM", (*COMMON, *QK_NORM, *MIXTRAL_EXPERTS, *MINIMAX_EXPERT_BIAS),
                Traits(
                    {"rope_theta": 5e6, "head_dim": 128}, qk_norm="full", partial_rotary=True, scores="sigmoid",
                    num_experts="num_local_experts", weights_normalised=True,
                    fixed={
                        "scoring_func": ("sigmoid", None), "use_qk_norm": (True, None), "qk_norm_type": ("per_layer", None),
                        "use_routing_bias": (True, None), "shared_intermediate_size": (0, None), "sliding_window": (None,),
                    },
                    unused=("attn_type_list", "mtp_transformer_layers", "num_mtp_modules", "use_mtp"),
                ),
            ),
            Family(
                "granitemoe", "GraniteMoeForCausalLM", (*COMMON, *GRANITE_EXPERTS),
                Traits(
                    dict.fromkeys(MULTIPLIERS, 1.0), scores="softmax", num_experts="num_local_experts",
                    weights_normalised=True, multipliers=True,
                ),
            ),
        )
    }
)  # fmt: skip

# Tensors that old files hold and no model needs: frequencies that follow from the settings.
IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def hub_names(row: Row, layer: int, expert: int | None = None) -> list[str]:
    """Names of the tensors that `row` joins, e.g. of {q,k,v}."""
    name = row.hub.replace("{i}", str(layer)).replace("{e}", str(expert))
    match = re.search(r"\{([^}]*)\}", name)
    if match is None:
        return [name]
    return [name[: match.start()] + part + name[match.end() :] for part in match[1].split(",")]


def layer_of(hub: str) -> int | None:
    """Number of the layer that a tensor of the hub layout belongs to."""
    match = re.match(r"model\.layers\.(\d{1,9})\.", hub)
    return int(match[1]) if match else None


def per_expert(row: Row) -> bool:
    return "{e}" in row.hub


def fused_name(row: Row, layer: int) -> str | None:
    return None if row.fused is None else row.fused.replace("{i}", str(layer))
