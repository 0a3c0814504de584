"""``ModelShape``: the sizes of a transformer, of a configuration that ``validate`` has completed."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lsh.config.model import ModelConfig
from megatron_lsh.config.settings import named
from megatron_lsh.errors import ConfigError


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the dense transformer, all known and consistent."""

    num_layers: int
    hidden: int
    """D, width of the residual stream"""
    ffn: int
    """F, width of the dense feed-forward layer (of one half of fc1 with SwiGLU)"""
    heads: int
    head_dim: int
    query_groups: int
    """key/value heads; equals `heads` without grouped queries"""

    @classmethod
    def from_config(cls, cfg: ModelConfig) -> ModelShape:
        """Raises ConfigError for a size that is missing or does not fit the others."""
        num_layers = _required(cfg, "num_layers")
        hidden = _required(cfg, "hidden_size")
        heads = _required(cfg, "num_attention_heads")
        if cfg.kv_channels is None and hidden % heads:
            raise ConfigError(
                f"model.hidden_size ({hidden}) must be divisible by model.num_attention_heads ({heads}): change "
                "--hidden-size or --num-attention-heads, or give --kv-channels"
            )
        query_groups = cfg.num_query_groups if cfg.group_query_attention else heads
        if heads % query_groups:
            raise ConfigError(
                f"model.num_attention_heads ({heads}) must be divisible by model.num_query_groups ({query_groups}): change "
                "--num-attention-heads or --num-query-groups"
            )
        return cls(
            num_layers=num_layers,
            hidden=hidden,
            ffn=_required(cfg, "ffn_hidden_size"),
            heads=heads,
            head_dim=cfg.kv_channels or hidden // heads,
            query_groups=query_groups,
        )


def _required(cfg: ModelConfig, name: str) -> int:
    value: int | None = getattr(cfg, name)
    if value is None or value < 1:
        raise ConfigError(f"{named(f'model.{name}', value)} must be at least 1: set --{name.replace('_', '-')}")
    return value
