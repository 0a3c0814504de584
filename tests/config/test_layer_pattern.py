"""moe_layer_freq: which layers are MoE, and that nothing but lists of integers is ever evaluated."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lsh.config import moe_layer_pattern
from megatron_lsh.errors import ConfigError


@pytest.mark.parametrize(
    ("freq", "layers", "expected"),
    [
        ("1", 3, "111"),
        (" 2 ", 5, "10101"),
        (3, 7, "1001001"),
        ("9", 3, "100"),
        ([0, 1, 0, 1], 4, "0101"),
        ("[0,1]*2", 4, "0101"),
        ("([0]*3+[1]*58)", 61, "000" + "1" * 58),
        ("2*[1]+[0]", 3, "110"),
        ("[0] * 1 + ([1] + [0] * 2) * 2", 7, "0100100"),
        ("[1]*0+[0,0]", 2, "00"),
    ],
)
def test_known_patterns(freq: str | int | list[int], layers: int, expected: str) -> None:
    assert moe_layer_pattern(freq, layers) == [digit == "1" for digit in expected]


@given(st.integers(1, 50), st.integers(1, 50))
def test_an_integer_is_a_period(freq: int, layers: int) -> None:
    pattern = moe_layer_pattern(str(freq), layers)
    assert pattern == [layer % freq == 0 for layer in range(layers)] and pattern[0]


LITERALS = st.lists(st.integers(0, 1), max_size=4).map(str)
EXPRESSIONS = st.recursive(
    LITERALS,
    lambda inner: st.one_of(
        st.builds("({} + {})".format, inner, inner),
        st.builds("({})*{}".format, inner, st.integers(0, 4)),
        st.builds("{}*({})".format, st.integers(0, 4), inner),
    ),
    max_leaves=6,
)


@given(EXPRESSIONS)
def test_expressions_mean_what_python_means(text: str) -> None:
    expected = eval(text)
    assert moe_layer_pattern(text, len(expected)) == [bool(entry) for entry in expected]
    with pytest.raises(ConfigError, match="must have one per layer"):
        moe_layer_pattern(text, len(expected) + 1)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "-1",
        "1.5",
        "two",
        "[0, 2]",
        "[0, -1]",
        "[True]",
        "[0.0]",
        "['0']",
        "[[1]]",
        "(0, 1)",
        "[1] - [0]",
        "[1] ** 2",
        "[1] * [0]",
        "[1] + 0",
        "[0",
        "__import__('os').system('true')",
        "[x for x in (0, 1)]",
        "[0, *[1]]",
        "[1] * 100000000000",
        "[1] * 99999 * 99999 * 99999",
        "9" * 5000,
        "(" * 5000,
        "-" * 100000 + "1",
        "[1] + " * 20000 + "[1]",
        "\x00",
    ],
)
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--moe-layer-freq"):
        moe_layer_pattern(text, 2)


@given(st.text(alphabet="01[]()+*,-. xe", max_size=12))
def test_no_text_does_anything_else(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert len(moe_layer_pattern(text, 2)) == 2
