"""Models of shapes that nobody would choose, from transformers and back: sizes, groups and widths without a factor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lsh.convert import load_hf, load_model, load_native, save_hf, save_native
from tests.convert.helpers import QUIET, assert_bit_equal, hf_tensors
from tests.convert.tiny import VOCAB, hf_logits, prompts, save_tiny

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "three heads to a group, widths without a factor": (
        "mixtral",
        {"hidden_size": 40, "intermediate_size": 56, "num_attention_heads": 6, "head_dim": 12, "num_local_experts": 5}
        | {"num_experts_per_tok": 3, "tie_word_embeddings": True, "rope_theta": 12345.0, "rms_norm_eps": 3e-5},
    ),
    "as many groups as heads, every expert": (
        "mixtral",
        {
            "hidden_size": 32,
            "intermediate_size": 24,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "num_experts_per_tok": 4,
        },
    ),
    "dense layers by a step and by name": (
        "qwen3_moe",
        {
            "hidden_size": 36,
            "intermediate_size": 52,
            "moe_intermediate_size": 20,
            "num_hidden_layers": 6,
            "head_dim": 10,
        }
        | {
            "num_experts": 6,
            "num_experts_per_tok": 4,
            "norm_topk_prob": False,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
        }
        | {"tie_word_embeddings": False},
    ),
    "a shared expert wider than the layer": (
        "qwen2_moe",
        {"hidden_size": 48, "intermediate_size": 44, "moe_intermediate_size": 28, "shared_expert_intermediate_size": 72}
        | {
            "num_attention_heads": 6,
            "num_experts": 10,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            "mlp_only_layers": [],
        }
        | {"tie_word_embeddings": True, "rope_theta": 1e6},
    ),
    "norms of all heads together, with groups": (
        "olmoe",
        {
            "hidden_size": 48,
            "intermediate_size": 32,
            "num_attention_heads": 6,
            "num_experts": 6,
            "num_experts_per_tok": 3,
        }
        | {"norm_topk_prob": True, "tie_word_embeddings": True},
    ),
    "five heads to a group": (
        "llama",
        {
            "hidden_size": 40,
            "intermediate_size": 72,
            "num_attention_heads": 10,
            "head_dim": 6,
            "tie_word_embeddings": True,
        },
    ),
    "a window as long as the context": ("mistral", {"hidden_size": 40, "head_dim": 14, "sliding_window": 64}),
    "narrower heads than the layer, tied": ("qwen3", {"hidden_size": 36, "num_attention_heads": 6, "head_dim": 10}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_odd_shapes_compute_what_transformers_does_and_come_back_to_the_bit(shape: str, tmp_path: Path) -> None:
    family, changes = SHAPES[shape]
    expected = hf_logits(save_tiny(tmp_path / "hf", family, **changes), prompts(2, 48))
    source = load_hf(tmp_path / "hf")
    logits = load_model(source)(prompts(2, 48))[..., :VOCAB]
    torch.testing.assert_close(logits, expected, rtol=0, atol=5e-5)
    save_native(source, tmp_path / "native", checks=QUIET)
    save_hf(load_native(tmp_path / "native"), tmp_path / "back", checks=QUIET)
    assert_bit_equal(hf_tensors(tmp_path / "back"), hf_tensors(tmp_path / "hf"))
