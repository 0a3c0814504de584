"""Commands: one module for each program of this package, with ``main(words) -> exit status`` in it.

    python -m megatron_lsh                              the list
    python -m megatron_lsh generate --help              one of them
    torchrun --nproc-per-node 8 -m megatron_lsh pretrain_gpt_moe FLAGS

An installed package needs no checkout: the entry scripts and tools/ are the same programs under the names that they have in
a checkout. A new module here is a new command, by the name of its file.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

from megatron_lsh.errors import ConfigError


def names() -> list[str]:
    """The commands, in alphabetical order."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__")


def overview() -> str:
    """What each command does: the first line of its module, which is read and not imported."""
    lines = ["usage: python -m megatron_lsh COMMAND [FLAGS]   (COMMAND --help: its flags)", ""]
    for name in names():
        module = ast.parse((Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
        lines.append(f"  {name:<24} {(ast.get_docstring(module) or '').splitlines()[0]}")
    return "\n".join(lines)


def chosen(word: str) -> str:
    """The command that `word` names; dashes may stand for underscores. Raises ConfigError."""
    name = word.replace("-", "_").removesuffix(".py")
    if name not in names():
        near = get_close_matches(name, names(), 1)
        raise ConfigError(
            f"COMMAND ({word}) must be one of {', '.join(names())}: "
            + (f"write {near[0]}" if near else "name one of them")
        )
    return name


def run(words: Sequence[str] | None = None) -> int:
    """The command named by the first word, with the rest as its flags; by default those of this process."""
    word, *flags = (sys.argv[1:] if words is None else words) or ["--help"]
    if word in ("-h", "--help"):
        print(overview())
        return 0
    try:
        name = chosen(word)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if words is None:
        sys.argv[0] = f"megatron_lsh {name}"  # what argparse calls the program
    status: int = import_module(f"megatron_lsh.commands.{name}").main(flags)
    return status
