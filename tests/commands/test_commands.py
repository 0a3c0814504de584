"""Every program of this package can be started without a checkout: python -m megatron_lsh COMMAND."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from megatron_lsh.commands import names, run

ROOT = Path(__file__).parents[2]


def test_every_script_of_a_checkout_is_a_command_and_every_command_a_script() -> None:
    scripts = [*(ROOT / "tools").glob("*.py"), *ROOT.glob("pretrain_*.py"), *ROOT.glob("finetune_*.py")]
    assert sorted(path.stem for path in scripts) == names()
    for path in scripts:
        assert f"from megatron_lsh.commands.{path.stem} import main" in path.read_text(), path
        assert len(path.read_text().splitlines()) < 20, f"{path}: what it does belongs into megatron_lsh/commands/"


@pytest.mark.parametrize("name", names())
def test_every_command_takes_its_words_as_an_argument_and_helps(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run([name, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "usage:" in shown and "--" in shown
    assert f"tools/{name}.py" not in (import_module(f"megatron_lsh.commands.{name}").__doc__ or ""), (
        "without a checkout"
    )


def test_without_a_command_all_are_listed_and_a_wrong_one_is_led_to_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run([]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in names())
    assert run(["pretrain-gpt"]) == 1
    assert "COMMAND (pretrain-gpt) must be one of checkpoint_info, " in (said := capsys.readouterr().err)
    assert said.endswith("write pretrain_gpt_moe\n")


def test_the_package_is_a_program() -> None:
    words = [sys.executable, "-m", "megatron_lsh", "reprot"]
    done = subprocess.run(words, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 1 and done.stderr.endswith("write report\n") and "Traceback" not in done.stderr
