"""Which stacks of transformer layers a model is made of: what layers, FLOPs, memory and telemetry are counted by."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TypeVar

from megatron_lsh.config.bert import BertConfig
from megatron_lsh.config.config import Config
from megatron_lsh.config.finetune import FinetuneConfig
from megatron_lsh.config.layer_pattern import moe_layer_pattern
from megatron_lsh.config.t5 import T5Config
from megatron_lsh.models.shape import ModelShape

C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Stack:
    """One run of transformer layers.

    Attributes:
        cfg: the configuration as this stack sees it: ``model.num_layers`` and ``model.seq_length`` are its own.
        name: "encoder" or "decoder", the model's attribute and the beginning of its parameters' names.
        first_layer: number of its first layer in the whole model, which names hashes and gauges of MoE layers.
        causal: whether a position sees only itself and earlier ones.
        memory_length: positions of the encoder that cross-attention reads; 0 without cross-attention.
    """

    cfg: Config
    name: str
    first_layer: int = 0
    causal: bool = True
    memory_length: int = 0

    @property
    def num_layers(self) -> int:
        return ModelShape.from_config(self.cfg.model).num_layers

    @property
    def seq_length(self) -> int:
        return self.cfg.model.seq_length or 1

    def moe_pattern(self) -> list[bool]:
        """For each layer, whether it is a mixture of experts: --moe-layer-freq, which each stack counts by itself.

        Raises ConfigError for an impossible pattern.
        """
        if self.cfg.moe.num_experts is None:
            return [False] * self.num_layers
        return moe_layer_pattern(self.cfg.moe.moe_layer_freq, self.num_layers)


def stacks_of(cfg: Config) -> tuple[Stack, ...]:
    """The stacks of the model that `cfg` describes, in the order in which a token passes them.

    The class of `cfg` says which family it is: T5 has an encoder and a decoder (a classifier made
    of it the encoder only), BERT an encoder, a GPT a decoder.
    """
    if isinstance(cfg, T5Config):
        encoder = Stack(_with(cfg, cfg.t5.encoder_num_layers, cfg.t5.encoder_seq_length), "encoder", causal=False)
        if isinstance(cfg, FinetuneConfig):  # a classifier leaves the decoder behind
            return (encoder,)
        decoder = Stack(
            _with(cfg, cfg.t5.decoder_num_layers, cfg.t5.decoder_seq_length),
            "decoder",
            first_layer=encoder.num_layers,
            memory_length=encoder.seq_length,
        )
        return encoder, decoder
    if isinstance(cfg, BertConfig):
        return (Stack(cfg, "encoder", causal=False),)
    return (Stack(cfg, "decoder"),)


def moe_layers(cfg: Config) -> list[int]:
    """Numbers, from 0, of the layers of all stacks that are mixtures of experts.

    Raises ConfigError for an impossible pattern.
    """
    return [
        stack.first_layer + layer for stack in stacks_of(cfg) for layer, moe in enumerate(stack.moe_pattern()) if moe
    ]


def _with(cfg: C, num_layers: int | None, seq_length: int | None) -> C:
    """`cfg` with another number of layers and another length, where they are given."""
    model = dataclasses.replace(
        cfg.model, num_layers=num_layers or cfg.model.num_layers, seq_length=seq_length or cfg.model.seq_length
    )
    return dataclasses.replace(cfg, model=model)
