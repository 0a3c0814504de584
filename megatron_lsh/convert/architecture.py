"""What of a configuration makes a model the model it is: the settings that two formats must agree on."""

from __future__ import annotations

from typing import Any

from megatron_lsh.config import Config, moe_layer_pattern
from megatron_lsh.models.shape import ModelShape


def moe_pattern(cfg: Config) -> list[bool]:
    """For each layer, whether it is a mixture of experts."""
    layers = ModelShape.from_config(cfg.model).num_layers
    return [False] * layers if cfg.moe.num_experts is None else moe_layer_pattern(cfg.moe.moe_layer_freq, layers)


def architecture(cfg: Config) -> dict[str, Any]:
    """Setting -> effective value. Settings without effect on this model (widths of layers it does not have) are None."""
    model, moe, shape = cfg.model, cfg.moe, ModelShape.from_config(cfg.model)
    pattern = moe_pattern(cfg)
    facts: dict[str, Any] = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden,
        "ffn_hidden_size": None if all(pattern) else shape.ffn,
        "num_attention_heads": shape.heads,
        "kv_channels": shape.head_dim,
        "num_query_groups": shape.query_groups,
        "max_position_embeddings": model.max_position_embeddings,
        "position_embedding_type": model.position_embedding_type,
        "rotary_base": model.rotary_base if model.position_embedding_type == "rope" else None,
        "rotary_interleaved": model.rotary_interleaved and model.position_embedding_type == "rope",
        "rotary_percent": model.rotary_percent if model.position_embedding_type == "rope" else None,
        "vocab_size": model.vocab_size,
        "normalization": model.normalization,
        "norm_epsilon": model.norm_epsilon,
        "apply_residual_connection_post_layernorm": model.apply_residual_connection_post_layernorm,
        "swiglu": model.swiglu,
        "openai_gelu": None if model.swiglu else model.openai_gelu,
        "add_bias_linear": model.add_bias_linear,
        "add_qkv_bias": model.add_bias_linear or model.add_qkv_bias,
        "qk_layernorm": model.qk_layernorm,
        "qk_layernorm_width": model.qk_layernorm_width if model.qk_layernorm else None,
        "untie_embeddings_and_output_weights": model.untie_embeddings_and_output_weights,
        "moe_layer_freq": pattern,
    }
    if any(pattern):
        facts |= {
            "num_experts": moe.num_experts,
            "moe_ffn_hidden_size": moe.moe_ffn_hidden_size or shape.ffn,
            "moe_latent_size": moe.moe_latent_size,
            "moe_shared_expert_intermediate_size": moe.moe_shared_expert_intermediate_size,
            "moe_shared_expert_gate": moe.moe_shared_expert_gate,
            "moe_router_topk": moe.moe_router_topk,
            "moe_router_score_function": moe.moe_router_score_function,
            "moe_router_pre_softmax": moe.moe_router_pre_softmax,
            "moe_router_topk_scaling_factor": moe.moe_router_topk_scaling_factor,
            "moe_router_num_groups": moe.moe_router_num_groups if moe.moe_router_group_topk else None,
            "moe_router_group_topk": moe.moe_router_group_topk,
            "moe_router_enable_expert_bias": moe.moe_router_enable_expert_bias,
        }
    return facts


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Flags whose values differ: ``--swiglu is False, not True``."""
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    return [f"--{name.replace('_', '-')} is {_text(ours.get(name))}, not {_text(theirs.get(name))}" for name in names]


def _text(value: Any) -> str:
    return str([int(entry) for entry in value]).replace(" ", "") if isinstance(value, list) else str(value)
