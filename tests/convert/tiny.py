"""Small random Hugging Face models of every family, as transformers makes and saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCAB = 67  # neither a multiple of 128 nor even
MOE_FAMILIES = (
    "mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "dots1", "glm4_moe", "solar_open", "minimax_m2", "granitemoe",
)  # fmt: skip
FAMILIES = (*MOE_FAMILIES, "llama", "mistral", "qwen3", "qwen2")
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_BALANCED = {
    "n_routed_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "n_shared_experts": 2,
    "routed_scaling_factor": 2.5, "norm_topk_prob": True, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip
_SETTINGS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "head_dim": 8},
    "qwen3_moe": {**_SPARSE, "norm_topk_prob": True, "head_dim": 16, "tie_word_embeddings": True},
    "qwen2_moe": {
        **_SPARSE,
        "shared_expert_intermediate_size": 40,
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
        "norm_topk_prob": False,
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False},
    "llama": {},
    "mistral": {"sliding_window": None, "head_dim": 16},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "qwen2": {"head_dim": 12},
    "dots1": {**_BALANCED, "first_k_dense_replace": 1},
    "glm4_moe": {**_BALANCED, "first_k_dense_replace": 1, "attention_bias": True, "use_qk_norm": True},
    "solar_open": {**_BALANCED, "attention_bias": True},
    "minimax_m2": {"num_local_experts": 6, "num_experts_per_tok": 3, "head_dim": 16, "rotary_dim": 8},
    "granitemoe": {"num_local_experts": 6, "num_experts_per_tok": 3, "attention_multiplier": 8**-0.5},
}


def tiny_config(family: str, **changes: Any) -> Any:
    return transformers.AutoConfig.for_model(family, **{**_COMMON, **_SETTINGS[family], **changes})


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> nn.Module:
    """Random weights; norms and biases, of experts too, off one and zero, so that none hides."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() == 1:
                param.add_(torch.randn_like(param) * 0.2)
            elif param.dim() == 2 and param.abs().max() == 0:
                param.normal_(0.0, 0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.3)
        model.tie_weights()
    return model.to(dtype).eval()


def save_tiny(
    folder: Path, family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> nn.Module:
    """Save as transformers does (hub layout); returns the model."""
    model = tiny_model(family, dtype, seed, **changes)
    model.save_pretrained(folder)
    return model


def prompts(rows: int = 2, length: int = 16) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def hf_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    logits: Tensor = model.float()(tokens).logits
    return logits


def load_pretrained(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Loads as a user would, and insists that transformers found every tensor."""
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    result: nn.Module = model.eval()
    return result
