"""config.json of a Hugging Face model <-> our settings.

Reading knows every key that changes what a model computes, by the traits of its family (tables.py), and refuses what this
framework cannot compute, as well as any key that it does not know. Writing is checked by reading: a family fits a model if
the config.json written for it reads back as the same architecture.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from megatron_lsh.config import Config
from megatron_lsh.convert.architecture import architecture, differences, moe_pattern
from megatron_lsh.convert.hf_keys import WITHOUT_EFFECT, Keys
from megatron_lsh.convert.source import refuse_untrainable
from megatron_lsh.convert.tables import FAMILIES, MULTIPLIERS, Family
from megatron_lsh.errors import CheckpointError

# Of every family: keys that may be there, with the values under which they ask for nothing.
_NEUTRAL: tuple[tuple[str, Any], ...] = (
    ("quantization_config", None), ("is_encoder_decoder", False), ("add_cross_attention", False), ("is_decoder", False),
    ("cross_attention_hidden_size", None), ("tie_encoder_decoder", False), ("chunk_size_feed_forward", 0),
    ("pruned_heads", {}), ("rope_interleaved", False),
)  # fmt: skip
_MOST_LAYERS = 10_000
_ROPE_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def read_hf_config(
    document: Mapping[str, Any],
    where: str,
    max_position_embeddings: int | None = None,
    ignored: Collection[str] = (),
) -> tuple[Family, Config, list[str]]:
    """The family, the settings and notices about what was passed over.

    Args:
        where: path of the file, for messages.
        max_position_embeddings: replaces the file's (a shorter context makes a sliding window superfluous).
        ignored: keys unknown here of which the user knows that they change nothing.

    Raises:
        CheckpointError: an architecture or a setting that is not supported, or a key that is not known, by name; a model
            that breaks a rule of training.
    """
    family = FAMILIES.get(str(document.get("model_type")))
    if family is None:
        raise Keys(document, where).error(
            "model_type", f"one of {', '.join(FAMILIES)}", "other architectures are not supported"
        )
    traits = family.traits
    keys = Keys(document, where, traits.defaults)
    for name, neutral in _NEUTRAL:
        keys.must_be(name, neutral, None)
    for name, allowed in traits.fixed.items():
        keys.must_be(name, *allowed)
    for name in traits.unused:
        keys.value(name)
    keys.must_be("hidden_act", "silu", None)
    positions = keys.whole("max_position_embeddings") if max_position_embeddings is None else max_position_embeddings
    keys.value("max_position_embeddings")

    cfg = Config()
    model = cfg.model
    model.num_layers = keys.whole("num_hidden_layers", at_most=_MOST_LAYERS)
    model.hidden_size = keys.whole("hidden_size")
    model.vocab_size = keys.whole("vocab_size")
    model.seq_length = model.max_position_embeddings = positions
    model.normalization, model.swiglu, model.add_bias_linear = "RMSNorm", True, False
    model.norm_epsilon = keys.number("rms_norm_eps") or 1e-6
    model.untie_embeddings_and_output_weights = not keys.switch("tie_word_embeddings")
    model.init_method_std = keys.number("initializer_range") or model.init_method_std
    model.attention_dropout, model.hidden_dropout = keys.share("attention_dropout"), 0.0
    _read_attention(cfg, keys, family)
    notices = _check_window(keys, family, positions, model.num_layers)
    if traits.scores:
        _read_moe(cfg, keys, family)
    else:
        model.ffn_hidden_size = keys.whole("intermediate_size")
    if traits.multipliers:
        for name in MULTIPLIERS:  # see `folded_multipliers`
            if keys.number(name) is None:
                raise keys.error(name, "a positive number", "give transformers' default, 1.0, or remove the key")
    if traits.multipliers and any(factor != 1.0 for factor in _output_factors(keys)):
        model.untie_embeddings_and_output_weights = True  # each is scaled by itself
    notices += keys.refuse_unknown(ignored)
    refuse_untrainable(cfg, f"{where}: this model")
    return family, cfg, notices


def _read_attention(cfg: Config, keys: Keys, family: Family) -> None:
    model, traits = cfg.model, family.traits
    heads = model.num_attention_heads = keys.whole("num_attention_heads")
    # An absent key means another number in each family; null means one for each head.
    model.num_query_groups = heads if _is_null(keys, "num_key_value_heads") else keys.whole("num_key_value_heads")
    model.group_query_attention = model.num_query_groups != heads
    width = model.hidden_size or 0
    model.kv_channels = width // heads if keys.value("head_dim") is None else keys.whole("head_dim")
    if not traits.own_head_dim and model.kv_channels * heads != width:
        raise keys.error("head_dim", f"hidden_size / num_attention_heads in a {family.model_type}", "check the file")
    if traits.qkv_bias == "key":
        model.add_qkv_bias = keys.switch("attention_bias")
    else:  # elsewhere the key means a bias of the projection back as well
        keys.must_be("attention_bias", False, None)
        model.add_qkv_bias = traits.qkv_bias == "yes"
    model.qk_layernorm = keys.switch("use_qk_norm") if traits.qk_norm == "key" else traits.qk_norm != "no"
    model.qk_layernorm_width = "full" if traits.qk_norm == "full" else "head"
    model.position_embedding_type = "rope"
    _read_rotary(cfg, keys, family)


def _is_null(keys: Keys, name: str) -> bool:
    keys.value(name)
    return name in keys.document and keys.document[name] is None


def _read_moe(cfg: Config, keys: Keys, family: Family) -> None:
    model, moe, traits = cfg.model, cfg.moe, family.traits
    names = (traits.num_experts, *(name for name in _EXPERT_COUNTS if name != traits.num_experts))
    moe.num_experts = keys.whole(*names)
    topk = moe.moe_router_topk = keys.whole("num_experts_per_tok")
    moe.moe_ffn_hidden_size = keys.whole(traits.expert_width)
    model.ffn_hidden_size = keys.whole("intermediate_size") if traits.dense_layers else moe.moe_ffn_hidden_size
    moe.moe_layer_freq = _layer_freq(keys, traits.dense_layers, model.num_layers or 0)
    moe.moe_router_score_function = traits.scores
    normalised = traits.weights_normalised or keys.switch("norm_topk_prob")
    if traits.scores == "sigmoid":
        if traits.weights_normalised or topk > 1:  # of one expert the weight is its score
            if not normalised:
                raise keys.error("norm_topk_prob", "true", "sigmoid scores are normalised over the chosen experts here")
            if topk == 1:
                raise keys.error("num_experts_per_tok", "at least 2", "the weight of one expert would always be 1")
        elif normalised:
            raise keys.error("norm_topk_prob", "false with one expert per token", "its weight would always be 1")
        moe.moe_router_enable_expert_bias = True
        if not traits.weights_normalised:
            _read_balanced(cfg, keys)
    else:
        # Weights that are not normalised over the chosen experts are those of a softmax over all. (Normalised, softmax over
        # all and then top-k is softmax over the top k.)
        moe.moe_router_pre_softmax = not normalised
    if traits.shared == "gated":
        moe.moe_shared_expert_intermediate_size = keys.whole("shared_expert_intermediate_size")
        moe.moe_shared_expert_gate = True
    elif traits.shared == "plain":
        moe.moe_shared_expert_intermediate_size = keys.whole("n_shared_experts") * moe.moe_ffn_hidden_size


_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")


def _read_balanced(cfg: Config, keys: Keys) -> None:
    """Scaling and groups of DeepSeek-V3's router, and its layers that predict further tokens, which are left out."""
    moe = cfg.moe
    scaling = keys.number("routed_scaling_factor") or 1.0
    moe.moe_router_topk_scaling_factor = None if scaling == 1.0 else scaling
    groups, chosen = keys.whole("n_group"), keys.whole("topk_group")
    if chosen < groups:
        if moe.moe_router_topk // chosen != 2:
            raise keys.error(
                "topk_group", f"half of num_experts_per_tok ({moe.moe_router_topk})",
                "a group's score is the sum of two experts' there, and of topk / groups experts' here",
            )  # fmt: skip
        moe.moe_router_num_groups, moe.moe_router_group_topk = groups, chosen
    _count_further(keys)


