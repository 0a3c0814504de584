"""config.json of a Hugging Face model <-> our settings.

Reading knows every key that changes what a model computes, and refuses what this framework cannot compute. Writing is
checked by reading: a family fits a model if the config.json written for it reads back as the same architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_lsh.config import Config
from megatron_lsh.convert.architecture import architecture, differences, moe_pattern
from megatron_lsh.convert.tables import FAMILIES, Family
from megatron_lsh.errors import CheckpointError

_MOE = ("mixtral", "qwen3_moe", "qwen2_moe", "olmoe")
_SPARSE_STEP = ("qwen3_moe", "qwen2_moe")  # may have dense layers in between
_OWN_HEAD_DIM = ("mixtral", "qwen3_moe", "llama", "mistral", "qwen3")  # head_dim need not be hidden_size / heads
_WINDOW_SWITCH = ("qwen3_moe", "qwen2_moe", "qwen3")  # sliding_window counts only with use_sliding_window
_DEFAULT_THETA = {"mixtral": 1e6}
_DEFAULT_EPSILON = {"mixtral": 1e-5, "olmoe": 1e-5}
# Keys of a reference config.json that would contradict, or are spelled differently by the next version of transformers.
_NOT_COPIED = (
    "quantization_config", "auto_map", "rope_parameters", "rope_scaling", "dtype", "torch_dtype", "_name_or_path",
    "layer_types", "num_local_experts", "num_experts", "transformers_version", "max_window_layers", "head_dim",
)  # fmt: skip


class _Keys:
    """config.json with errors that name file, key, value, rule and remedy."""

    def __init__(self, document: Mapping[str, Any], where: str) -> None:
        self.document, self.where = document, where

    def number(self, *names: str, default: Any = None) -> Any:
        """The first of these keys that has a value; required unless there is a `default`."""
        for name in names:
            if self.document.get(name) is not None:
                value = self.document[name]
                if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                    raise self.error(names[0], "a positive number", "download the file again")
                return value
        if default is None:
            raise self.error(names[0], "given", "use the config.json that belongs to these weights")
        return default

    def switch(self, name: str, default: bool = False) -> bool:
        value = self.document.get(name)
        return default if value is None else bool(value)

    def must_be(self, name: str, *allowed: Any) -> None:
        if self.document.get(name) not in allowed:
            rule = " or ".join(str(value) for value in allowed if value is not None)
            raise self.error(name, rule, "this model computes something that is not implemented here")

    def error(self, name: str, rule: str, remedy: str) -> CheckpointError:
        value = self.document.get(name)
        return CheckpointError(
            f"{self.where}: {name} ({'absent' if value is None else value}) must be {rule}: {remedy}"
        )


def read_hf_config(
    document: Mapping[str, Any], where: str, max_position_embeddings: int | None = None
) -> tuple[Family, Config, list[str]]:
    """The family, the settings and notices about what was passed over.

    Args:
        where: path of the file, for messages.
        max_position_embeddings: replaces the file's (a shorter context makes a sliding window superfluous).

    Raises:
        CheckpointError: an architecture or a setting that is not supported, by name.
    """
    keys = _Keys(document, where)
    family = FAMILIES.get(str(document.get("model_type")))
    if family is None:
        raise keys.error("model_type", f"one of {', '.join(FAMILIES)}", "other architectures are not supported")
    kind = family.model_type
    keys.must_be("quantization_config", None)
    keys.must_be("hidden_act", "silu", None)
    for bias in ("attention_bias", "mlp_bias"):
        keys.must_be(bias, False, None)
    if kind == "olmoe":
        keys.must_be("clip_qkv", None)
    positions = max_position_embeddings or int(keys.number("max_position_embeddings"))
    notices = _check_window(keys, kind, positions)

    cfg = Config()
    model = cfg.model
    model.num_layers = int(keys.number("num_hidden_layers"))
    model.hidden_size = int(keys.number("hidden_size"))
    model.ffn_hidden_size = int(keys.number("intermediate_size"))
    heads = model.num_attention_heads = int(keys.number("num_attention_heads"))
    model.num_query_groups = int(keys.number("num_key_value_heads", default=heads))
    model.group_query_attention = model.num_query_groups != heads
    model.kv_channels = int(keys.number("head_dim", default=model.hidden_size // heads))
    if kind not in _OWN_HEAD_DIM and model.kv_channels * heads != model.hidden_size:
        raise keys.error("head_dim", f"hidden_size / num_attention_heads in a {kind}", "check the file")
    model.seq_length = model.max_position_embeddings = positions
    model.position_embedding_type = "rope"
    model.rotary_base = _rotary_base(keys, kind)
    model.vocab_size = int(keys.number("vocab_size"))
    model.normalization = "RMSNorm"
    model.norm_epsilon = float(keys.number("rms_norm_eps", default=_DEFAULT_EPSILON.get(kind, 1e-6)))
    model.swiglu = True
    model.add_bias_linear = False
    model.add_qkv_bias = kind == "qwen2_moe"
    if kind == "qwen2_moe":
        keys.must_be("qkv_bias", True, None)
    model.qk_layernorm = kind in ("qwen3", "qwen3_moe", "olmoe")
    model.qk_layernorm_width = "full" if kind == "olmoe" else "head"
    model.untie_embeddings_and_output_weights = not keys.switch("tie_word_embeddings")
    model.init_method_std = float(keys.number("initializer_range", default=0.02))
    model.attention_dropout = model.hidden_dropout = 0.0
    if kind in _MOE:
        _read_moe(cfg, keys, kind)
    return family, cfg, notices


def _read_moe(cfg: Config, keys: _Keys, kind: str) -> None:
    moe = cfg.moe
    moe.num_experts = int(keys.number("num_local_experts", "num_experts"))
    moe.moe_router_topk = int(keys.number("num_experts_per_tok"))
    moe.moe_ffn_hidden_size = cfg.model.ffn_hidden_size
    if kind in _SPARSE_STEP:
        moe.moe_ffn_hidden_size = int(keys.number("moe_intermediate_size"))
        step, dense = int(keys.number("decoder_sparse_step", default=1)), keys.document.get("mlp_only_layers") or []
        layers = range(cfg.model.num_layers or 0)
        pattern = [int((layer + 1) % step == 0 and layer not in dense) for layer in layers]
        if not any(pattern):
            raise keys.error("mlp_only_layers", "such that a layer has experts", "check the file")
        if not all(pattern):
            moe.moe_layer_freq = str(pattern).replace(" ", "")
    if kind == "qwen2_moe":
        moe.moe_shared_expert_intermediate_size = int(keys.number("shared_expert_intermediate_size"))
        moe.moe_shared_expert_gate = True
    # Weights that are not normalised over the chosen experts are those of a softmax over all. (Normalised, softmax over all
    # and then top-k is softmax over the top k: Mixtral always, the others with norm_topk_prob.)
    moe.moe_router_pre_softmax = kind != "mixtral" and not keys.switch("norm_topk_prob")


def _rotary_base(keys: _Keys, kind: str) -> int:
    rope = keys.document.get("rope_parameters") or {}
    scaling = keys.document.get("rope_scaling") or {}
    for name, settings in (("rope_parameters", rope), ("rope_scaling", scaling)):
        if not isinstance(settings, Mapping):
            raise keys.error(name, "a mapping", "download the file again")
        scaled = settings.get("rope_type", settings.get("type", "default")) != "default"
        if scaled or settings.get("partial_rotary_factor", 1.0) != 1.0:
            raise keys.error(
                name, "absent or of type default", "scaled and partial rotary embeddings are not supported"
            )
    keys.must_be("partial_rotary_factor", 1.0, None)
    theta = rope.get("rope_theta") or keys.number("rope_theta", default=_DEFAULT_THETA.get(kind, 1e4))
    if theta != int(theta):
        raise keys.error("rope_theta", "a whole number", "--rotary-base takes integers")
    return int(theta)


def _check_window(keys: _Keys, kind: str, positions: int) -> list[str]:
    window = keys.document.get("sliding_window")
    if (
        window is None
        or (kind in _WINDOW_SWITCH and not keys.switch("use_sliding_window"))
        or kind in ("llama", "olmoe")
    ):
        return []
    if window < positions:
        raise keys.error(
            "sliding_window", f"absent or at least the {positions} positions",
            f"attention is not windowed here; --max-position-embeddings {window} converts it for contexts of that length",
        )  # fmt: skip
    return [f"{keys.where}: sliding_window ({window}) is dropped: no context is longer than {positions}"]


def write_hf_config(
    cfg: Config, family: Family, dtype: str | None = None, reference: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """config.json of a model of this family, in the spelling of the hub's own files.

    Args:
        dtype: type of the weights, such as "bfloat16".
        reference: another config.json (of the model this one started from) for what is no architecture, such as token ids.
    """
    facts = architecture(cfg)
    kind, pattern = family.model_type, facts["moe_layer_freq"]
    width = facts.get("moe_ffn_hidden_size") or facts["ffn_hidden_size"]
    own: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": kind,
        "vocab_size": facts["vocab_size"],
        "hidden_size": facts["hidden_size"],
        "intermediate_size": cfg.model.ffn_hidden_size if kind in _SPARSE_STEP else width,
        "num_hidden_layers": facts["num_layers"],
        "num_attention_heads": facts["num_attention_heads"],
        "num_key_value_heads": facts["num_query_groups"],
        "hidden_act": "silu",
        "max_position_embeddings": facts["max_position_embeddings"],
        "initializer_range": cfg.model.init_method_std,
        "rms_norm_eps": facts["norm_epsilon"],
        "rope_theta": float(facts["rotary_base"] or 1e4),
        "tie_word_embeddings": not facts["untie_embeddings_and_output_weights"],
        "sliding_window": None,
    }
    if kind in _WINDOW_SWITCH:
        own["use_sliding_window"] = False
    if kind in _OWN_HEAD_DIM or facts["kv_channels"] * facts["num_attention_heads"] != facts["hidden_size"]:
        own["head_dim"] = facts["kv_channels"]
    if dtype is not None:
        own["torch_dtype"] = dtype
    if kind in _MOE and any(pattern):
        own["num_local_experts" if kind == "mixtral" else "num_experts"] = facts["num_experts"]
        own["num_experts_per_tok"] = facts["moe_router_topk"]
        if kind != "mixtral":
            own["norm_topk_prob"] = not facts["moe_router_pre_softmax"]
        if kind in _SPARSE_STEP:
            own["moe_intermediate_size"] = facts["moe_ffn_hidden_size"]
            own["decoder_sparse_step"] = 1
            own["mlp_only_layers"] = [layer for layer, moe in enumerate(pattern) if not moe]
        if kind == "qwen2_moe":
            own["shared_expert_intermediate_size"] = facts["moe_shared_expert_intermediate_size"]
            own["qkv_bias"] = True
    kept = {key: value for key, value in (reference or {}).items() if key not in _NOT_COPIED}
    return {**kept, **own}


def misfits(cfg: Config, family: Family) -> list[str]:
    """Why a model is not one of this family: settings that would read back differently. Empty if it is."""
    try:
        _, back, _ = read_hf_config(write_hf_config(cfg, family), f"config.json of a {family.model_type}")
        return differences(architecture(cfg), architecture(back))
    except CheckpointError as error:
        return [str(error)]


def choose_family(cfg: Config, wanted: str | None = None) -> Family:
    """The family `wanted`, or else the first that fits. Raises CheckpointError saying what does not fit."""
    if wanted is not None and wanted not in FAMILIES:
        raise CheckpointError(f"--model-type ({wanted}) must be one of {', '.join(FAMILIES)}")
    candidates = [FAMILIES[wanted]] if wanted else list(FAMILIES.values())
    reasons = {family.model_type: misfits(cfg, family) for family in candidates}
    for family in candidates:
        if not reasons[family.model_type]:
            return family
    moe = any(moe_pattern(cfg))
    nearest = min(reasons, key=lambda kind: ((kind in _MOE) != moe, len(reasons[kind])))
    raise CheckpointError(
        f"no Hugging Face architecture that is known here is this model; the nearest, {nearest}, differs: "
        f"{'; '.join(reasons[nearest])}. Train with settings of one of {', '.join(FAMILIES)} to export the model"
    )
