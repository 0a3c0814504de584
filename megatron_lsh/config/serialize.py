"""A configuration as JSON (for ``config.json`` beside a run and in every checkpoint) and as text for start-up."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from megatron_lsh.config.config import Config
from megatron_lsh.config.saved_paths import with_full_paths
from megatron_lsh.config.settings import named, sections_of, settings_of, spellings_of
from megatron_lsh.errors import ConfigError

FORMAT_VERSION = 1  # raise when a field changes its meaning; new and removed fields need no new version

C = TypeVar("C", bound=Config)


def to_dict(cfg: Config) -> dict[str, Any]:
    """``{"version": 1, "derived": [names], "config": {section: {name: value}}}``, all of it JSON values."""
    config: dict[str, dict[str, Any]] = {section: {} for section in sections_of(type(cfg))}
    for name, setting in settings_of(type(cfg)).items():
        config[setting.section][name] = setting.get(cfg)
    return {"version": FORMAT_VERSION, "derived": sorted(cfg.derived), "config": config}


def from_dict(document: Mapping[str, Any], config_class: type[C] = Config) -> C:  # type: ignore[assignment]
    """The configuration that :func:`to_dict` wrote, perhaps by another version of this package.

    Settings that are missing keep their default; settings that no longer exist are named in ``notices``.

    Raises:
        ConfigError: if the document is not a saved configuration, is of a newer format, or holds a value of another type.
    """
    if not is_saved_config(document):
        raise ConfigError(
            "a saved configuration must hold 'version' and 'config': give the config.json of a run or of a checkpoint"
        )
    if document["version"] > FORMAT_VERSION:
        raise ConfigError(
            f"the configuration's version ({document['version']}) must be at most {FORMAT_VERSION}: update megatron_lsh"
        )
    cfg = config_class()
    spellings = spellings_of(settings_of(config_class))
    problems: list[str] = []
    unknown: list[str] = []
    for section, values in document["config"].items():
        for name, value in values.items():
            if name not in spellings:
                unknown.append(f"{section}.{name}")
                continue
            spelling = spellings[name]
            try:
                spelling.setting.set(cfg, spelling.convert(value))
            except ValueError as error:
                problems.append(f"{named(spelling.setting.path, value)} {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    if unknown:
        cfg.notices.append("ignored settings that this version does not have: " + ", ".join(unknown))
    derived = [name for name in _derived_in(document) if name in spellings]
    cfg.derived = {name: spellings[name].setting.get(cfg) for name in derived}
    return cfg


def to_json(cfg: Config) -> str:
    """:func:`to_dict` as indented text. It can be given to ``--config`` to repeat the run; :func:`from_dict` reads it."""
    return json.dumps(to_dict(cfg), indent=2) + "\n"


def to_saved(cfg: Config) -> dict[str, Any]:
    """:func:`to_dict` for a file: with full paths, since its reader may stand in another folder."""
    return with_full_paths(to_dict(cfg))


def is_saved_config(document: Any) -> bool:
    """Whether a parsed file is what :func:`to_dict` writes (rather than a YAML file by hand)."""
    return (
        isinstance(document, Mapping)
        and type(document.get("version")) is int
        and isinstance(document.get("config"), Mapping)
        and all(isinstance(section, Mapping) for section in document["config"].values())
    )


def as_saved_config(document: Any) -> Mapping[str, Any] | None:
    """The document that :func:`to_dict` writes, also of bare sections, as older checkpoints hold; else None."""
    if is_saved_config(document):
        return document  # type: ignore[no-any-return]
    bare = isinstance(document, Mapping) and document and all(isinstance(part, Mapping) for part in document.values())
    return {"version": FORMAT_VERSION, "derived": [], "config": document} if bare else None


def settings_given_in(document: Mapping[str, Any]) -> dict[str, Any]:
    """``{section: {name: value}}`` of a saved configuration without what validate() had derived."""
    derived = _derived_in(document)
    return {
        section: {name: value for name, value in values.items() if name not in derived}
        for section, values in document["config"].items()
    }


def _derived_in(document: Mapping[str, Any]) -> set[str]:
    derived = document.get("derived")
    return {name for name in derived if isinstance(name, str)} if isinstance(derived, list) else set()


def positions_per_sample(sections: Mapping[str, Any]) -> int | None:
    """Tokens of a sample as long as saved settings allow, of both stacks of a T5; None for pictures, and if unknown."""
    places = (
        [("t5", "encoder_seq_length"), ("t5", "decoder_seq_length")] if "t5" in sections else [("model", "seq_length")]
    )
    total = 0
    for section, name in places:
        length = sections[section].get(name) if isinstance(sections.get(section), Mapping) else None
        if type(length) is not int or not 0 < length < 1 << 31 or "swin" in sections:
            return None
        total += length
    return total


def describe(cfg: Config) -> str:
    """The text printed at start-up: what differs from the default, or everything with --print-full-config.

    Values that validate() worked out from others are marked ``(derived)``.
    """
    settings = settings_of(type(cfg)).values()
    shown = [s for s in settings if cfg.logging.print_full_config or s.get(cfg) != s.default]
    width = max((len(s.path) for s in shown), default=0)
    rows = [f"  {s.path:<{width}}  {s.get(cfg)}{'  (derived)' if s.name in cfg.derived else ''}" for s in shown]
    if cfg.logging.print_full_config:
        return "\n".join(["configuration:", *rows])
    rest = f"  ({len(settings) - len(shown)} settings at their default: --print-full-config prints them too)"
    return "\n".join(["configuration (what differs from the default):", *rows, rest])
