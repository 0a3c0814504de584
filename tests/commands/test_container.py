"""The container file: linted like the scripts, and what it copies is what the installation needs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.tools.test_launchers import shellcheck

ROOT = Path(__file__).parents[2]


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, its words), lines that end in a backslash joined, comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def complaints(text: str) -> list[str]:
    """What hadolint's rules (DL...) find in a container file, as far as they concern ours."""
    steps = instructions(text)
    found = [f"{name} is no instruction" for name, _ in steps if name != name.upper()]
    values = dict(words.split("=", 1) for name, words in steps if name == "ARG" and "=" in words)
    for name, words in steps:
        if name == "FROM":
            base = re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], words)
            if not re.search(r":[\w.-]*\d", base) or base.endswith(":latest"):
                found.append(f"DL3006, DL3007: {base} has no version")
        elif name == "WORKDIR" and not words.startswith("/"):
            found.append(f"DL3000: {words} is relative")
        elif name in ("CMD", "ENTRYPOINT") and not words.startswith("["):
            found.append(f"DL3025: {name} {words} is not a JSON list")
        elif name == "ADD":
            found.append(f"DL3020: COPY, not ADD {words}")
        elif name == "RUN":
            found += [f"DL3004: sudo in {words}"] * ("sudo " in words) + [f"DL3003: cd in {words}"] * (
                " cd " in f" {words}"
            )
            if "apt-get install" in words:
                needed = ("apt-get update", "--no-install-recommends", "--yes", "rm -rf /var/lib/apt/lists/*")
                found += [f"DL3009, DL3014, DL3015: no {part} in {words}" for part in needed if part not in words]
    users = [words for name, words in steps if name == "USER"]
    return found + ([] if users and users[-1] != "root" else ["DL3002: the last user is root"])


def test_the_container_file_is_clean_and_its_steps_pass_shellcheck(tmp_path: Path) -> None:
    text = (ROOT / "Containerfile").read_text()
    assert not complaints(text)
    steps = [words for name, words in instructions(text) if name == "RUN"]
    arguments = [words.split("=")[0] for name, words in instructions(text) if name == "ARG"]
    (tmp_path / "steps.sh").write_text(
        "\n".join(["#!/bin/sh", *[f': "${{{name}:=}}"' for name in arguments], *steps, ""])
    )
    checked = subprocess.run([shellcheck(), tmp_path / "steps.sh"], text=True, capture_output=True)
    assert checked.returncode == 0, checked.stdout
    assert any(re.search(r"(^| )scripts/install\.sh /\S+", step) for step in steps), "the script that make install runs"


def test_what_is_copied_is_there_and_is_what_the_installation_reads() -> None:
    copied = [
        words.split()[:-1] for name, words in instructions((ROOT / "Containerfile").read_text()) if name == "COPY"
    ]
    sources = {source for words in copied for source in words}
    assert not [source for source in sources if not (ROOT / source).exists()]
    assert sources >= {"pyproject.toml", "setup.py", "kernels", "megatron_lsh", "README.md", "scripts/install.sh"}


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ("FROM ubuntu", "DL3006"),
        ("FROM ubuntu:latest", "DL3007"),
        ("WORKDIR here", "DL3000"),
        ("CMD python", "DL3025"),
        ("RUN apt-get update && apt-get install --yes g++", "DL3009"),
        ("RUN cd /tmp && ls", "DL3003"),
        ("run ls", "no instruction"),
    ],
)
def test_the_rules_find_what_they_are_for(wrong: str, rule: str) -> None:
    assert any(rule in complaint for complaint in complaints(f"{wrong}\nUSER someone\n"))
