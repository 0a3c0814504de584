"""Megatron-LM's names and cuts: one row per tensor family.

Names are those of this framework where nothing else is said; experts and fused norms are spelled in two ways.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lsh.errors import CheckpointError

# How a tensor is cut over tensor-parallel ranks: not at all, by rows, by columns, or by rows of each of [gate; up].
WHOLE, ROWS, COLUMNS, GATED = "whole", "rows", "columns", "gated"


@dataclass(frozen=True)
class Row:
    """One tensor family: native name, cut, and the two spellings if they differ from the native name.

    `{i}` is the layer; with `{e}` each expert is a tensor of its own, numbered from 0 on every expert-parallel rank.
    """

    native: str
    cut: str
    local: str | None = None
    te: str | None = None


TABLE = (
    Row("embedding.word_embeddings.weight", ROWS),
    Row("embedding.position_embeddings.weight", WHOLE),
    Row("L.input_layernorm.weight", WHOLE, te="L.self_attention.linear_qkv.layer_norm_weight"),
    Row("L.input_layernorm.bias", WHOLE, te="L.self_attention.linear_qkv.layer_norm_bias"),
    Row("L.self_attention.linear_qkv.weight", ROWS),
    Row("L.self_attention.linear_qkv.bias", ROWS),
    Row("L.self_attention.linear_proj.weight", COLUMNS),
    Row("L.self_attention.linear_proj.bias", WHOLE),
    Row("L.self_attention.q_layernorm.weight", WHOLE),
    Row("L.self_attention.q_layernorm.bias", WHOLE),
    Row("L.self_attention.k_layernorm.weight", WHOLE),
    Row("L.self_attention.k_layernorm.bias", WHOLE),
    Row("L.pre_mlp_layernorm.weight", WHOLE, te="L.mlp.linear_fc1.layer_norm_weight"),  # in dense layers only
    Row("L.pre_mlp_layernorm.bias", WHOLE, te="L.mlp.linear_fc1.layer_norm_bias"),
    Row("L.mlp.linear_fc1.weight", GATED),
    Row("L.mlp.linear_fc1.bias", GATED),
    Row("L.mlp.linear_fc2.weight", COLUMNS),
    Row("L.mlp.linear_fc2.bias", WHOLE),
    Row("L.mlp.router.weight", WHOLE),
    Row("L.mlp.router.bias", WHOLE),
    Row("L.mlp.router.expert_bias", WHOLE),
    Row(
        "L.mlp.experts.linear_fc1.weight", GATED,
        "L.mlp.experts.local_experts.{e}.linear_fc1.weight", "L.mlp.experts.linear_fc1.weight{e}",
    ),
    Row(
        "L.mlp.experts.linear_fc1.bias", GATED,
        "L.mlp.experts.local_experts.{e}.linear_fc1.bias", "L.mlp.experts.linear_fc1.bias{e}",
    ),
    Row(
        "L.mlp.experts.linear_fc2.weight", COLUMNS,
        "L.mlp.experts.local_experts.{e}.linear_fc2.weight", "L.mlp.experts.linear_fc2.weight{e}",
    ),
    Row(
        "L.mlp.experts.linear_fc2.bias", WHOLE,
        "L.mlp.experts.local_experts.{e}.linear_fc2.bias", "L.mlp.experts.linear_fc2.bias{e}",
    ),
    Row("L.mlp.shared_experts.linear_fc1.weight", GATED),
    Row("L.mlp.shared_experts.linear_fc2.weight", COLUMNS),
    Row("L.mlp.shared_experts.gate_weight", WHOLE),
    Row("decoder.final_layernorm.weight", WHOLE),
    Row("decoder.final_layernorm.bias", WHOLE),
    Row("output_layer.weight", ROWS),
)  # fmt: skip

# State of TransformerEngine, counters and constants: no weights.
IGNORED = re.compile(r".*(_extra_state|inv_freq|tokens_per_expert|max_attn_logits)")
_STACKED = re.compile(r"\.mlp\.(shared_experts\.)?linear_fc1\.")


def join(parts: list[Tensor], cut: str, gated: bool) -> Tensor:
    """The tensor that was cut over ranks. (With `gated`, [gate; up], halves joined one by one.)"""
    if cut == WHOLE or len(parts) == 1:
        return parts[0]
    if gated:
        return torch.cat([half for index in range(2) for half in (part.chunk(2)[index] for part in parts)])
    return torch.cat(parts, dim=1 if cut == COLUMNS else 0)


def cut_for(value: Tensor, cut: str, gated: bool, rank: int, size: int) -> Tensor:
    """What rank `rank` of `size` holds of a tensor: the inverse of `join`."""
    if cut == WHOLE or size == 1:
        return value
    if gated:
        return torch.cat([half.chunk(size)[rank] for half in value.chunk(2)])
    return value.chunk(size, dim=1 if cut == COLUMNS else 0)[rank]


def cut_shape(shape: tuple[int, ...], native: str, cut: str, gated: bool, size: int) -> tuple[int, ...]:
    """Shape of a shard of a tensor, or of one expert's slice of it. (Dense [2, F, ...] is [2F, ...] in these files.)

    Raises CheckpointError if it does not divide.
    """
    if gated and _STACKED.search(native):
        shape = (shape[0] * shape[1], *shape[2:])
    if cut == WHOLE:
        return shape
    dim = 1 if cut == COLUMNS else 0
    if (shape[dim] // 2 if gated else shape[dim]) % size:
        raise CheckpointError(f"{native} of {list(shape)} cannot be cut over {size} tensor-parallel ranks: use fewer")
    return tuple(extent // size if index == dim else extent for index, extent in enumerate(shape))


def find_row(native: str) -> tuple[Row, int]:
    """The row of a native tensor and its layer. Raises CheckpointError if there is none."""
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", native)
    short, layer = (f"L.{match[2]}", int(match[1])) if match else (native, 0)
    for row in TABLE:
        if row.native == short:
            return row, layer
    raise CheckpointError(f"{native} has no place in a Megatron-LM checkpoint: export to another format")


def spellings(row: Row, layer: int, expert: int) -> list[str]:
    """Spellings of one tensor, local before TransformerEngine's."""
    found = [row.local or row.native] + ([row.te] if row.te else [])
    return [re.sub(r"^L\.", f"decoder.layers.{layer}.", name).replace("{e}", str(expert)) for name in found]
