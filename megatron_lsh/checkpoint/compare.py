"""Is this checkpoint one of this model? And if not, which setting differs?"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_lsh.checkpoint.state import Resize
from megatron_lsh.checkpoint.tensors import MODEL, OPTIMIZER
from megatron_lsh.errors import CheckpointError

# Settings that make another function of the same weights: a run must not continue under another value.
_FUNCTION = {
    "model": (
        "num_attention_heads",
        "kv_channels",
        "group_query_attention",
        "num_query_groups",
        "position_embedding_type",
        "rotary_base",
        "rotary_percent",
        "rotary_interleaved",
        "normalization",
        "norm_epsilon",
        "swiglu",
        "openai_gelu",
    ),
    "moe": (
        "moe_layer_freq",
        "moe_router_topk",
        "moe_router_score_function",
        "moe_router_pre_softmax",
        "moe_router_topk_scaling_factor",
        "moe_router_num_groups",
        "moe_router_group_topk",
    ),
    "finetune": ("classes", "pooling"),
}
# Settings that change the numbers of a run: all of these sections, and of others some.
_SECTIONS = ("model", "moe", "lsh", "precision")
_SOME = {"training": ("calculate_per_token_loss",), "finetune": _FUNCTION["finetune"]}
# What the saved groups of the optimizer hold as well, and what is done to gradients.
_OPTIMIZER = (
    "adam_beta1",
    "adam_beta2",
    "adam_eps",
    "sgd_momentum",
    "muon_momentum",
    "muon_nesterov",
    "muon_scale_mode",
    "muon_extra_scale_factor",
    "muon_num_ns_steps",
    "clip_grad",
)
# Parameters that models of before did not have, and with which, at zero, they compute what they did: ends of names.
_ZERO_IF_ABSENT = (".mlp.router.bias",)


def different_settings(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Settings that change the numbers and differ, as ``--num-layers is 4 in the checkpoint and 8 now``."""
    return [_sentence(name, old, new) for _, name, old, new in _differences(saved, current)]


