"""What messages quote of other packages' errors, and paths that cannot be looked at."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_lsh.commands import checkpoint_info, report
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


@pytest.mark.parametrize("name", ["loop", "x" * 5000])
def test_a_path_that_no_tool_can_look_at_is_named_without_a_traceback(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    os.symlink("loop", "loop")
    for tool, words in ((report, [name]), (checkpoint_info, [name])):
        assert tool.main(words) == 1
        message = capsys.readouterr().err
        assert message.startswith("error: ") and name[:70] in message and len(message) < 400
