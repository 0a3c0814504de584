"""The tokenizer of a training run, as files that transformers reads, to go with an exported model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_lsh.config import DataConfig

_NAMES = ("tokenizer", "special_tokens_map", "vocab", "merges", "added_tokens", "chat_template")
_TOKENS = ("bos", "eos", "pad")
# Text is spelled as by SentencePiece itself, without a token in front.
_SENTENCEPIECE = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "add_eos_token": False, "legacy": False}


def tokenizer_files(data: DataConfig) -> tuple[dict[str, Path | bytes], dict[str, Any]]:
    """(file name -> file or content, ids of special tokens as in config.json); both empty for what transformers cannot read.

    None as an id says that there is no such token, where a missing entry would leave transformers with a default.
    """
    ids: dict[str, Any] = {f"{token}_token_id": None for token in _TOKENS}
    model = Path(data.tokenizer_model or "")
    if data.tokenizer_type == "HuggingFaceTokenizer" and model.exists():
        folder = model if model.is_dir() else model.parent
        files = {
            path.name: path for path in sorted(folder.iterdir()) if path.name.startswith(_NAMES) and path.is_file()
        }
        return dict(files), ids | _named_tokens(files)
    if data.tokenizer_type in ("GPTSentencePieceTokenizer", "Llama2Tokenizer") and model.is_file():
        import sentencepiece

        pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
        found = {"bos": pieces.bos_id(), "eos": pieces.eos_id(), "pad": pieces.pad_id()}
        config = _SENTENCEPIECE | {f"{token}_token": pieces.id_to_piece(i) for token, i in found.items() if i >= 0}
        config["add_bos_token"] = data.tokenizer_type == "Llama2Tokenizer"
        ids |= {f"{token}_token_id": i for token, i in found.items() if i >= 0}
        return {"tokenizer.model": model, "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode()}, ids
    return {}, ids


def _named_tokens(files: Mapping[str, Path]) -> dict[str, int]:
    """Ids of the tokens that tokenizer_config.json names, as far as tokenizer.json knows them."""
    try:
        config = json.loads(files["tokenizer_config.json"].read_bytes())
        content = json.loads(files["tokenizer.json"].read_bytes())
        vocabulary = content["model"].get("vocab") or {}
        known = dict(vocabulary) if isinstance(vocabulary, dict) else {}
        known |= {entry["content"]: entry["id"] for entry in content.get("added_tokens") or ()}
    except (OSError, KeyError, ValueError, TypeError, AttributeError):
        return {}  # an older kind of tokenizer: transformers finds the tokens by itself
    result = {}
    for token in _TOKENS:
        name = config.get(f"{token}_token")
        name = name.get("content") if isinstance(name, dict) else name
        if name in known:
            result[f"{token}_token_id"] = int(known[name])
    return result