def different_function(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Those of `different_settings` under which the same weights would be another model."""
    return [
        _sentence(name, old, new)
        for section, name, old, new in _differences(saved, current)
        if name in _FUNCTION.get(section, ())
    ]


def different_optimizer(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Settings of the optimizer that differ. Those of the command line hold; the schedule compares its own.

    Raises:
        CheckpointError: another kind of optimizer, whose state means something else.
    """
    before, now = saved.get("optimizer") or {}, current.get("optimizer") or {}
    kinds = before.get("optimizer"), now.get("optimizer")
    if None not in kinds and kinds[0] != kinds[1]:
        raise CheckpointError(
            f"{_sentence('optimizer', *kinds)}: give --optimizer {kinds[0]}, or --no-load-optim to start the state of the "
            "optimizer afresh"
        )
    return [
        f"{_sentence(name, before[name], now[name])}, which holds"
        for name in _OPTIMIZER
        if name in before and name in now and before[name] != now[name]
    ]


def _differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[tuple[str, str, Any, Any]]:
    found = []
    current = json.loads(json.dumps(current))  # as the saved one has been: tuples are lists now
    for section in (*_SECTIONS, *_SOME):
        before, now = saved.get(section) or {}, current.get(section) or {}
        # A setting that only one side knows was added by another version of this framework: not the user's doing.
        for name in _SOME.get(section, now):
            if name in before and name in now and before[name] != now[name]:
                found.append((section, name, before[name], now[name]))
    return found


def _sentence(name: str, old: Any, new: Any) -> str:
    return f"--{name.replace('_', '-')} is {old} in the checkpoint and {new} now"


def padded_keys(
    metadata: Metadata, tensors: Mapping[str, Tensor], padded_rows: Mapping[str, int], saved_rows: Mapping[str, int]
) -> set[str]:
    """Keys whose stored and present shape differ only in the number of padding rows."""
    result = set()
    for key, tensor in tensors.items():
        stored = metadata.state_dict_metadata.get(key)
        name = key[len(MODEL) :] if key.startswith(MODEL) else key[len(OPTIMIZER) :].rpartition(".")[0]
        rows = padded_rows.get(name)
        if rows is None or rows != saved_rows.get(name) or not isinstance(stored, TensorStorageMetadata):
            continue
        same_width = len(stored.size) == tensor.ndim > 0 and stored.size[1:] == tensor.shape[1:]
        if same_width and stored.size != tensor.shape and min(stored.size[0], tensor.shape[0]) >= rows:
            result.add(key)
    return result


def fresh_keys(
    metadata: Metadata, tensors: Mapping[str, Tensor], fresh: tuple[str, ...], renewed: tuple[str, ...]
) -> set[str]:
    """Keys of parameters whose names begin with one of `renewed`, or with one of `fresh` where the checkpoint lacks them or
    has them in another shape."""
    stored = metadata.state_dict_metadata
    candidates = {key for key in tensors if _short(key).startswith(fresh)}
    differing = {key for key in candidates if key not in stored or _shape(stored[key]) != tuple(tensors[key].shape)}
    return differing | {key for key in tensors if _short(key).startswith(renewed)}


def resizes(
    metadata: Metadata, tensors: Mapping[str, Tensor], functions: Mapping[str, Resize]
) -> dict[str, tuple[Tensor, Resize]]:
    """Key -> (room for what the checkpoint has in another shape, what makes the parameter of it)."""
    result = {}
    for key, tensor in tensors.items():
        stored = metadata.state_dict_metadata.get(key)
        resize = next((function for end, function in functions.items() if key.endswith(end)), None)
        if resize is None or not isinstance(stored, TensorStorageMetadata) or stored.size == tensor.shape:
            continue
        result[key] = (torch.empty(stored.size, dtype=stored.properties.dtype, device=tensor.device), resize)
    return result


def zero_if_absent(stored: Collection[str], wanted: Iterable[str]) -> set[str]:
    """Parameters that a checkpoint lacks because it is older than they are (it has none of the kind), and are zero then.

    Args:
        stored: names, or keys, of the checkpoint.
        wanted: those of the model.
    """
    absent = tuple(end for end in _ZERO_IF_ABSENT if not any(name.endswith(end) for name in stored))
    return {name for name in wanted if absent and name.endswith(absent)}


def started_at_zero(names: set[str]) -> str:
    """What is said about `zero_if_absent`."""
    return f"the checkpoint was written before models had {short_names(names)}: they start at zero"


def unused_keys(metadata: Metadata, tensors: Mapping[str, Tensor], unused: tuple[str, ...]) -> set[str]:
    """Keys of parameters whose names begin with one of `unused` and that only the checkpoint has."""
    surplus = {key for key in metadata.state_dict_metadata if key.startswith(MODEL) and key not in tensors}
    return {key for key in surplus if _short(key).startswith(unused)} if unused else set()


def short_names(keys: set[str]) -> str:
    """The first few of these keys as the names of parameters, and how many more."""
    return summary([_short(key) for key in sorted(keys)])


def different_tensors(
    metadata: Metadata, tensors: Mapping[str, Tensor], padded: set[str], ignored: set[str]
) -> list[str]:
    """How the stored model differs from the present one: missing, surplus and differently shaped tensors."""
    stored = metadata.state_dict_metadata
    problems = []
    for key, tensor in tensors.items():
        if key not in stored:
            problems.append(f"{_short(key)} is not in the checkpoint")
            continue
        shape = _shape(stored[key])
        if shape != tuple(tensor.shape) and key not in padded:
            problems.append(f"{_short(key)} has shape {shape} in the checkpoint and {tuple(tensor.shape)} now")
    surplus = sorted(key for key in stored if key.startswith(MODEL) and key not in tensors and key not in ignored)
    return problems + [f"{_short(key)} is in the checkpoint only" for key in surplus]


def _shape(entry: Any) -> tuple[int, ...] | None:
    return tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else None


def _short(key: str) -> str:
    return key[len(MODEL) :] if key.startswith(MODEL) else key


def summary(items: list[str], limit: int = 3) -> str:
    """The first few, and how many more."""
    more = len(items) - limit
    return "; ".join(items[:limit]) + (f"; and {more} more" if more > 0 else "")
