"""Values of the tools' own flags: refused by one rule each, in one line, before anything is read or written."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import megatron_lsh
from megatron_lsh.commands import checkpoint_info, convert_checkpoint, prepare_stdlib_corpus, report
from megatron_lsh.config.tool_flags import ToolParser, a_name, a_path, a_text, integer, real
from megatron_lsh.data.preparation import preprocess
from megatron_lsh.errors import ConfigError

PACKAGE = Path(megatron_lsh.__file__).parent
TOOLS = [*(PACKAGE / "commands").glob("*.py"), Path(preprocess.__file__)]
HUGE = "9" * 5000


@pytest.mark.parametrize(
    ("kind", "word", "rule"),
    [
        (integer(), HUGE, f"({'9' * 77}...) must be an integer: change it"),
        (integer(), "9" * 25, f"({'9' * 25}) must be an integer below 2^63: change it"),
        (integer(), "1.5", "(1.5) must be an integer: change it"),
        (integer(1), "0", "(0) must be at least 1: change it"),
        (integer(1, 8), "9", "(9) must be at least 1 and at most 8: change it"),
        (real(), "nan", "(nan) must be a finite number: change it"),
        (real(), "1e999", "(1e999) must be a finite number: change it"),
        (real(above=0, below=1), "1", "(1) must be above 0 and below 1: change it"),
        (real(), "", "('') must be a finite number: change it"),
        (a_path, " ", "(' ') must not be empty: give a name (. is the current folder)"),
        (a_path, "a\0b", "(a\\x00b) must not contain a null character: change it"),
        (a_name, "a\ud800", "(a\\ud800) must be UTF-8: change it"),
        (a_text, "\udcff", "(\\udcff) must be UTF-8: change it"),
    ],
)
def test_a_value_that_breaks_a_rule_is_named_with_it(kind: object, word: str, rule: str) -> None:
    parser = ToolParser()
    parser.add_argument("--flag", "-f", type=kind)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as error:
        parser.parse_args(["--flag", word])
    assert str(error.value) == f"--flag {rule}"


def test_values_that_fit() -> None:
    assert (integer(1, 8)("8"), real(at_least=0)("0"), a_text(""), a_path("é")) == (8, 0.0, "", Path("é"))


@pytest.mark.parametrize(
    ("tool", "words", "start"),
    [
        (checkpoint_info, ["\0"], "folder (\\x00) must"),
        (checkpoint_info, [""], "folder ('') must"),
        (report, ["run", ""], "RUN_DIR ('') must"),
        (prepare_stdlib_corpus, ["--max-mb", "nan"], "--max-mb (nan) must be a finite number"),
        (prepare_stdlib_corpus, ["--max-mb", "inf"], "--max-mb (inf) must be a finite number"),
        (prepare_stdlib_corpus, ["--max-mb", "1e308"], "--max-mb (1e308) must be above 0 and at most 1e+06"),
        (prepare_stdlib_corpus, ["--stdlib", ""], "--stdlib ('') must not be empty"),
        (preprocess, ["--input", "", "--output-prefix", "o", "--tokenizer-type", "ByteTokenizer"], "--input ('') must"),
        (convert_checkpoint, ["--from", "hf", "--to", "hf", "--load", "", "--save", "x"], "--load ('') must"),
        *(
            (
                convert_checkpoint,
                ["--from", "hf", "--to", "hf", "--load", "x", "--save", "x", "--max-shard-size", size],
                f"--max-shard-size ({size}) must be a size such as 5GB or 200MB",
            )
            for size in ("nan", "0", "1.2.3GB", "9" * 40, "5XB", "²GB")
        ),
    ],
)
def test_tools_refuse_them_without_a_traceback(
    tool: object,
    words: list[str],
    start: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tool.main(words) == 1  # type: ignore[attr-defined]
    message = capsys.readouterr().err
    assert message.startswith(f"error: {start}") and message.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_no_tool_has_a_flag_of_another_type() -> None:
    """``type=int`` takes 10^400, ``float`` takes nan, ``Path`` takes an empty one for the current folder."""
    ours = {"a_path", "a_name", "a_text", "integer", "real", "_bytes"}
    for tool in TOOLS:
        for node in ast.walk(ast.parse(tool.read_text())):
            if isinstance(node, ast.Call) and any(word.arg == "type" for word in node.keywords):
                (kind,) = (word.value for word in node.keywords if word.arg == "type")
                kind = kind.func if isinstance(kind, ast.Call) else kind
                assert ast.unparse(kind) in ours, f"{tool.name}:{node.lineno}: use a type of config/tool_flags.py"
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) != "argparse.ArgumentParser", f"{tool.name}:{node.lineno}: use ToolParser"
