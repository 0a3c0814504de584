"""``--use-checkpoint-args``: the shape of the model from the checkpoint that will be loaded, as in Megatron-LM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_lsh.config.checkpoint import CheckpointConfig
from megatron_lsh.config.config_file import read_document
from megatron_lsh.config.kept_tokenizer import without_lost_files
from megatron_lsh.config.serialize import as_saved_config, settings_given_in
from megatron_lsh.config.settings import Setting, named, shown
from megatron_lsh.errors import ConfigError

# As in Megatron-LM, the command line wins where it says something of these,
_WHERE_ABSENT = (
    "num_layers", "hidden_size", "ffn_hidden_size", "seq_length", "num_attention_heads", "kv_channels",
    "max_position_embeddings",
)  # fmt: skip
# and the checkpoint wins always with these. They are data: no code is named by them.
_ALWAYS = (
    "group_query_attention", "num_query_groups", "position_embedding_type", "add_position_embedding", "rotary_base",
    "rotary_percent", "rotary_interleaved", "add_bias_linear", "add_qkv_bias", "qk_layernorm", "qk_layernorm_width",
    "swiglu", "openai_gelu", "untie_embeddings_and_output_weights", "normalization", "attention_dropout", "hidden_dropout",
    "num_experts", "moe_layer_freq", "moe_ffn_hidden_size", "moe_latent_size", "moe_router_topk", "moe_router_pre_softmax",
    "moe_router_score_function", "moe_router_enable_expert_bias", "moe_router_topk_scaling_factor", "moe_router_num_groups",
    "moe_router_group_topk", "moe_shared_expert_intermediate_size", "moe_shared_expert_gate", "tokenizer_type",
    "tokenizer_model", "vocab_file", "merge_file",
)  # fmt: skip


def with_checkpoint_args(values: Mapping[str, Any], settings: Mapping[str, Setting]) -> tuple[dict[str, Any], str]:
    """The settings that were given (name -> value) with those of the checkpoint, and a notice of what was taken.

    Without a checkpoint in --load or --pretrained-checkpoint the command line stands alone.

    Raises:
        ConfigError: neither folder is given, or the checkpoint's config.json is not one.
    """
    folders = [values[name] for name in ("load", "pretrained_checkpoint") if values.get(name) is not None]
    if not folders:
        raise ConfigError("checkpoint.use_checkpoint_args (True) must be off without a checkpoint: set --load")
    for folder in folders:
        path = _config_of(Path(folder), values.get("ckpt_step"))
        if path is not None:
            break
    else:
        return dict(
            values
        ), f"--use-checkpoint-args: no checkpoint in {shown(folders[0], 1000)}, so the command line stands"
    document = as_saved_config(read_document(str(path)))
    if document is None:
        raise ConfigError(f"{shown(path, 1000)} must be the configuration of a checkpoint: drop --use-checkpoint-args")
    there = {name: value for section in settings_given_in(document).values() for name, value in section.items()}
    there = without_lost_files(path.parent, there)
    names = [name for name in _WHERE_ABSENT if values.get(name) is None] + list(_ALWAYS)
    taken, problems = {}, []
    for name in names:
        if name in there and (there[name] is not None or name in _ALWAYS):
            try:
                taken[name] = settings[name].convert(there[name])
            except ValueError as error:
                problems.append(f"{shown(path, 1000)}: {named(name, there[name])} {error}: drop --use-checkpoint-args")
    if problems:
        raise ConfigError("\n".join(problems))
    notice = f"--use-checkpoint-args: the model's shape and its tokenizer are those of {shown(path, 1000)}"
    return {**values, **taken}, notice


def first_weights(checkpoint: CheckpointConfig, name: str) -> Path | None:
    """A small file of the checkpoint that a run takes its first weights from, and nothing else; None as for `kept_file`."""
    if checkpoint.load is not None and checkpoint.finetune:
        return kept_file(checkpoint.load, checkpoint.ckpt_step, name)
    folder = checkpoint.pretrained_checkpoint
    return None if folder is None else kept_file(folder, None, name)


def kept_file(folder: str, step: int | None, name: str) -> Path | None:
    """A small file of the checkpoint that --load will read; None where there is no checkpoint, or none that has it."""
    config = _config_of(Path(folder), step)
    path = None if config is None else config.parent / name
    return path if path is not None and path.is_file() else None


def _config_of(folder: Path, step: int | None) -> Path | None:
    """The config.json of the checkpoint that --load will read: that of --ckpt-step, or the one the tracker names."""
    try:
        tracker = (folder / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8").strip()
        name = f"iter_{step:07d}" if step is not None else tracker
        name = f"iter_{int(name):07d}" if name.isdecimal() else name
        path = folder / name / "config.json"
        return path if name.replace("_", "").isalnum() and path.is_file() else None
    except (OSError, ValueError):
        return None