def _count_further(keys: Keys) -> int:
    names = [name for name in ("num_nextn_predict_layers", "num_mtp_layers") if keys.value(name) is not None]
    return keys.whole(*names, at_least=0, at_most=_MOST_LAYERS) if names else 1


def further_layers(document: Mapping[str, Any], where: str, family: Family) -> range:
    """Numbers of layers behind the last one that predict further tokens: they are in the files, and not in the model."""
    keys = Keys(document, where, family.traits.defaults)
    layers = keys.whole("num_hidden_layers")
    predicts = family.traits.scores == "sigmoid" and not family.traits.weights_normalised
    return range(layers, layers + (_count_further(keys) if predicts else 0))


def _layer_freq(keys: Keys, dense: str, num_layers: int) -> str:
    if not dense:
        return "1"
    if dense == "first":
        name, first = "first_k_dense_replace", keys.whole("first_k_dense_replace", at_least=0)
        pattern = [int(layer >= first) for layer in range(num_layers)]
    else:
        name = "mlp_only_layers"
        step = keys.whole("decoder_sparse_step") if keys.value("decoder_sparse_step") is not None else 1
        without = keys.value(name)
        without = [] if without is None else without
        if not isinstance(without, list) or not all(type(layer) is int for layer in without):
            raise keys.error(name, "a list of layers", "download the file again")
        dense_ones = set(without)
        pattern = [int((layer + 1) % step == 0 and layer not in dense_ones) for layer in range(num_layers)]
    if not any(pattern):
        raise keys.error(name, "such that a layer has experts", "check the file")
    return "1" if all(pattern) else str(pattern).replace(" ", "")


