"""``--config FILE``: settings from a YAML file, or from the ``config.json`` that a run saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_lsh.config.kept_tokenizer import without_lost_files
from megatron_lsh.config.serialize import is_saved_config, settings_given_in
from megatron_lsh.config.settings import as_key, shown
from megatron_lsh.errors import ConfigError

_MOST_NODES = 100_000  # of a document with its aliases written out: a few lines can stand for billions


class _Loader(yaml.SafeLoader):
    """Refuses a key that is written twice, of which YAML would silently keep the last. All its errors have a place."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{shown(name)} is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)

    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        if _written_out(node, {}) > _MOST_NODES:
            problem = f"its aliases stand for more than {_MOST_NODES:,} values"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return self.construct_document(node)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception as error:  # a date that does not exist, a number of too many digits, a tag that does not fit
            problem = f"{shown(node.value)} is no {node.tag.rpartition(':')[2]} ({error})"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


def _written_out(node: yaml.Node, known: dict[int, float]) -> float:
    """Nodes of a document in which every alias is replaced by what it stands for; infinite if one holds itself."""
    if id(node) not in known:
        known[id(node)] = float("inf")
        children = [child for pair in node.value for child in (pair if isinstance(pair, tuple) else [pair])]
        inside = sum(_written_out(child, known) for child in children) if not isinstance(node, yaml.ScalarNode) else 0
        known[id(node)] = 1 + inside
    return known[id(node)]


def read_document(path: str, flag: str = "--config") -> Any:
    """What a JSON or YAML file holds that `flag` names.

    JSON is tried first: YAML reads most of it, but numbers such as 1e-5 as text, and letters beyond the first 65,536, which
    JSON writes in two halves, as halves.

    Raises:
        ConfigError: if the file cannot be read or is neither.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"{flag} ({shown(path, 1000)}) must be a readable file of text: {error.strerror}: give another"
        ) from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{flag} ({shown(path, 1000)}) must be a readable file of text: line {line}: {error}: correct it"
        ) from error
    except ValueError as error:  # a null byte in the name
        raise ConfigError(
            f"{flag} ({shown(path, 1000)}) must be a readable file of text: {error}: give another"
        ) from error
    try:
        return json.loads(text, object_pairs_hook=_without_doubles)
    except RecursionError as error:
        raise ConfigError(
            f"{flag} ({shown(path, 1000)}) must be a YAML file: this one is nested too deeply: make it flatter"
        ) from error
    except ValueError:
        pass
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{flag} ({shown(path, 1000)}) must be a YAML file: {_where(error, text)}: correct it"
        ) from error
    except RecursionError as error:
        raise ConfigError(
            f"{flag} ({shown(path, 1000)}) must be a YAML file: this one is nested too deeply: make it flatter"
        ) from error


def _where(error: yaml.YAMLError, text: str) -> str:
    """What is wrong with the file and at which place, on one line."""
    if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark or error.context_mark) is not None:
        return f"line {mark.line + 1}, column {mark.column + 1}: {shown(error.problem or error.context, 200)}"
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f"line {line}: character {error.character!a} is not allowed"
    return " ".join(str(error).split())


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file; one with a key twice is left to YAML, which says where."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is given twice")
    return dict(pairs)


def read_config_file(path: str, sections: Mapping[str, type]) -> dict[str, Any]:
    """The file's settings as flat key -> value, unchecked.

    Keys are Megatron's flag names, with dashes or underscores (``num-layers: 4``), at the top or nested under the
    section they belong to (``model: {num_layers: 4}``). Of a saved ``config.json`` the values that were derived from
    others are left out, so that they follow a change of those on the command line.

    Raises:
        ConfigError: if the file cannot be read, or names a section that does not exist or a setting twice.
    """
    document, folder = read_document(path), Path(path).parent
    path = shown(path, 1000)
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(
            f"--config ({path}) must hold a mapping from settings to values, not {shown(document)}: correct it"
        )
    if is_saved_config(document):
        document = settings_given_in(document)
    if isinstance(document.get("data"), dict) and (folder / "manifest.json").exists():  # the one of a checkpoint
        document["data"] = without_lost_files(folder, document["data"])

    flat: dict[str, Any] = {}
    for key, value in document.items():
        nested = isinstance(value, dict)
        if nested and key not in sections:
            raise ConfigError(
                f"--config ({path}): section {shown(key)} must be one of {', '.join(sections)}: rename it"
            )
        for name, entry in value.items() if nested else [(key, value)]:
            if as_key(str(name)) in flat:
                raise ConfigError(f"--config ({path}): {shown(name)} is given twice; keep one")
            flat[as_key(str(name))] = entry
    return flat


def names_code(path: str, value: object) -> bool:
    """Whether `value`, read in the file `path`, is a ``module:factory`` that a run or a checkpoint left there.

    A file that a user wrote may name code to import; one that came with somebody's checkpoint may not.
    """
    if not isinstance(value, str) or ":" not in value:
        return False
    return (Path(path).parent / "manifest.json").exists() or is_saved_config(read_document(path))
