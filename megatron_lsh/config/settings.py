"""``Setting``: what the dataclass fields say about one flag, in the form the other modules of this folder use."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_lsh.config.flag import Bounds


@dataclass(frozen=True)
class Setting:
    """One field of one part of the configuration."""

    section: str  # the attribute of Config it lives in, e.g. "model"
    name: str  # the field, e.g. "num_layers"; unique over all sections
    kind: type  # int, float, str or bool; of the elements if it is a list
    is_list: bool
    optional: bool  # None is a value (absent)
    default: Any
    help: str
    choices: tuple[str, ...] | None
    bounds: Bounds
    off: str | None
    parse: Callable[[Any], Any] | None
    aliases: tuple[str, ...]

    @property
    def path(self) -> str:
        """``model.num_layers``: the name in errors, in JSON and in nested YAML."""
        return f"{self.section}.{self.name}"

    @property
    def flag(self) -> str:
        """What a user types: ``--num-layers``, or the off switch of a boolean that is on by default."""
        return self.off or "--" + self.name.replace("_", "-")

    @property
    def explanation(self) -> str:
        """What the flag does and which values it takes."""
        text = f"Turn off {self.help[0].lower()}{self.help[1:]}" if self.off else self.help
        if self.choices is not None:
            return f"{text}; one of {', '.join(self.choices)}"
        return (
            f"{text}; {self.bounds}" if self.bounds.closed_above else text
        )  # a lower bound alone is plain from the name

    @property
    def default_text(self) -> str:
        """The default as a user would type it; of an off switch its own state; empty if there is none."""
        if self.default is None:
            return ""
        if self.kind is bool:
            return "on" if self.default and not self.off else "off"
        return " ".join(map(str, self.default)) if self.is_list else str(self.default)

    def get(self, cfg: Any) -> Any:
        return getattr(getattr(cfg, self.section), self.name)

    def set(self, cfg: Any, value: Any) -> None:
        """A list is copied: the default of a setting belongs to every configuration of a process."""
        setattr(getattr(cfg, self.section), self.name, list(value) if isinstance(value, list) else value)

    def convert(self, value: Any) -> Any:
        """``value`` from the command line (strings) or YAML/JSON (typed) as the field's type.

        Raises:
            ValueError: with the rule that it breaks, e.g. ``must be an integer``.
        """
        if value is None:
            if self.optional:
                return None
            raise ValueError("must have a value")
        if self.parse is not None:
            value = self.parse(value)
            if value is None and self.optional:
                return None
        if not self.is_list:
            return _CONVERTERS[self.kind](value)
        elements = value if isinstance(value, list | tuple) else [value]
        return [_CONVERTERS[self.kind](element) for element in elements]

    def complaint(self, value: Any) -> str | None:
        """The rule (choices, bounds) that a value of the right type breaks, or None."""
        for element in value if self.is_list and value is not None else [value]:
            if element is None:
                continue
            if self.choices is not None and element not in self.choices:
                return "must be one of " + ", ".join(self.choices)
            if self.kind in (int, float) and not self.bounds.contain(element):
                return f"must be {self.bounds}"
        return None


def settings_of(config_class: type) -> dict[str, Setting]:
    """All settings of a Config class by field name, in the order of declaration.

    Raises:
        ValueError: if two sections declare the same name (a mistake in the dataclasses).
    """
    return dict(_declared(config_class))


@functools.cache  # reading the types of some 400 fields takes tens of milliseconds, and a program asks several times
def _declared(config_class: type) -> Mapping[str, Setting]:
    settings: dict[str, Setting] = {}
    for section, part in sections_of(config_class).items():
        hints = typing.get_type_hints(part)
        for field in dataclasses.fields(part):
            if field.name in settings:
                raise ValueError(f"{section}.{field.name} is already declared in {settings[field.name].path}")
            kind, is_list, optional = _unwrap(hints[field.name])
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            settings[field.name] = Setting(section, field.name, kind, is_list, optional, default, **field.metadata)
    return settings


def sections_of(config_class: type) -> dict[str, type]:
    """The parts of a Config class: attribute name to dataclass. Its other fields are not settings."""
    hints = typing.get_type_hints(config_class)
    names = [field.name for field in dataclasses.fields(config_class)]
    return {name: hints[name] for name in names if dataclasses.is_dataclass(hints[name])}


def summary(part: type) -> str:
    """First paragraph of a dataclass' docstring, the heading of its flags."""
    return " ".join((part.__doc__ or "").split("\n\n")[0].split())