def _read_rotary(cfg: Config, keys: Keys, family: Family) -> None:
    """As transformers 5: `rope_scaling`, the former name, goes before `rope_parameters`; what is in it, before the rest."""
    places = {name: keys.value(name) for name in ("rope_scaling", "rope_parameters")}
    for name, settings in places.items():
        if settings is not None and not isinstance(settings, Mapping):
            raise keys.error(name, "a mapping", "download the file again")
    name = "rope_scaling" if places["rope_scaling"] else "rope_parameters"
    inner = {key: value for key, value in (places[name] or {}).items() if value is not None}
    kind = inner.get("rope_type", inner.get("type", "default"))
    if kind != "default" or any(key not in _ROPE_KEYS for key in inner):
        raise keys.error(name, "absent or of type default", "scaled rotary embeddings are not supported")
    both = Keys(inner, f"{keys.where}, {name}")
    theta, factor = both.number("rope_theta"), both.number("partial_rotary_factor")
    for key, value in (("rope_theta", theta), ("partial_rotary_factor", factor)):
        outer = keys.number(key) if key in keys.document else None
        if value is not None and outer is not None and value != outer:
            raise keys.error(key, f"equal to that of {name} ({value})", "remove one of them")
    theta = theta or keys.number("rope_theta") or 1e4
    if theta != int(theta):
        raise (both if "rope_theta" in inner else keys).error(
            "rope_theta", "a whole number", "--rotary-base takes integers"
        )
    cfg.model.rotary_base = int(theta)
    if family.traits.partial_rotary and keys.value("rotary_dim") is not None:  # MiniMax' own spelling
        factor = factor or keys.whole("rotary_dim") / (cfg.model.kv_channels or 1)
    factor = factor or keys.number("partial_rotary_factor") or 1.0
    if factor > 1.0 or (factor < 1.0 and not family.traits.partial_rotary):
        raise keys.error("partial_rotary_factor", "1", f"a {family.model_type} turns all channels in transformers")
    cfg.model.rotary_percent = factor


