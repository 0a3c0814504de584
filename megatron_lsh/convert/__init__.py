"""Conversion of checkpoints: Hugging Face, native, Megatron-LM's legacy format, dense to mixture of experts.

    source = load_hf("Mixtral-8x7B-v0.1")       # or load_native, load_megatron; reads headers only
    source.cfg, source.tensors                  # settings, and every tensor's shape and type
    save_native(source, "checkpoints/mixtral")  # or save_hf, save_megatron; streams, verifies, then renames

    dense = load_hf("Mistral-7B-v0.1", max_position_embeddings=4096)
    save_native(upcycle(dense, MoEConfig(num_experts=8, moe_router_topk=2)), "checkpoints/upcycled")

`source.read(rows)` gives a piece of a tensor, `load_model(source)` the model in memory. Formats: docs/checkpoints.md.
"""

from __future__ import annotations

from megatron_lsh.convert.conversion import (
    CastSource,
    Checks,
    save_hf,
    save_megatron,
    save_native,
    with_reference,
)
from megatron_lsh.convert.hf import HuggingFaceSource as load_hf
from megatron_lsh.convert.logits import compare_logits, load_model
from megatron_lsh.convert.megatron import MegatronSource as load_megatron
from megatron_lsh.convert.native import NativeSource as load_native
from megatron_lsh.convert.source import Rows, Source, TensorSpec
from megatron_lsh.convert.upcycle import UpcycledSource as upcycle

__all__ = [
    "CastSource",
    "Checks",
    "Rows",
    "Source",
    "TensorSpec",
    "compare_logits",
    "load_hf",
    "load_megatron",
    "load_model",
    "load_native",
    "save_hf",
    "save_megatron",
    "save_native",
    "upcycle",
    "with_reference",
]
