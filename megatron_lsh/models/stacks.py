"""Stacks of transformer layers, which models are made of: what layers, FLOPs and memory are counted by."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron_lsh.config.config import Config
from megatron_lsh.config.layer_pattern import moe_layer_pattern
from megatron_lsh.models.shape import ModelShape


@dataclass(frozen=True)
class Stack:
    """One run of transformer layers, of one width.

    Attributes:
        cfg: the configuration as this stack sees it: its own number of layers, length and width.
        name: such as "encoder" or "decoder", the model's attribute and the beginning of its parameters' names.
        first_layer: number of its first layer in the whole model, which names hashes and gauges of MoE layers.
        causal: whether a position sees only itself and earlier ones.
        memory_length: positions of the encoder that cross-attention reads; 0 without cross-attention.
        attended: positions that one position attends to, where those are fewer than all of a sample.
        widened: positions that attention runs on over those of a sample: above 1 where windows are filled up.
    """

    cfg: Config
    name: str
    first_layer: int = 0
    causal: bool = True
    memory_length: int = 0
    attended: int | None = None
    widened: float = 1.0

    @property
    def shape(self) -> ModelShape:
        """Sizes of its layers. Raises ConfigError for one that is missing or does not fit the others."""
        return ModelShape.from_config(self.cfg.model)

    @property
    def num_layers(self) -> int:
        return self.shape.num_layers

    @property
    def seq_length(self) -> int:
        """Positions of one sample."""
        return self.cfg.model.seq_length or 1

    def moe_pattern(self) -> list[bool]:
        """For each layer, whether it is a mixture of experts: --moe-layer-freq, which each stack counts by itself.

        Raises ConfigError for an impossible pattern.
        """
        if self.cfg.moe.num_experts is None:
            return [False] * self.num_layers
        return moe_layer_pattern(self.cfg.moe.moe_layer_freq, self.num_layers)


def moe_layers(stacks: Iterable[Stack]) -> list[int]:
    """Numbers, from 0, of the layers of all stacks that are mixtures of experts.

    Raises ConfigError for an impossible pattern.
    """
    return [stack.first_layer + layer for stack in stacks for layer, moe in enumerate(stack.moe_pattern()) if moe]


def with_model(cfg: Config, **settings: Any) -> Config:
    """`cfg` as a stack sees it: with other settings of the model."""
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **settings))