def _check_window(keys: Keys, family: Family, positions: int, num_layers: int) -> list[str]:
    kinds, kind = keys.value("layer_types"), family.traits.window
    if kinds is not None and (not isinstance(kinds, list) or not all(isinstance(entry, str) for entry in kinds)):
        raise keys.error("layer_types", "a list of texts", "download the file again")
    by_list = bool(kinds) and kind in ("switch", "layers")
    allowed = {"full_attention", "sliding_attention"} if by_list else {"full_attention"}
    if kinds and not allowed.issuperset(kinds):
        raise keys.error("layer_types", f"of {' and '.join(sorted(allowed))}", "other kinds are not implemented here")
    if kind == "no":
        return []
    on = kind == "always" or (kind == "switch" and keys.switch("use_sliding_window"))
    last = keys.value("max_window_layers")
    if kind == "layers":
        on = last is not None and num_layers > keys.whole("max_window_layers", at_least=0)
    if by_list:
        on = "sliding_attention" in (kinds or ())
    if keys.value("sliding_window") is None or not on:
        return []
    window = keys.whole("sliding_window")
    if window < positions:
        raise keys.error(
            "sliding_window", f"null or at least the {positions} positions",
            f"attention is not windowed here; --max-position-embeddings {window} converts it for contexts of that length",
        )  # fmt: skip
    return [f"{keys.where}: sliding_window ({window}) is dropped: no context is longer than {positions}"]


def _output_factors(keys: Keys) -> tuple[float, float]:
    """Of the embedding, and of the output layer."""
    return keys.number("embedding_multiplier") or 1.0, 1.0 / (keys.number("logits_scaling") or 1.0)


def folded_multipliers(document: Mapping[str, Any], where: str, family: Family, cfg: Config) -> dict[str, float]:
    """What the weights of a family with multipliers are scaled by, so that a model without them computes the same.

    Returns: end of a native name -> factor, of those that are not 1. That of linear_qkv is for the queries.
    """
    if not family.traits.multipliers:
        return {}
    keys = Keys(document, where, family.traits.defaults)
    embedding, output = _output_factors(keys)
    residual = keys.number("residual_multiplier") or 1.0
    attention = (keys.number("attention_multiplier") or 1.0) * math.sqrt(cfg.model.kv_channels or 1)
    factors = {
        "word_embeddings.weight": embedding,
        "output_layer.weight": output,
        "self_attention.linear_qkv.weight": attention,
        "self_attention.linear_proj.weight": residual,
        "mlp.experts.linear_fc2.weight": residual,
    }
    return {name: factor for name, factor in factors.items() if not math.isclose(factor, 1.0, rel_tol=1e-9)}


def write_hf_config(
    cfg: Config, family: Family, dtype: str | None = None, reference: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """config.json of a model of this family, in the spelling of the hub's own files.

    Args:
        dtype: type of the weights, such as "bfloat16".
        reference: another config.json (of the model this one started from) for what is no architecture, such as token ids.
    """
    facts, traits = architecture(cfg), family.traits
    pattern = facts["moe_layer_freq"]
    own: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": facts["vocab_size"],
        "hidden_size": facts["hidden_size"],
        "intermediate_size": (facts.get("moe_ffn_hidden_size") if traits.scores and not traits.dense_layers else None)
        or cfg.model.ffn_hidden_size,
        "num_hidden_layers": facts["num_layers"],
        "num_attention_heads": facts["num_attention_heads"],
        "num_key_value_heads": facts["num_query_groups"],
        "hidden_act": "silu",
        "max_position_embeddings": facts["max_position_embeddings"],
        "initializer_range": cfg.model.init_method_std,
        "attention_dropout": cfg.model.attention_dropout,
        "rms_norm_eps": facts["norm_epsilon"],
        "rope_theta": float(facts["rotary_base"] or 1e4),
        "tie_word_embeddings": not facts["untie_embeddings_and_output_weights"],
    }
    if traits.window != "no":
        own["sliding_window"] = None
    if traits.window == "switch":
        own["use_sliding_window"] = False
    if traits.own_head_dim or facts["kv_channels"] * facts["num_attention_heads"] != facts["hidden_size"]:
        own["head_dim"] = facts["kv_channels"]
    if traits.partial_rotary:
        own["partial_rotary_factor"] = facts["rotary_percent"]
    if traits.qkv_bias == "key":
        own["attention_bias"] = facts["add_qkv_bias"]
    if traits.qk_norm == "key":
        own["use_qk_norm"] = facts["qk_layernorm"]
    if traits.multipliers:
        own |= dict.fromkeys(MULTIPLIERS, 1.0) | {"attention_multiplier": facts["kv_channels"] ** -0.5}
    if dtype is not None:
        own["torch_dtype"] = dtype
    if traits.scores and any(pattern):
        own |= _written_moe(facts, family, pattern)
    kept = {key: value for key, value in (reference or {}).items() if key in WITHOUT_EFFECT and key not in _NOT_COPIED}
    return {**kept, **own}


