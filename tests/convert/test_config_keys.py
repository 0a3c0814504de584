"""Keys of config.json, of every family: what transformers would compute with them is computed here, or they are refused."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_lsh.convert import load_hf, load_model
from megatron_lsh.convert.hf_config import read_hf_config
from megatron_lsh.errors import CheckpointError
from tests.convert.tiny import FAMILIES, VOCAB, hf_logits, prompts, save_tiny, tiny_config

# Of other families, or of none: each would change what a model computes.
ODD: dict[str, Any] = {
    "qk_l2_norm": True, "no_rope_layers": [0, 1], "glu_linear_offset": 1.0, "attention_chunk_size": 4, "mscale": 2.0,
    "final_logit_softcapping": 3.0, "attn_logit_softcapping": 3.0, "clip_qkv": 0.5, "residual_multiplier": 0.5,
    "layer_types": ["sliding_attention", "full_attention"], "embedding_multiplier": 2.0, "logits_scaling": 2.0,
    "attention_multiplier": 0.5, "sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.5, "rotary_dim": 4,
    "swiglu_limit": 1.0, "use_qk_norm": True, "mlp_bias": True, "attention_bias": True, "rope_interleaved": True,
    "n_group": 2, "topk_group": 1, "scoring_func": "softmax", "topk_method": "greedy", "hidden_act": "gelu",
    "sliding_window_pattern": 2, "kv_lora_rank": 8, "use_mrope": True, "first_k_dense_replace": 1,
    "query_pre_attn_scalar": 8,
}  # fmt: skip
# What a family may be given besides the keys of its class: names for rotary channels, and windows that are off or too wide.
TAKEN = {
    "mixtral": {"max_window_layers"}, "mistral": {"max_window_layers"}, "dots1": {"use_sliding_window"},
    "qwen3_moe": {"layer_types", "max_window_layers"}, "glm4_moe": {"partial_rotary_factor", "rotary_dim"},
    "minimax_m2": {"partial_rotary_factor", "use_qk_norm"},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_of_other_families_are_refused_by_name(family: str) -> None:
    base = json.loads(tiny_config(family).to_json_string(use_diff=False))
    read_hf_config(base, "config.json")
    taken = set()
    for key, value in ODD.items():
        try:
            read_hf_config({**base, key: value}, "config.json")
            taken.add(key)
        except CheckpointError as error:
            assert "config.json: " in str(error)
    assert taken - base.keys() == TAKEN.get(family, set())


def test_a_multiplier_that_is_null_is_refused() -> None:
    """transformers takes 1 / sqrt(width) for one of them then, and none for the others."""
    base = json.loads(tiny_config("granitemoe").to_json_string(use_diff=False))
    with pytest.raises(CheckpointError, match=r"attention_multiplier \(absent\) must be a positive number"):
        read_hf_config({**base, "attention_multiplier": None}, "config.json")


def other_values(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [None, not value]
    if isinstance(value, int | float):
        return [None, value * 2, value + 1, 1, 2, 0.5, value / 2]
    if isinstance(value, dict):
        return [None, {**value, "rope_theta": 500.0}, {**value, "partial_rotary_factor": 0.5}]
    if isinstance(value, list):
        return [None, [], [0], [1]]
    return [1, 2, 0.5, True, False, 4]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_any_value_of_any_key_is_computed_as_by_transformers_or_refused(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, family)
    saved = json.loads((tmp_path / "config.json").read_text())
    known = json.loads(tiny_config(family).to_json_string(use_diff=False))
    left_out = ("model_type", "architectures", "dtype", "vocab_size", "transformers_version")
    cases = [(key, value) for key in known if key not in left_out for value in other_values(known[key])]
    cases = random.Random(int(os.environ.get("FUZZ_SEED", "0"))).sample([*cases, *ODD.items()], 20)
    compared = 0
    for key, value in cases:
        (tmp_path / "config.json").write_text(json.dumps({**saved, key: value}))
        try:
            source = load_hf(tmp_path)
        except CheckpointError:
            continue
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
            expected = hf_logits(model, prompts(2, 48))
        except Exception:  # a value that transformers cannot take
            continue
        logits = load_model(source)(prompts(2, 48))[..., :VOCAB]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4, msg=f"{key}: {value}")
        compared += 1
    assert compared >= 2
