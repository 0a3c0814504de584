"""What the files beside a ``tokenizer.json`` say: names of special tokens, further tokens, and options.

The rules are those of transformers 5 (``tokenization_utils_tokenizers.py``): a tokenizer that was read without them would
give other ids than ``AutoTokenizer`` gives.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from megatron_lsh.errors import DataError

CONFIG, NAMES, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
STANDARD_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# Classes that take tokenizer.json as it stands. Others are built anew, with the options of tokenizer_config.json.
GENERIC_CLASSES = (None, "PreTrainedTokenizerFast", "TokenizersBackend")
BYTE_LEVEL_OPTIONS = {"add_prefix_space": "add_prefix_space"}
BERT_OPTIONS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}


class FilesBeside:
    """The files of one folder; each may be absent.

    Raises:
        DataError: if one is damaged, or holds something else.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._config = _read(folder / CONFIG)
        self._names = _read(folder / NAMES)
        if "added_tokens_decoder" in self._config:  # then the other files add nothing
            self._settings, self._added = self._config, {}
        else:
            # Of the usual names the map's win, of others those of the configuration.
            usual = {key: value for key, value in self._names.items() if key in STANDARD_NAMES}
            self._settings, self._added = self._names | self._config | usual, _read(folder / ADDED)

    def named(self, key: str) -> str | None:
        """The token that is called ``eos_token``, say."""
        value = self._settings.get(key) or self._names.get(key)
        token = self._token(value, key) if value else None
        return token.content if token is not None else None

    def apply(self, tokenizer: Tokenizer) -> str:
        """Add the further tokens and set the options; returns a text that differs if the changes do, empty without."""
        there = tokenizer.get_added_tokens_decoder().values()
        tokens = [token for token in self._further_tokens() if repr(token) not in set(map(repr, there))]
        known = {token.content for token in (*there, *tokens)}
        for key in self._special_names():
            value = self._settings[key]
            for token in self._tokens(value, key):
                if token.content not in known:
                    token.special = True
                    known.add(token.content)
                    tokens.append(token)
        options = self._apply_options(tokenizer)
        if tokens:
            tokenizer.add_tokens(tokens)
        return f"{tokens!r} {options!r}" if tokens or options else ""

    def _further_tokens(self) -> list[AddedToken]:
        """Those that have numbers, in the order of these."""
        special = {token.content for key in self._special_names() for token in self._tokens(self._settings[key], key)}
        found: dict[int, AddedToken] = {}
        for number, value in _mapping(self._config.get("added_tokens_decoder", {}), self._folder / CONFIG).items():
            if not str(number).isdecimal():
                raise DataError(
                    f"{self._folder / CONFIG}: added_tokens_decoder ({number}) must have ids as keys: copy the folder again"
                )
            found[int(number)] = self._token(value, "added_tokens_decoder")
        for content, number in self._added.items():
            if type(number) is not int:
                raise DataError(
                    f"{self._folder / ADDED}: the id of {content} ({number!r:.40}) must be an integer: copy the folder again"
                )
            named = content in special
            found[number] = AddedToken(content, normalized=not named, special=named)
        tokens = [found[number] for number in sorted(found)]
        for token in tokens:
            token.special = token.special or token.content in special
        return tokens

    def _special_names(self) -> list[str]:
        """Settings that name special tokens: the usual ones, those of the model, and lists of others."""
        names = [key for key in STANDARD_NAMES if self._settings.get(key)]
        own = [key for key, value in self._settings.items() if key.endswith("_token") and isinstance(value, str | dict)]
        lists = [key for key in ("extra_special_tokens", "additional_special_tokens") if self._settings.get(key)]
        return [*names, *(key for key in own if key not in names), *lists[:1]]

    def _tokens(self, value: Any, key: str) -> list[AddedToken]:
        if isinstance(value, dict) and "content" not in value:
            value = list(value.values())  # named tokens of the model
        return [self._token(entry, key) for entry in (value if isinstance(value, list) else [value])]

    def _token(self, value: Any, key: str) -> AddedToken:
        facts: Any = {"content": value, "special": True} if isinstance(value, str) else value
        try:
            known = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
            return AddedToken(**{name: facts[name] for name in known if name in facts})
        except (TypeError, AttributeError, ValueError) as error:
            raise DataError(
                f"{self._folder / CONFIG} or {NAMES}: {key} ({value!r:.40}) must be a token: copy the folder again"
            ) from error

    def _apply_options(self, tokenizer: Tokenizer) -> dict[str, bool]:
        if self._config.get("tokenizer_class") in GENERIC_CLASSES:
            return {}
        changed: dict[str, bool] = {}
        for part, options in (
            (tokenizer.pre_tokenizer, BYTE_LEVEL_OPTIONS if _is(tokenizer.pre_tokenizer, "ByteLevel") else {}),
            (tokenizer.normalizer, BERT_OPTIONS if _is(tokenizer.normalizer, "BertNormalizer") else {}),
        ):
            for option, attribute in options.items():
                value = self._config.get(option)
                if isinstance(value, bool) and getattr(part, attribute) != value:
                    setattr(part, attribute, value)
                    changed[option] = value
        return changed


def _read(path: Path) -> dict[str, Any]:
    """The JSON object of a file; an empty one if there is no file."""
    if not path.is_file():
        return {}
    try:
        return _mapping(json.loads(path.read_bytes()), path)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not a JSON object ({error}): copy the tokenizer's folder again") from error


def _is(part: object, kind: str) -> bool:
    return type(part).__name__ == kind


def _mapping(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"{path} is not a JSON object, or has a {type(value).__name__} where one must be: copy it again"
        )
    return value
