"""From a command line (and a YAML file) to a :class:`Config`.

argparse only splits the command line into flags and their words; it learns the flags from the dataclasses and from the
tables in ``compat.py``. What the words mean is decided in one place, :class:`_Reader`, for the command line and the YAML
file alike. Values are checked against their type here, and against bounds and each other in ``validate.py``.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from megatron_lsh.config.compat import LIST, NO_EFFECT, REJECTED, SAME_AS_HERE, SWITCH, TAKEN_AS, VALUE
from megatron_lsh.config.config import Config
from megatron_lsh.config.config_file import names_code, read_config_file
from megatron_lsh.config.from_checkpoint import with_checkpoint_args
from megatron_lsh.config.nearest import nearest_flag
from megatron_lsh.config.settings import (
    Setting,
    Spelling,
    as_key,
    named,
    sections_of,
    settings_of,
    shown,
    spellings_of,
    summary,
)
from megatron_lsh.errors import ConfigError

C = TypeVar("C", bound=Config)


def parse_args(
    argv: Sequence[str] | None = None,
    config_class: type[C] = Config,  # type: ignore[assignment]
    select: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> C:
    """Parse flags with Megatron-LM's names into a configuration. Give it to ``validate`` next.

    Args:
        argv: the words after the program's name; by default those of this process.
        config_class: Config, or a subclass with further parts (see there).
        select: which of the settings in the --config file (key -> value) to take; by default all.

    Returns:
        The configuration. Its ``notices`` name the flags that were accepted but have no effect.

    Raises:
        ConfigError: naming every unknown or unsupported flag and every value of a wrong type.
    """
    settings = settings_of(config_class)
    reader = _Reader(spellings_of(settings))
    argv = sys.argv[1:] if argv is None else argv
    parser = _build_parser(config_class, Path(sys.argv[0]).name)  # type: ignore[arg-type]  # a class is hashable
    known, strays = parser.parse_known_args(argv)
    written = vars(known)

    values: dict[str, Any] = {}
    path = written.pop("config", None)
    if path is not None:
        written_there = read_config_file(path, sections_of(config_class))
        values |= reader.read(written_there if select is None else select(written_there))
        there = values.get("moe_token_dispatcher_type")
        if "moe_token_dispatcher_type" not in written and names_code(path, there):
            reader.problems.append(
                f"--config ({path}) is the configuration of a run; its moe.moe_token_dispatcher_type ({there}) must not be "
                f"imported because a file says so: give it as well, --moe-token-dispatcher-type {there}, or another"
            )
    values |= reader.read(written)  # the command line wins
    reader.refuse_strays(strays, argv)
    problems = reader.problems + reader.refusals()
    if problems:
        raise ConfigError("\n".join(problems))

    notices = reader.notices()
    if values.get("use_checkpoint_args"):
        values, taken = with_checkpoint_args(values, settings)
        notices.append(taken)
    cfg = config_class()
    for name, value in {**config_class.preset(values), **values}.items():
        settings[name].set(cfg, value)
    cfg.notices += notices
    return cfg


class _Reader:
    """Turns what was written into values of settings, and collects everything that is wrong with it."""

    def __init__(self, spellings: Mapping[str, Spelling]) -> None:
        self.spellings = spellings
        self.problems: list[str] = []
        self.ignored: list[str] = []
        self.taken: list[str] = []
        self.rejected: dict[str, dict[str, None]] = {}  # what to use instead -> the flags that ask for it, in order

    def read(self, written: Mapping[str, Any]) -> dict[str, Any]:
        """Field name -> value of the right type, from key -> words (command line) or YAML value."""
        megatrons = {as_key(flag): flag for flag in (*NO_EFFECT, *TAKEN_AS, *REJECTED)}
        values: dict[str, Any] = {}
        for key, raw in written.items():
            if key in self.spellings:
                setting = self.spellings[key].setting
                try:
                    values[setting.name] = self.spellings[key].convert(raw)
                except ValueError as error:
                    self.problems.append(f"{named(setting.path, raw)} {error}: change {self.spellings[key].flag}")
            elif key in megatrons:
                if raw not in (None, False, "false", ["false"]):  # else: no to something we do not have
                    self._megatrons(megatrons[key], raw)
            else:
                self._refuse_unknown("--" + key.replace("_", "-"))
        return values | {TAKEN_AS[flag].setting: TAKEN_AS[flag].value for flag in self.taken}

    def refuse_strays(self, strays: Sequence[str], argv: Sequence[str]) -> None:
        """Words of ``argv`` that no flag takes: unknown flags, each named once, or else loose values."""
        unknown = dict.fromkeys(word for word in strays if re.match(r"--?[^\W\d]", word))
        for word in unknown:
            self._refuse_unknown(word.split("=")[0], self._list_before(word, argv))
        if strays and not unknown:
            words = shown(" ".join(word.strip() or "''" for word in strays))
            self.problems.append(f"{words} must follow a flag that takes it: drop it, or see --help")

    def _list_before(self, word: str, argv: Sequence[str]) -> str | None:
        """The flag whose list of texts ``word`` may be meant to be in: argparse takes all that begins with - for a flag."""
        before = [other for other in argv[: list(argv).index(word)] if other.startswith("--")]
        spelling = self.spellings.get(as_key(before[-1])) if before else None
        return spelling.flag if spelling and spelling.setting.is_list and spelling.setting.kind is str else None

    def refusals(self) -> list[str]:
        """One line per feature that is asked for and not there, with all the flags that ask for it."""
        are = {False: "is Megatron-LM's and not supported here", True: "are Megatron-LM's and not supported here"}
        return [f"{' '.join(flags)} {are[len(flags) > 1]}: {advice}" for advice, flags in self.rejected.items()]

    def notices(self) -> list[str]:
        """What became of flags that are not settings: one line for all without effect, one per difference."""
        no_effect = ["no effect here: " + " ".join(dict.fromkeys(self.ignored))] if self.ignored else []
        return no_effect + [
            f"{flag} is {TAKEN_AS[flag].why}" for flag in dict.fromkeys(self.taken) if TAKEN_AS[flag].why
        ]

    def _megatrons(self, flag: str, raw: Any) -> None:
        """A flag of Megatron-LM's that is no setting, and the words behind it."""
        words = " ".join(map(str, raw if isinstance(raw, list) else [raw]))
        is_switch = flag in TAKEN_AS or (flag in NO_EFFECT and NO_EFFECT[flag].words == SWITCH)
        if is_switch and raw is not True and words != "true":
            self.problems.append(f"{flag} ({shown(words)}) must be true or false: drop {shown(words)}")
        elif flag in TAKEN_AS:
            self.taken.append(flag)
        elif flag in NO_EFFECT or words == SAME_AS_HERE.get(flag):
            self.ignored.append(flag)
        else:
            self.rejected.setdefault(REJECTED[flag], {})[flag] = None

    def _refuse_unknown(self, flag: str, list_before: str | None = None) -> None:
        ours = [spelling.flag for spelling in self.spellings.values()] + ["--config"]
        nearest = nearest_flag(flag, ours, [*NO_EFFECT, *TAKEN_AS, *REJECTED])
        problem = f"{shown(flag)} is unknown; the nearest flag is {nearest}"
        if list_before is not None:
            problem += f"; if it is a value of {list_before}, give those in a --config file"
        if problem not in self.problems:
            self.problems.append(problem)


