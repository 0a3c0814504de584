"""``--config FILE``: settings from a YAML file, or from the ``config.json`` that a run saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from megatron_lsh.config.serialize import is_saved_config, settings_given_in
from megatron_lsh.config.settings import as_key
from megatron_lsh.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """Refuses a key that is written twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_config_file(path: str, sections: Mapping[str, type]) -> dict[str, Any]:
    """The file's settings as flat key -> value, unchecked.

    Keys are Megatron's flag names, with dashes or underscores (``num-layers: 4``), at the top or nested under the
    section they belong to (``model: {num_layers: 4}``). Of a saved ``config.json`` the values that were derived from
    others are left out, so that they follow a change of those on the command line.

    Raises:
        ConfigError: if the file cannot be read, or names a section that does not exist or a setting twice.
    """
    try:
        with open(path, encoding="utf-8") as file:
            document = yaml.load(file, _Loader)
    except OSError as error:
        raise ConfigError(f"--config ({path}) must be a readable file: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config ({path}) must be a YAML file: {error}") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"--config ({path}) must hold a mapping from settings to values, not {document!r:.80}")
    if is_saved_config(document):
        document = settings_given_in(document)

    flat: dict[str, Any] = {}
    for key, value in document.items():
        nested = isinstance(value, dict)
        if nested and key not in sections:
            raise ConfigError(f"--config ({path}): section {key} must be one of {', '.join(sections)}")
        for name, entry in value.items() if nested else [(key, value)]:
            if as_key(str(name)) in flat:
                raise ConfigError(f"--config ({path}): {name} is given twice; keep one")
            flat[as_key(str(name))] = entry
    return flat
