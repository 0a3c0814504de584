"""Paths in saved configurations are full ones: whoever reads them stands in another folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_lsh.config.data import TOKENIZER_FILES
from megatron_lsh.config.data_paths import is_number

_OF_THE_RUN = (
    "save", "load", "pretrained_checkpoint", "data_cache_path", "tensorboard_dir", "metrics_jsonl", "wandb_save_dir",
    "flight_recorder_dump_path", "memory_snapshot_path", "picture_sheet",
)  # fmt: skip
_PREFIXES = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
HUB_PREFIX = "hf:"
"""in front of a data set of the Hugging Face hub, or of a folder that holds one"""
# Where there is no such file, the value is a name on the Hugging Face hub, or a mistake to be told as it was written.
_FILES = (*TOKENIZER_FILES, "train_data", "valid_data", "test_data", "hf_dataset")
PATHS = frozenset((*_OF_THE_RUN, *_PREFIXES, *_FILES))
"""settings whose text, or each of whose texts, names a file or a folder"""


def with_full_paths(document: dict[str, Any]) -> dict[str, Any]:
    """What `to_dict` returns, with full paths in the place of relative ones."""
    config = {
        section: {name: _full(name, value) for name, value in values.items()}
        for section, values in document["config"].items()
    }
    return {**document, "config": config}


def _full(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_full(name, entry) for entry in value]
    if not isinstance(value, str) or not value:
        return value
    kind = HUB_PREFIX if name in _PREFIXES and value.startswith(HUB_PREFIX) else ""
    path = Path(value.removeprefix(kind))
    certain = name in _OF_THE_RUN or (name in _PREFIXES and not kind and not is_number(value))
    if certain or ((name in _FILES or kind) and path.exists()):
        return f"{kind}{path.absolute()}"
    return value
