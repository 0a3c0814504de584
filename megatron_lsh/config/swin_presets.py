"""``--preset``: the published Swin and Swin-MoE models.

Swin: table 7 of arXiv:2103.14030. Swin-MoE: the configurations configs/swinmoe/*_192_*_22k.yaml of
microsoft/Swin-Transformer (commit f82860b); its parameters are in table 11 of arXiv:2206.03382.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_WIDTHS = MappingProxyType({"t": 96, "s": 96, "b": 128, "l": 192})
_DROP_PATH = MappingProxyType({"t": 0.2, "s": 0.3, "b": 0.5, "l": 0.2})
_MOE = MappingProxyType(
    {
        "init_method_std": 0.005,
        "moe_router_topk": 1,
        "moe_router_pre_softmax": True,
        "moe_expert_capacity_factor": 1.25,
        "moe_capacity_rounding": "tutel",
        "moe_token_drop_policy": "batch-priority",
        "moe_router_gate_noise": 1.0,
        "moe_router_load_balancing_type": "load_importance",
        "moe_aux_loss_coeff": 0.01,
        "moe_expert_dropout": 0.1,
    }
)


def _swin(size: str) -> dict[str, Any]:
    return {
        "img_h": 224,
        "hidden_size": _WIDTHS[size],
        "num_attention_heads": _WIDTHS[size] // 32,
        "swin_depths": [2, 2, 6 if size == "t" else 18, 2],
        "swin_window_size": 7,
        "swin_position_bias": "table",
        "drop_path_rate": _DROP_PATH[size],
        "num_classes": 1000,
    }


def _swin_moe(size: str, experts: int | None) -> dict[str, Any]:
    settings = _swin(size) | {
        "img_h": 192,
        "swin_window_size": 12,
        "swin_position_bias": "mlp",
        "add_bias_fc2": False,
        "drop_path_rate": {"s": 0.2, "b": 0.2 if experts is None else 0.3}[size],
        "num_classes": 21841,
    }
    return settings if experts is None else settings | {"num_experts": experts} | dict(_MOE)


PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        **{f"swin-{size}": _swin(size) for size in "tsbl"},
        **{f"swin-moe-{size}1": _swin_moe(size, None) for size in "sb"},
        **{f"swin-moe-s{experts}": _swin_moe("s", experts) for experts in (8, 16, 32, 64, 128)},
        **{f"swin-moe-b{experts}": _swin_moe("b", experts) for experts in (8, 16, 32)},
    }
)
"""name -> setting -> value"""
