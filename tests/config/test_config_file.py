"""--config files of any content: what YAML reads in them, or a ConfigError that names file and line."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lsh.config import Config, parse_args
from megatron_lsh.config.config_file import read_config_file
from megatron_lsh.config.settings import as_key, sections_of
from megatron_lsh.errors import ConfigError

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (BOMB, 1, "its aliases stand for more than 100,000 values"),
        ("num_layers: 1\na: &a [*a]\n", 1, "its aliases stand for more than 100,000 values"),
        ("num_layers: 1\nlr: 2024-99-99\n", 2, r"2024-99-99 is no timestamp .month must be in"),
        ("lr: !!int abc\n", 1, "abc is no int"),
        ("lr: !!timestamp abc\n", 1, "abc is no timestamp"),
        ("lr: !!bool abc\n", 1, "abc is no bool"),
        ("\nlr: " + "1" * 5000, 2, "is no int"),
        ("a: 1\n\nb: !!python/object:os.system x\n", 3, "could not determine a constructor"),
        ("a: 1\nb: \x00\n", 2, "character .* is not allowed"),
        ("a: 1\nb: *nothing\n", 2, "undefined alias"),
        ("{a: 1, a: 2}", 1, "a is given twice"),
        ('{"a": 1,\n "a": 2}', 2, "a is given twice"),
        ("? [a]\n: 1\n", 1, "found unhashable key"),
    ],
)
def test_places_of_mistakes(tmp_path: Path, content: str, line: int, message: str) -> None:
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(ConfigError, match=rf"run\.yaml. must be a YAML file: line {line}[,:].*{message}"):
        parse_args(["--config", str(tmp_path / "run.yaml")])


def test_words_of_the_command_line_that_are_no_text() -> None:
    with pytest.raises(ConfigError, match=r"data.tokenizer_model .* must be UTF-8"):
        parse_args(["--tokenizer-model", "a\udcff"])


PIECES = "a: lr: - [ ] { } &x *x !!int !!set ? : , 1 no \" ' %YAML 1.1 --- ... <<: 0o8 1_0 1:99 # \ufeff 2024-01-01 ~ |"
FRAGMENTS = st.lists(st.sampled_from([*PIECES.split(), " ", "\n", "  ", "\t"]), max_size=20).map("".join)


@settings(deadline=None, max_examples=150)
@given(FRAGMENTS.map(str.encode) | st.binary(max_size=20))
def test_any_file_is_read_as_yaml_or_refused_with_its_line(content: bytes) -> None:
    outcome = _outcome(content)
    if isinstance(outcome, str):
        place = r"be a YAML file: (line [1-9]|this one is nested)|be a readable file of text: line [1-9]"
        assert re.search(rf"/run\.yaml\)(: | must (hold |{place}))", outcome), outcome
    else:
        text = content.decode("utf-8-sig")
        try:
            expected = json.loads(text)
        except ValueError:
            expected = yaml.safe_load(text) or {}
        nested = {key: value for name in expected for key, value in _entries(name, expected[name])}
        assert str(outcome) == str(nested)  # as text, because nan is not equal to itself


def _outcome(content: bytes) -> dict[str, Any] | str:
    """What is read, or the error's text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_bytes(content)
        try:
            return read_config_file(str(path), sections_of(Config))
        except ConfigError as error:
            return str(error)


def _entries(name: Any, value: Any) -> list[tuple[str, Any]]:
    pairs = value.items() if isinstance(value, dict) else [(name, value)]
    return [(as_key(str(key)), entry) for key, entry in pairs]
