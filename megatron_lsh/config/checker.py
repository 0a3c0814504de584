"""``Checker``: states rules about a configuration, fills in derived values, and collects everything that is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Protocol

from megatron_lsh.config.saved_paths import PATHS
from megatron_lsh.config.settings import named, settings_of
from megatron_lsh.errors import ConfigError


class Checked(Protocol):
    """What is asked of a `Config`."""

    derived: dict[str, Any]
    notices: list[str]


def _no_path(name: str, value: Any) -> str | None:
    """The rule that an empty path breaks, such as that of `--save "$SAVE"`: it would be the current folder."""
    words = value if isinstance(value, list) else [value]
    if name in PATHS and any(isinstance(word, str) and not word.strip() for word in words):
        return "must not be an empty path (. is the current folder)"
    return None


class Checker:
    """Works on a configuration in place. Rules name settings as ``{num_layers}``."""

    def __init__(self, cfg: Checked) -> None:
        self.cfg = cfg
        self.settings = settings_of(type(cfg))
        self.problems: list[str] = []
        self.broken: set[str] = set()  # settings whose own value is wrong: rules about them say nothing new

    def forget_derived(self) -> None:
        """Undo an earlier validation (perhaps for another world size), except where the value was changed since."""
        for name, value in self.cfg.derived.items():
            if self.settings[name].get(self.cfg) == value:
                self.settings[name].set(self.cfg, self.settings[name].default)
        self.cfg.derived = {}

    def every_value(self) -> None:
        """Type, choices and bounds of each setting alone. Wrong values are replaced by the default, and remembered."""
        for name, setting in self.settings.items():
            value = setting.get(self.cfg)
            rule: str | None
            try:
                converted = setting.convert(value)
                rule = setting.complaint(converted) or _no_path(name, converted)
            except ValueError as error:
                rule = str(error)
            if rule is None:
                setting.set(self.cfg, converted)
            else:
                self.problems.append(f"{named(setting.path, value)} {rule}: change {setting.flag}")
                self.broken.add(name)
                setting.set(self.cfg, setting.default)

    def required(self, *names: str) -> None:
        """Each setting must have a value."""
        for name in names:
            if name not in self.broken and self.settings[name].get(self.cfg) is None:
                self.problems.append(f"{named(self.settings[name].path, None)} must be given: set {self._flag(name)}")

    def rule(self, text: str, holds: Callable[..., bool], fix: str | None = None) -> None:
        """One rule over several settings.

        Args:
            text: the rule, e.g. ``"{num_experts} must be divisible by {expert_model_parallel_size}"``.
            holds: gets the values of the settings named in ``text`` in that order; not called if one is absent or broken.
            fix: what the user should do; by default to change one of the named flags.
        """
        names = list(dict.fromkeys(re.findall(r"\{(\w+)\}", text)))
        values = [self.settings[name].get(self.cfg) for name in names]
        if self.broken.intersection(names) or None in values or holds(*values):
            return
        named_values = {n: named(self.settings[n].path, v) for n, v in zip(names, values, strict=True)}
        fix = fix or "change " + " or ".join(map(self._flag, names))
        self.problems.append(f"{text.format_map(named_values)}: {fix}")

    def fill(self, name: str, value: Any) -> None:
        """Give a derived value to a setting, unless its own value is wrong."""
        if name not in self.broken and self.settings[name].get(self.cfg) != value:
            self.settings[name].set(self.cfg, value)
            self.cfg.derived[name] = value

    def notice(self, text: str) -> None:
        """Something the user should read once at start-up."""
        if text not in self.cfg.notices:
            self.cfg.notices.append(text)

    def finish(self) -> None:
        """Raises: ConfigError: with one line per problem, if there is any."""
        if self.problems:
            raise ConfigError("\n".join(self.problems))

    def _flag(self, name: str) -> str:
        return self.settings[name].flag
