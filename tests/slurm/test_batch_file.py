"""When the batch file requeues itself. Stand-ins take the place of srun and scontrol; test_slurm.py runs the real ones."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCONTROL = """#!/bin/sh
case "$1 $2" in "show hostnames") echo n1 ;; "show node") echo "NodeAddr=127.0.0.1 X" ;; requeue*) echo "REQUEUED $2" ;; esac
"""


def run_batch_file(folder: Path, before: str | None, after: str | None, status: int) -> tuple[int, str]:
    """Exit status and output of a job that finds the tracker text `before` and leaves `after`; srun returns `status`."""
    checkpoints = folder / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    tracker = checkpoints / "latest_checkpointed_iteration.txt"
    if before is not None:
        tracker.write_text(before)
    if after is not None:
        (folder / "after").write_text(after)
    programs = folder / "bin"
    programs.mkdir()
    (programs / "scontrol").write_text(SCONTROL)
    (programs / "srun").write_text(
        f"#!/bin/sh\n[ ! -e {folder}/after ] || cp {folder}/after {tracker}\nexit {status}\n"
    )
    for program in programs.iterdir():
        program.chmod(0o755)
    env = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7"}
    env |= {"SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1", "RUN_DIR": str(folder / "run")}
    done = subprocess.run(["bash", "scripts/slurm_moe.sbatch"], cwd=ROOT, env=env, text=True, capture_output=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("before", "after", "requeued"),
    [
        (None, "500", True),
        ("100", "500\n", True),
        ("release", "500", True),  # a converted or upcycled start
        ("0000100", "0000800", True),  # not octal
        ("100", "100", False),
        ("500", "100", False),
        ("release", "release", False),
        (None, None, False),
        ("damaged", "12", True),
        ("100", "1x", False),
        ("", "", False),
        ("9" * 30, "100", True),  # no number that a shell can hold is no number
    ],
)
def test_it_requeues_while_its_checkpoints_move_on(
    tmp_path: Path, before: str | None, after: str | None, requeued: bool
) -> None:
    status, output = run_batch_file(tmp_path, before, after, status=143)
    assert ("REQUEUED 7" in output) == requeued, output
    assert status == (0 if requeued else 143), output


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize(
    "text", ["a[$(touch {0})]", "x=$(touch {0})", "$(touch {0})", "`touch {0}`", "1\n$(touch {0})"]
)
def test_the_text_of_a_tracker_is_never_run(tmp_path: Path, text: str, where: str) -> None:
    evil = text.format(tmp_path / "executed")
    run_batch_file(tmp_path, *((evil, "5") if where == "before" else ("5", evil)), status=1)
    assert not (tmp_path / "executed").exists()


def test_a_finished_job_is_not_requeued(tmp_path: Path) -> None:
    status, output = run_batch_file(tmp_path, "100", "300", status=0)
    assert status == 0 and "finished at iteration 300" in output and "REQUEUED" not in output
