"""Which native tensor is which Hugging Face tensor: one row per tensor family, one table per model family.

`{i}` is the layer, `{e}` the expert: a row with `{e}` holds for every expert's slice of a stacked native tensor. A name with
`{q,k,v}` stands for several tensors, which `layout` joins. `fused` is the name in transformers 5's in-memory layout, where
the tensor equals the native one. A native tensor that the model does not have needs no row, and has none.

To add a model: a table here, its settings in hf_config.py, a name in FAMILIES.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

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
EXPERTS = (
    Row("decoder.layers.{i}.mlp.router.weight", "model.layers.{i}.mlp.gate.weight"),
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


@dataclass(frozen=True)
class Family:
    """One architecture of transformers: its ``model_type``, its class, its table."""

    model_type: str
    architecture: str
    rows: tuple[Row, ...]

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], Row]]:
        return [(re.compile(re.escape(row.native).replace(r"\{i\}", r"(\d+)")), row) for row in self.rows]

    def row(self, native: str) -> tuple[Row, int] | None:
        """The row of a native tensor and its layer (0 outside the layers); None if this family has no such tensor."""
        for pattern, row in self._patterns:
            if match := pattern.fullmatch(native):
                return row, int(match[1]) if match.groups() else 0
        return None


# Where more than one fits a model, the first is chosen.
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.model_type: family
        for family in (
            Family("mixtral", "MixtralForCausalLM", (*COMMON, *MIXTRAL_EXPERTS)),
            Family("qwen3_moe", "Qwen3MoeForCausalLM", (*COMMON, *QK_NORM, *DENSE_MLP, *EXPERTS)),
            Family("qwen2_moe", "Qwen2MoeForCausalLM", (*COMMON, *QKV_BIAS, *DENSE_MLP, *EXPERTS, *SHARED_EXPERT)),
            Family("olmoe", "OlmoeForCausalLM", (*COMMON, *QK_NORM, *EXPERTS)),
            Family("llama", "LlamaForCausalLM", (*COMMON, *DENSE_MLP)),
            Family("mistral", "MistralForCausalLM", (*COMMON, *DENSE_MLP)),
            Family("qwen3", "Qwen3ForCausalLM", (*COMMON, *QK_NORM, *DENSE_MLP)),
        )
    }
)

# Tensors that old files hold and no model needs: frequencies that follow from the settings.
IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def hub_names(row: Row, layer: int, expert: int | None = None) -> list[str]:
    """Names of the tensors that `row` joins, e.g. of {q,k,v}."""
    name = row.hub.replace("{i}", str(layer)).replace("{e}", str(expert))
    match = re.search(r"\{([^}]*)\}", name)
    if match is None:
        return [name]
    return [name[: match.start()] + part + name[match.end() :] for part in match[1].split(",")]


def per_expert(row: Row) -> bool:
    return "{e}" in row.hub


def fused_name(row: Row, layer: int) -> str | None:
    return None if row.fused is None else row.fused.replace("{i}", str(layer))
