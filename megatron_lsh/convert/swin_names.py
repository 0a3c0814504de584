"""Names and layouts of Swin's parameters: ours, Microsoft's, Hugging Face's and timm's.

Microsoft's names (microsoft/Swin-Transformer, models/swin_transformer_moe.py) are the ones in the middle: everything is
translated into them and out of them. Buffers that follow from the sizes (``relative_position_index``,
``relative_coords_table``, ``attn_mask``) are dropped.

Legend: S stage, B block, D width, H heads, d channels of a head, E experts, F width of an expert.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from megatron_lsh.errors import CheckpointError

Tensors = dict[str, Tensor]

BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask")
_BLOCK = r"layers\.(\d+)\.blocks\.(\d+)\."
_EXPERTS = "mlp._moe_layer.experts."
_GATE = "mlp._moe_layer.gates.0."

# Of a block: Microsoft's name -> ours, where the numbers are the same.
_BLOCK_NAMES = (
    ("norm1.", "input_layernorm."),
    ("norm2.", "pre_mlp_layernorm."),
    ("attn.proj.", "self_attention.linear_proj."),
    ("attn.cpb_mlp.0.weight", "position_bias.fc1_weight"),
    ("attn.cpb_mlp.0.bias", "position_bias.fc1_bias"),
    ("attn.cpb_mlp.2.weight", "position_bias.fc2_weight"),
    ("attn.relative_position_bias_table", "position_bias.weight"),
    ("mlp.fc1.", "mlp.linear_fc1."),
    ("mlp.fc2.", "mlp.linear_fc2."),
    (_GATE + "wg.", "mlp.router."),
    (_GATE + "temperature", "mlp.router.gate.temperature"),
    (_GATE + "cosine_projector.weight", "mlp.router.gate.projector_weight"),
    (_GATE + "cosine_projector.bias", "mlp.router.gate.projector_bias"),
    (_GATE + "sim_matrix", "mlp.router.gate.vectors"),
    (_EXPERTS + "batched_fc1_w", "mlp.experts.linear_fc1.weight"),
    (_EXPERTS + "batched_fc1_bias", "mlp.experts.linear_fc1.bias"),
    (_EXPERTS + "batched_fc2_bias", "mlp.experts.linear_fc2.bias"),
)
_OUTER_NAMES = (
    ("patch_embed.proj.", "patch_embedding."),
    ("patch_embed.norm.", "patch_embedding.norm."),
    ("norm.", "final_layernorm."),
    ("head.", "head."),
)
# Of a block: Microsoft's name -> that in Hugging Face's files.
_HF_BLOCK_NAMES = (
    ("norm1.", "layernorm_before."),
    ("norm2.", "layernorm_after."),
    ("attn.proj.", "attention.output.dense."),
    ("attn.relative_position_bias_table", "attention.self.relative_position_bias_table"),
    ("mlp.fc1.", "intermediate.dense."),
    ("mlp.fc2.", "output.dense."),
)
_HF_OUTER_NAMES = (
    ("patch_embed.proj.", "swin.embeddings.patch_embeddings.projection."),
    ("patch_embed.norm.", "swin.embeddings.norm."),
    ("norm.", "swin.layernorm."),
    ("head.", "classifier."),
)


def from_microsoft(theirs: Mapping[str, Tensor], heads: Callable[[int], int]) -> Tensors:
    """Our parameters of a state dict with Microsoft's names and whole experts.

    Args:
        heads: stage -> attention heads.

    Raises:
        CheckpointError: a name that Swin does not have, or a second bias of experts that is not zero where our model has
            none (``fc2_bias``; it is dropped where all of it is zero).
    """
    ours: Tensors = {}
    for name, value in theirs.items():
        if name.endswith(BUFFERS):
            continue
        block = re.match(_BLOCK, name)
        merging = re.fullmatch(r"layers\.(\d+)\.downsample\.(norm\.weight|norm\.bias|reduction\.weight)", name)
        if block is not None:
            stage, rest = int(block[1]), name[block.end() :]
            to = f"stages.{stage}.layers.{block[2]}."
            if rest in ("attn.qkv.weight", "attn.qkv.bias"):
                ours[f"{to}self_attention.linear_qkv.{rest.split('.')[-1]}"] = _pack(value, heads(stage))
            elif rest == _EXPERTS + "batched_fc2_w":
                ours[to + "mlp.experts.linear_fc2.weight"] = value.transpose(1, 2).contiguous()
            elif rest == _EXPERTS + "batched_fc2_bias" and not value.any():
                pass  # frozen at zero in the published models
            elif rest != _EXPERTS + "_num_global_experts":
                ours[to + _renamed(rest, _BLOCK_NAMES, name)] = value
        elif merging is not None:
            rest = "weight" if merging[2] == "reduction.weight" else merging[2]
            ours[f"stages.{int(merging[1]) + 1}.merging.{rest}"] = value
        else:
            ours[_renamed(name, _OUTER_NAMES, name)] = value
    return ours


def to_microsoft(ours: Mapping[str, Tensor], heads: Callable[[int], int]) -> Tensors:
    """The inverse of `from_microsoft`; experts without a second bias stay without."""
    theirs: Tensors = {}
    for name, value in ours.items():
        block = re.match(r"stages\.(\d+)\.layers\.(\d+)\.", name)
        merging = re.fullmatch(r"stages\.(\d+)\.merging\.(.*)", name)
        if block is not None:
            stage, rest = int(block[1]), name[block.end() :]
            to = f"layers.{stage}.blocks.{block[2]}."
            if rest.startswith("self_attention.linear_qkv."):
                theirs[f"{to}attn.qkv.{rest.split('.')[-1]}"] = _unpack(value, heads(stage))
            elif rest == "mlp.experts.linear_fc2.weight":
                theirs[to + _EXPERTS + "batched_fc2_w"] = value.transpose(1, 2).contiguous()
            else:
                theirs[to + _renamed(rest, _inverse(_BLOCK_NAMES), name)] = value
        elif merging is not None:
            rest = "reduction.weight" if merging[2] == "weight" else merging[2]
            theirs[f"layers.{int(merging[1]) - 1}.downsample.{rest}"] = value
        else:
            theirs[_renamed(name, _inverse(_OUTER_NAMES), name)] = value
    return theirs


def from_huggingface(theirs: Mapping[str, Tensor]) -> Tensors:
    """Microsoft's names for those in a file of ``SwinForImageClassification``. Raises CheckpointError."""
    found: Tensors = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in theirs.items():
        if name.endswith(BUFFERS):
            continue
        block = re.match(r"swin\.encoder\." + _BLOCK, name)
        outer = re.match(r"swin\.encoder\.layers\.\d+\.downsample\.", name)
        if block is not None:
            rest, to = name[block.end() :], f"layers.{block[1]}.blocks.{block[2]}."
            projection = re.fullmatch(r"attention\.self\.(query|key|value)\.(weight|bias)", rest)
            if projection is not None:
                parts.setdefault(f"{to}attn.qkv.{projection[2]}", {})[projection[1]] = value
            else:
                found[to + _renamed(rest, _inverse(_HF_BLOCK_NAMES), name)] = value
        elif outer is not None:
            found[name.removeprefix("swin.encoder.")] = value
        else:
            found[_renamed(name, _inverse(_HF_OUTER_NAMES), name)] = value
    for name, pieces in parts.items():
        missing = {"query", "key", "value"} - set(pieces)
        if missing:
            raise CheckpointError(f"{name} lacks its {', '.join(sorted(missing))}: is the file whole?")
        found[name] = torch.cat([pieces["query"], pieces["key"], pieces["value"]])
    return found


