"""Any words behind any flags, and any file as --config: a valid configuration, or one ConfigError that can be read."""

from __future__ import annotations

import json
import re
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_lsh.config import BertConfig, Config, T5Config, describe, from_dict, parse_args, to_json, validate
from megatron_lsh.config.classification import ClassificationConfig, parse_classification_args
from megatron_lsh.config.settings import Setting, named, settings_of
from megatron_lsh.config.swin import SwinConfig
from megatron_lsh.errors import ConfigError
from tests.config.command_lines import SMALL, small
from tests.fuzzing import cases

_SWIN = """
--img-h 16 --patch-dim 2 --swin-depths 1 2 --swin-window-size 4 --hidden-size 16 --num-attention-heads 2 --num-experts 4
--moe-aux-loss-coeff 0.01 --micro-batch-size 2 --lr 1e-3 --train-iters 10 --data-path pictures
"""
FAMILIES: dict[type[Config], list[str]] = {
    Config: SMALL,
    BertConfig: SMALL,
    T5Config: SMALL,
    ClassificationConfig: [
        *(word for word in SMALL if word not in ("--mock-data", "--train-iters", "10")),
        "--task",
        "cola",
    ],
    SwinConfig: _SWIN.split(),
}
INTEGERS = [
    *"01234578",
    "-1",
    "16",
    "100",
    "2147483648",
    str(2**63),
    "9" * 5000,
    "1.5",
    "1e3",
    "x",
    "",
    "0x10",
    "1_000",
]
NUMBERS = [*"012", "-0.0", "1e-320", "1e308", "0.5", "-1", "nan", "inf", "1e999", "x", "", "1e-5", "100"]
TEXTS = [
    "",
    "x",
    " ",
    "a\x00b",
    "\udcff",
    "..",
    "-",
    "--",
    "-x",
    "--lr",
    "[0]*4",
    "([0]*2+[1]*2)",
    "[[0]]",
    "[0]*99999999",
]
TEXTS += ["1,1,1,1", "0,0", "nan,1", "a=b", "é\u2028\x1b[2J", "0.5", "a" * 300, "--bf16=x", "({" * 500]
FIX = "set|drop|change|use|give|add|choose|keep|write|raise|lower|see|start|correct|upcycle"
LINE = re.compile(r".+( must | is unknown; | not supported here: | has .* entries and must).*")


def words_for(setting: Setting) -> st.SearchStrategy[list[str]]:
    """The flag with words that are right in kind, at the edge, or wrong."""
    flag = setting.flag
    if setting.kind is bool:
        return st.sampled_from([[flag], [flag], [flag, "false"], [flag, "x"], [flag + "="]])
    word = st.sampled_from({int: INTEGERS, float: NUMBERS, str: TEXTS}[setting.kind])
    if setting.choices is not None:
        word = st.sampled_from(setting.choices) | word
    if setting.is_list:
        return st.lists(word, max_size=3).map(lambda words: [flag, *words])
    stray = word.map(lambda text: [flag, text, ""])
    return word.map(lambda text: [flag, text]) | word.map(lambda text: [f"{flag}={text}"]) | stray


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[type[Config], list[str]]:
    family = draw(st.sampled_from(list(FAMILIES)))
    flags = settings_of(family)
    # Folders are written in: those that this test would leave behind are left out.
    names = draw(
        st.lists(st.sampled_from(sorted(set(flags) - {"save", "tensorboard_dir", "metrics_jsonl"})), max_size=6)
    )
    return family, FAMILIES[family] + [word for name in names for word in draw(words_for(flags[name]))]


def check_message(error: ConfigError) -> None:
    """Each line can be printed, has an end, and says a rule and what to do."""
    for line in str(error).splitlines():
        assert line.isprintable() and len(line) < 1000, line
        assert LINE.fullmatch(line), line
        assert re.search(rf"\b({FIX})\b", line) or " nearest flag is --" in line, line
        assert "must be :" not in line and "must be  " not in line, line


