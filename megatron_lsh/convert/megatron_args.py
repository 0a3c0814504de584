"""Megatron-LM's ``args`` <-> our settings. Names are mostly the same, because our flags are Megatron-LM's."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from megatron_lsh.config import Config, check_model
from megatron_lsh.config.settings import named, settings_of
from megatron_lsh.convert.source import fail
from megatron_lsh.convert.torch_file import Inert
from megatron_lsh.errors import CheckpointError, ConfigError

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
        "glu_linear_offset": 0.0, "layernorm_zero_centered_gamma": False, "rotary_scaling_factor": 1.0,
        "mup_embedding_mult": 1.0, "mup_output_mult": 1.0, "mup_width_mult": 1.0, "use_mup": False,
        "use_rotary_position_embeddings": False, "rope_type": "rope", "encoder_num_layers": None, "add_qk_norm": False,
    }
)  # fmt: skip
# What a setting whose name begins like this does, it does to the model. One that is not known must therefore be off.
_OF_THE_MODEL = re.compile(
    r"(activation_|apply_|attention_|attn_|csa_|dsa_|embedding_|engram_|experimental_|final_|glu_|hc_|heterogeneous_|hybrid_|kv_|"
    r"layernorm_|linear_|logit|mhc_|mla_|moe_|mrope_|mtp_|mup_|no_rope|norm|output_|q_lora|qk_|residual_|rope_|rotary_|scale_|"
    r"softmax_|squared_|v_head|window_|yarn)"
)
# The same by a word anywhere in the name, unless it is a fusion (another implementation) or about what is logged or scaled.
_WORDS_OF_THE_MODEL = frozenset(
    """
    geglu gelu silu relu swiglu glu gated gate gates norm layernorm rmsnorm rope rotary softcap softcapping sink sinks window
    multiplier latent mla mtp mhc gdn kda deltanet
    """.split()  # noqa: SIM905 - readable
)
# Those that change no number of the trained model, or only with another setting that must be off.
_WITHOUT_EFFECT = frozenset(
    """
    memory_efficient_layer_norm persist_layer_norm activation_offload_fraction dsa_indexer_rotate_activation
    dsa_indexer_scoring_relu dsa_indexer_skip_topk_offset dsa_indexer_topk_freq dsa_kernel_backend mhc_init_gating_factor
    mhc_num_residual_streams mhc_sinkhorn_iterations moe_combine_bwd_dtype moe_dispatch_fwd_dtype
    moe_hybridep_num_sms_preprocessing moe_paged_stash_buffer_size_factor_cpu moe_paged_stash_buffer_size_factor_cuda
    moe_paged_stash_page_size moe_router_quantile_balancing_ema
    apply_query_key_layer_scaling apply_rope_fusion apply_wd_to_qk_layernorm attention_backend attention_softmax_in_fp32
    embedding_init_method_std embedding_path kv_lora_rank layernorm_epsilon linear_conv_kernel_dim linear_key_head_dim
    linear_num_key_heads linear_num_value_heads linear_value_head_dim mla_down_proj_fusion moe_aux_loss_coeff
    moe_deepep_num_sms moe_enable_deepep moe_enable_routing_replay moe_expert_capacity_factor moe_extended_tp
    moe_flex_dispatcher_backend moe_grouped_gemm moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute
    moe_hybridep_num_sms moe_input_jitter_eps moe_layer_recompute moe_pad_expert_input_to_capacity
    moe_pad_experts_for_cuda_graph_inference moe_per_layer_logging moe_permute_fusion moe_permute_fusion_into_hybridep
    moe_router_bias_update_rate moe_router_dtype moe_router_fusion moe_router_load_balancing_type
    moe_router_padding_for_fp8 moe_router_padding_for_quantization moe_shared_expert_overlap moe_token_dispatcher_type
    moe_token_drop_policy moe_token_dropping moe_upcycling_granularity moe_use_legacy_grouped_gemm moe_use_upcycling
    moe_z_loss_coeff mtp_loss_scaling_factor mup_attn_scale_power qk_clip_alpha qk_clip_threshold qk_head_dim
    qk_pos_emb_head_dim rope_scaling_factor v_head_dim moe_router_force_load_balancing moe_router_topk_limited_devices
    """.split()  # noqa: SIM905 - readable
)


def _says_model(name: str) -> bool:
    return (
        not name.endswith(("fusion", "kernel"))
        and not name.startswith(("log_", "no_", "inference_", "rl_", "vision_", "recompute_"))
        and not _WORDS_OF_THE_MODEL.isdisjoint(name.split("_"))
    )


def config_of(args: argparse.Namespace, what: str) -> Config:
    """Our settings from Megatron-LM's. Raises CheckpointError for those that make a model that is not supported."""
    problems = []
    for name, neutral in _MUST_BE.items():
        value = getattr(args, name, neutral)
        if value not in (neutral, None) and not isinstance(value, Inert):
            problems.append(f"{name} ({value}) must be {neutral}")
    for name, value in sorted(vars(args).items()):
        unknown = name not in _SETTINGS and name not in _MUST_BE and name not in _WITHOUT_EFFECT
        on = value is not None and value is not False and not isinstance(value, Inert)
        if unknown and on and (_OF_THE_MODEL.match(name) or _says_model(name)):
            problems.append(f"{name} ({value}) must be off, because nothing here knows it")
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
    try:
        check_model(cfg)
    except ConfigError as error:
        raise CheckpointError(f"args in {what}: this model cannot be trained here: {error}") from None
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
