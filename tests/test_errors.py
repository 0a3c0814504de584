"""What messages quote of other packages' errors."""

from __future__ import annotations

import pytest

from megatron_lsh.errors import first_line


@pytest.mark.parametrize(
    ("error", "quoted"),
    [
        (ValueError("cut off\nat byte 7"), "cut off"),
        (ValueError("\n  cut off\n"), "cut off"),
        (MemoryError(), "MemoryError"),
        (AssertionError(" \n"), "AssertionError"),
    ],
)
def test_an_error_is_quoted_in_one_line_and_by_name_if_it_says_nothing(error: Exception, quoted: str) -> None:
    assert first_line(error) == quoted