def to_huggingface(theirs: Mapping[str, Tensor]) -> Tensors:
    """The inverse of `from_huggingface`. Raises CheckpointError for what Hugging Face's Swin does not have."""
    found: Tensors = {}
    for name, value in theirs.items():
        block = re.match(_BLOCK, name)
        if block is not None:
            rest, to = name[block.end() :], f"swin.encoder.layers.{block[1]}.blocks.{block[2]}."
            if rest.startswith("attn.qkv."):
                for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    found[f"{to}attention.self.{part}.{rest.split('.')[-1]}"] = piece.contiguous()
            else:
                found[to + _renamed(rest, _HF_BLOCK_NAMES, name)] = value
        elif ".downsample." in name:
            found["swin.encoder." + name] = value
        else:
            found[_renamed(name, _HF_OUTER_NAMES, name)] = value
    return found


def from_timm(theirs: Mapping[str, Tensor]) -> Tensors:
    """Microsoft's names for timm's: its head is ``head.fc``, and since 2023 stage S + 1 begins with the merging."""
    found: Tensors = {}
    at_start = not any(name.startswith("layers.0.downsample.") for name in theirs)
    for name, value in theirs.items():
        if name.endswith(BUFFERS):
            continue
        name = re.sub(r"^head\.fc\.", "head.", name)
        merging = re.match(r"layers\.(\d+)\.downsample\.", name)
        if merging is not None and at_start:
            name = f"layers.{int(merging[1]) - 1}.downsample.{name[merging.end() :]}"
        found[name] = value
    return found


def _renamed(name: str, pairs: tuple[tuple[str, str], ...], whole: str) -> str:
    for theirs, ours in sorted(pairs, key=lambda pair: -len(pair[0])):  # of two beginnings the longer one
        if name == theirs or (theirs.endswith(".") and name.startswith(theirs)):
            return ours + name[len(theirs) :]
    raise CheckpointError(f"{whole} is no parameter of a Swin that can be converted: is this another model?")


def _inverse(pairs: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    return tuple((b, a) for a, b in pairs)


def _pack(qkv: Tensor, heads: int) -> Tensor:
    """[q; k; v], each of all heads -> for each head its q, k and v."""
    return qkv.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2).contiguous()


def _unpack(qkv: Tensor, heads: int) -> Tensor:
    return qkv.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2).contiguous()