@dataclass(frozen=True)
class Spelling:
    """One way to write a setting; an off switch inverts its value."""

    setting: Setting
    flag: str
    inverted: bool

    def convert(self, value: Any) -> Any:
        converted = self.setting.convert(value)
        return not converted if self.inverted else converted


def spellings_of(settings: Mapping[str, Setting]) -> dict[str, Spelling]:
    """Every way to write every setting, by key (see :func:`as_key`). YAML and JSON may use all of them."""
    spellings = {name: Spelling(setting, setting.flag, inverted=False) for name, setting in settings.items()}
    for setting in settings.values():
        if setting.off is not None:
            spellings[as_key(setting.off)] = Spelling(setting, setting.off, inverted=True)
        spellings |= {as_key(alias): Spelling(setting, alias, inverted=False) for alias in setting.aliases}
    return spellings


def as_key(flag: str) -> str:
    """``--disable-bias-linear`` -> ``disable_bias_linear``: flags and YAML keys meet in this form."""
    return flag.lstrip("-").replace("-", "_")


def named(path: str, value: Any) -> str:
    """``model.num_layers (4)``: how every error names a field and its value, on one line and of a length to be read."""
    return f"{path} ({'absent' if value is None else shown(value) or repr('')})"


def shown(value: Any, most: int = 80) -> str:
    """A value in an error: the first ``most`` characters, and what no terminal should get written as escapes."""
    try:
        text = str(value)
    except (ValueError, RecursionError):  # a number of too many digits, a tree of too many levels
        text = f"{type(value).__name__} too large to show"
    text = text if len(text) <= most else text[: most - 3] + "..."
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _unwrap(annotation: Any) -> tuple[type, bool, bool]:
    """(element type, is a list, may be None) of ``int``, ``int | None``, ``list[str]``, ``list[str] | None``."""
    optional = isinstance(annotation, types.UnionType)
    if optional:
        (annotation,) = (a for a in typing.get_args(annotation) if a is not types.NoneType)
    is_list = typing.get_origin(annotation) is list
    return (typing.get_args(annotation)[0] if is_list else annotation), is_list, optional


def to_bool(value: Any) -> bool:
    """As a switch. Raises ValueError with the rule, as the three below do."""
    text = str(value).lower()
    if isinstance(value, bool | str) and text in ("true", "false"):
        return text == "true"
    raise ValueError("must be true or false")


def to_int(value: Any) -> int:
    """What was written as a whole number of 64 bits."""
    if isinstance(value, int | str) and not isinstance(value, bool):
        try:
            number = int(value)  # no text of thousands of digits: Python refuses those
        except ValueError:
            raise ValueError("must be an integer") from None
        if -(2**63) <= number < 2**63:
            return number
        raise ValueError("must be an integer below 2^63")
    raise ValueError("must be an integer")


def to_float(value: Any) -> float:
    """As a finite number; -0 is 0, which some libraries take for a negative number."""
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number + 0.0
    raise ValueError("must be a finite number")


def to_str(value: Any) -> str:
    """As a text that can be printed, and be the name of a file."""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        text = str(value)
        if "\0" in text:  # a name with one reaches no operating system
            raise ValueError("must not contain a null character")
        if text.isascii() or text.encode("utf-8", "replace").decode() == text:
            return text
        raise ValueError("must be UTF-8")  # other bytes of a command line arrive as halves of surrogate pairs
    raise ValueError("must be a string")


_CONVERTERS: Mapping[type, Callable[[Any], Any]] = types.MappingProxyType(
    {bool: to_bool, int: to_int, float: to_float, str: to_str}
)