# Spelled differently by the next version of transformers, or of another model.
_NOT_COPIED = ("auto_map", "dtype", "torch_dtype", "_name_or_path", "transformers_version")


def _written_moe(facts: Mapping[str, Any], family: Family, pattern: list[bool]) -> dict[str, Any]:
    traits = family.traits
    own: dict[str, Any] = {
        traits.num_experts: facts["num_experts"],
        "num_experts_per_tok": facts["moe_router_topk"],
        traits.expert_width: facts["moe_ffn_hidden_size"],
    }
    if traits.dense_layers == "step":
        own["decoder_sparse_step"] = 1
        own["mlp_only_layers"] = [layer for layer, moe in enumerate(pattern) if not moe]
    elif traits.dense_layers == "first":
        own["first_k_dense_replace"] = pattern.index(True)
    if traits.scores == "softmax" and not traits.weights_normalised:
        own["norm_topk_prob"] = not facts["moe_router_pre_softmax"]
    if traits.scores == "sigmoid" and not traits.weights_normalised:
        own["norm_topk_prob"] = facts["moe_router_topk"] > 1
        own["routed_scaling_factor"] = facts["moe_router_topk_scaling_factor"] or 1.0
        own["n_group"] = facts["moe_router_num_groups"] or 1
        own["topk_group"] = facts["moe_router_group_topk"] or 1
        own["num_nextn_predict_layers"] = 0
    shared = facts["moe_shared_expert_intermediate_size"]
    if traits.shared == "gated":
        own["shared_expert_intermediate_size"] = shared
        own["qkv_bias"] = True
    elif traits.shared == "plain" and shared:
        own["n_shared_experts"] = shared // facts["moe_ffn_hidden_size"]
    return own


def misfits(cfg: Config, family: Family, document: Mapping[str, Any] | None = None) -> list[str]:
    """Why a model is not one of this family: settings that would read back differently. Empty if it is.

    Args:
        document: its config.json, if that has been written already.
    """
    try:
        document = document or write_hf_config(cfg, family)
        _, back, _ = read_hf_config(document, f"config.json of a {family.model_type}")
        return differences(architecture(cfg), architecture(back))
    except CheckpointError as error:
        return [str(error)]


def choose_family(cfg: Config, wanted: str | None = None) -> Family:
    """The family `wanted`, or else the first that fits. Raises CheckpointError saying what does not fit."""
    if wanted is not None and wanted not in FAMILIES:
        raise CheckpointError(f"--model-type ({wanted}) must be one of {', '.join(FAMILIES)}: change it")
    candidates = [FAMILIES[wanted]] if wanted else list(FAMILIES.values())
    reasons = {family.model_type: misfits(cfg, family) for family in candidates}
    for family in candidates:
        if not reasons[family.model_type]:
            return family
    moe = any(moe_pattern(cfg))
    nearest = min(reasons, key=lambda kind: (bool(FAMILIES[kind].traits.scores) != moe, len(reasons[kind])))
    raise CheckpointError(
        f"no Hugging Face architecture that is known here is this model; the nearest, {nearest}, differs: "
        f"{'; '.join(reasons[nearest])}. Train with settings of one of {', '.join(FAMILIES)} to export the model"
    )
