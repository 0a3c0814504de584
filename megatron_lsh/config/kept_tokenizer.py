"""The tokenizer's files inside a checkpoint: which they are, and where they are found again.

A run names its tokenizer by a path of the machine that it runs on. Its checkpoints hold the files themselves, so that they
can be moved, and outlive the files that the run was started with.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_lsh.config.data import DataConfig

KEPT = "tokenizer"  # folder in a checkpoint
CONVERTED = "hf"  # folder in a converted one, with the small files of the Hugging Face model that it was
_HUGGING_FACE = "HuggingFaceTokenizer"
# Beginnings of the names of files that belong to a tokenizer in Hugging Face's formats.
_BESIDE = (
    "tokenizer", "special_tokens_map", "added_tokens", "chat_template", "vocab", "merges", "spiece.model",
    "sentencepiece.bpe.model",
)  # fmt: skip


def tokenizer_contents(data: DataConfig) -> dict[str, bytes]:
    """The files of the run's tokenizer, by their names in a checkpoint. Empty for one without files here.

    Raises:
        OSError: a file cannot be read.
    """
    if data.tokenizer_type == _HUGGING_FACE:
        return _hugging_face(Path(data.tokenizer_model or ""))
    contents = {}
    for setting, name in _names(data.tokenizer_type).items():
        path = getattr(data, setting)
        if path is not None and Path(path).is_file():
            contents[name] = Path(path).read_bytes()
    return contents


def _hugging_face(model: Path) -> dict[str, bytes]:
    if not model.exists():  # the name of one on the hub
        return {}
    folder = model if model.is_dir() else model.parent
    contents = {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.name.startswith(_BESIDE) and path.is_file()
    }
    if model.is_file():
        contents["tokenizer.json"] = model.read_bytes()
    elif "tokenizer.json" not in contents and (folder / "config.json").is_file():
        contents["config.json"] = (folder / "config.json").read_bytes()  # says to transformers which kind it is
    return contents


def kept_tokenizer(checkpoint: Path, data: Mapping[str, Any]) -> dict[str, str]:
    """The settings of the tokenizer that a checkpoint holds, as paths into it. Empty for one that holds none.

    Args:
        data: the section ``data`` of its config.json.
    """
    folder = checkpoint / KEPT
    kind = data.get("tokenizer_type")
    if kind == _HUGGING_FACE:
        found = [place for place in (folder, checkpoint / CONVERTED) if place.is_dir()]
        return {"tokenizer_model": str(found[0])} if found else {}
    paths = {setting: folder / name for setting, name in _names(kind).items()}
    return {setting: str(path) for setting, path in paths.items() if path.is_file()}


def without_lost_files(checkpoint: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """The section ``data`` of a checkpoint's config.json, with the checkpoint's own files where the run's are gone."""
    kept = kept_tokenizer(checkpoint, data)
    return {**data, **{name: path for name, path in kept.items() if not Path(str(data.get(name))).exists()}}


def _names(kind: object) -> dict[str, str]:
    """Setting -> name of its file in a checkpoint."""
    if kind == "GPT2BPETokenizer":
        return {"vocab_file": "vocab.json", "merge_file": "merges.txt"}
    if kind in ("BertWordPieceCase", "BertWordPieceLowerCase"):
        return {"vocab_file": "vocab.txt"}
    return {"tokenizer_model": "tokenizer.model"}
