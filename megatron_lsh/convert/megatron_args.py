"""Megatron-LM's ``args`` <-> our settings. Names are mostly the same, because our flags are Megatron-LM's."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from megatron_lsh.config import Config
from megatron_lsh.config.settings import named, settings_of
from megatron_lsh.convert.source import fail
from megatron_lsh.convert.torch_file import Inert

# Settings that are read from the file's args, which have Megatron-LM's names like ours.
_SETTINGS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "group_query_attention",
    "num_query_groups", "max_position_embeddings", "seq_length", "position_embedding_type", "rotary_base",
    "rotary_percent", "rotary_interleaved", "make_vocab_size_divisible_by", "normalization", "norm_epsilon", "swiglu",
    "openai_gelu",
    "add_bias_linear", "add_qkv_bias", "qk_layernorm", "untie_embeddings_and_output_weights", "init_method_std",
    "attention_dropout", "hidden_dropout", "add_position_embedding", "num_experts", "moe_layer_freq",
    "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_shared_expert_gate", "moe_router_topk",
    "moe_router_score_function", "moe_router_pre_softmax", "moe_router_topk_scaling_factor",
    "moe_router_enable_expert_bias", "moe_router_num_groups", "moe_router_group_topk",
)  # fmt: skip
# Settings that make another model, and the value under which they do not.
_MUST_BE: Mapping[str, Any] = MappingProxyType(
    {
        "apply_layernorm_1p": False, "squared_relu": False, "multi_latent_attention": False, "use_rope_scaling": False,
        "rotary_seq_len_interpolation_factor": None, "mtp_num_layers": None,
        "moe_latent_size": None, "window_size": None,
        "moe_apply_probs_on_input": False, "pipeline_model_parallel_size": 1,
        "num_layers_per_virtual_pipeline_stage": None, "is_hybrid_model": False, "softmax_type": "vanilla",
    }
)  # fmt: skip


def config_of(args: argparse.Namespace, what: str) -> Config:
    """Our settings from Megatron-LM's. Raises CheckpointError for those that make a model that is not supported."""
    problems = []
    for name, neutral in _MUST_BE.items():
        value = getattr(args, name, neutral)
        if value not in (neutral, None) and not isinstance(value, Inert):
            problems.append(f"{name} ({value}) must be {neutral}")
    cfg = Config()
    settings = settings_of(Config)
    for name in _SETTINGS:
        value = getattr(args, name, None)
        if value is None or isinstance(value, Inert):
            continue
        setting = settings[name]
        try:
            setting.set(cfg, setting.convert(value))
            rule = setting.complaint(setting.get(cfg))
        except ValueError as error:
            rule = str(error)
        if rule is not None:
            problems.append(f"{named(name, value)} {rule}")
    fail(f"args in {what}", problems, "this model is not supported here")
    if not cfg.model.group_query_attention:
        cfg.model.num_query_groups = cfg.model.num_attention_heads or 1
    return cfg


def args_of(cfg: Config, tp: int, ep: int, padded_vocab: int, *, te: bool) -> argparse.Namespace:
    """What Megatron-LM's --use-checkpoint-args reads."""
    settings = settings_of(Config)
    values = {name: settings[name].get(cfg) for name in _SETTINGS}
    if str(values["moe_layer_freq"]).isdigit():
        values["moe_layer_freq"] = int(values["moe_layer_freq"])
    return argparse.Namespace(
        **values,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=1,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=tp,
        padded_vocab_size=padded_vocab,
        transformer_impl="transformer_engine" if te else "local",
        moe_grouped_gemm=te and cfg.moe.num_experts is not None,
        iteration=0,
        consumed_train_samples=0,
        consumed_valid_samples=0,
    )