@settings(deadline=None, max_examples=cases(100), suppress_health_check=[HealthCheck.too_slow])
@given(command_lines(), st.sampled_from([1, 2, 3, 4, 8, 10**6]))
def test_any_command_line_is_valid_or_refused_in_readable_lines(
    line: tuple[type[Config], list[str]], ranks: int
) -> None:
    family, words = line
    try:
        cfg = parse_classification_args(words) if family is ClassificationConfig else parse_args(words, family)
        valid = validate(cfg, ranks)
    except ConfigError as error:
        check_message(error)
        return
    assert validate(valid, ranks) == valid
    assert describe(valid)
    assert from_dict(json.loads(to_json(valid)), type(valid)) == valid


SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
KEYS = st.sampled_from([*settings_of(Config), "model", "moe", "version", "config", "derived", "fp16"]) | st.text(
    max_size=5
)
DOCUMENTS = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)


def check_file(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    for parse in (parse_args, parse_classification_args):
        try:
            parse(["--config", str(path)])  # type: ignore[operator]
        except ConfigError as error:
            assert all(line.isprintable() for line in str(error).splitlines())


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(DOCUMENTS)
def test_any_document_as_config(tmp_path: Path, document: Any) -> None:
    check_file(tmp_path / "c", json.dumps(document).encode())


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=40) | st.text(string.printable, max_size=60).map(str.encode))
def test_any_bytes_as_config(tmp_path: Path, content: bytes) -> None:
    check_file(tmp_path / "c", content)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (BOMB, "its aliases stand for more than 100,000 values"),
        ("a: &a {b: *a}", "its aliases stand for more than 100,000 values"),
        ("num_layers: " + "9" * 5000, "must be a YAML file: line 1, column 13: 9+... is no int .Exceeds the limit"),
        (
            "seed: 2024-13-45",
            "must be a YAML file: line 1, column 7: 2024-13-45 is no timestamp .month must be in 1..12",
        ),
        ("classes: " + "[" * 1000, "nested too deeply"),
        ('{"classes": ' + "[" * 3000, "nested too deeply"),
        ('{"lr": 1e-3, "lr": 2}', "lr is given twice"),
        ("bf16: true\nlr: !!python/object:os.system {}", "line 2, column 5: could not determine a constructor"),
        (b"\xff\xfe\x00", "must be a readable file of text: line 1: 'utf-8' codec"),
        (
            '{"version": 1, "config": {"model": {"num_layers": {}}}, "derived": 5}',
            r"num_layers \(\{\}\) must be an integer",
        ),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value[:20],
)
def test_hostile_files(tmp_path: Path, content: str | bytes, complaint: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError, match=complaint):
        parse_args(["--config", str(path)])


def test_anchors_are_fine_where_they_are_few(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("a: &x {hidden_size: 64, num_layers: 2}\n".replace("a:", "model:") + "moe: {num_experts: 4}\n")
    assert parse_args(["--config", str(path)]).model.hidden_size == 64


def test_letters_beyond_the_first_plane_survive_a_saved_configuration(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(to_json(small("--tokenizer-model 🙂")))
    assert parse_args(["--config", str(path)]).data.tokenizer_model == "🙂"


def test_values_that_begin_with_a_dash_are_explained() -> None:
    def line(*words: str) -> str:
        with pytest.raises(ConfigError) as error:
            parse_classification_args(list(words))
        return str(error.value).splitlines()[0]

    assert line("--classes", "--lr", "x").startswith(
        "--classes must be followed by at least one value: give it (one that begins with - in a --config file)"
    )
    assert line("--lr", "-x") == "--lr must be followed by one value: give it (one that begins with - as --lr=-value)"
    assert line("--classes", "good", "-bad").endswith("if it is a value of --classes, give those in a --config file")
    assert line("-1") == "-1 must follow a flag that takes it: drop it, or see --help"
    assert line("", " ", "x") == "'' '' x must follow a flag that takes it: drop it, or see --help"


@example("a\nb")
@example("")
@given(st.text(max_size=200) | st.characters().map(lambda c: c * 100))
def test_a_value_in_an_error_is_short_and_on_one_line(text: str) -> None:
    line = named("a.b", text)
    assert line.isprintable() and 6 < len(line) < 1000 and line.startswith("a.b (")