class FlagParser(argparse.ArgumentParser):
    """Splits a command line; what is wrong with it is a ConfigError."""

    def error(self, message: str) -> NoReturn:
        missing = re.fullmatch(r"argument (\S+): expected (one|at least one) argument", message)
        if missing is None:
            raise ConfigError(f"{shown(message)}: see --help")
        flag = missing[1].split("/")[0]
        how = f"as {flag}=-value" if missing[2] == "one" else "in a --config file"
        raise ConfigError(f"{flag} must be followed by {missing[2]} value: give it (one that begins with - {how})")


@functools.cache
def _build_parser(config_class: type[Config], program: str) -> argparse.ArgumentParser:
    settings = settings_of(config_class)
    parser = FlagParser(
        prog=program,
        usage="%(prog)s [--config FILE] [FLAGS]",
        description="Flags have the names, defaults and meaning of Megatron-LM's unless their help says otherwise. "
        "A switch may be followed by false, which undoes it.",
        epilog="docs/flags.md lists these flags, and the Megatron-LM flags that have no effect or are rejected.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # so that only what the user wrote comes out
    )
    parser.add_argument(
        "--config", metavar="FILE", help="read settings from a YAML file or a saved config.json; flags win over it"
    )
    for section, part in sections_of(config_class).items():
        group = parser.add_argument_group(section, summary(part))
        for setting in settings.values():
            if setting.section == section:
                group.add_argument(
                    setting.flag, *setting.aliases, dest=as_key(setting.flag), **_argparse_options(setting)
                )
    arities: Mapping[str, dict[str, Any]] = {
        SWITCH: {"nargs": "?", "const": True},
        VALUE: {},
        LIST: {"nargs": "*"},
    }
    spellings = spellings_of(settings)
    words = {flag: no_effect.words for flag, no_effect in NO_EFFECT.items()}
    words |= dict.fromkeys(TAKEN_AS, SWITCH) | dict.fromkeys(REJECTED, LIST)
    for flag, number in words.items():
        if as_key(flag) not in spellings:
            parser.add_argument(flag, help=argparse.SUPPRESS, **arities[number])
    return parser


def _argparse_options(setting: Setting) -> dict[str, Any]:
    default = f" (default: {setting.default_text})" if setting.default_text and setting.kind is not bool else ""
    options: dict[str, Any] = {"help": (setting.explanation + default).replace("%", "%%")}
    if setting.is_list:
        return options | {"nargs": "+", "metavar": setting.kind.__name__.upper()}
    if setting.kind is bool:
        return options | {"nargs": "?", "const": True, "metavar": "false"}
    return options | {"metavar": setting.kind.__name__.upper()}
