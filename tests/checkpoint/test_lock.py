"""One run at a time in a save folder: the table of who may take it from whom, and real processes that try."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_lsh.checkpoint.lock import LOCK, SaveLock
from megatron_lsh.errors import CheckpointError
from megatron_lsh.parallel.context import offline_context
from megatron_lsh.parallel.owner import Owner, is_over
from tests.checkpoint.toy import Trainer, manager

DEAD = 2**22 + 1
"""a pid that Linux gives to nobody"""
ME = Owner.here(
    {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1", "TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "1"}
)
RUNNING = os.getppid()
THERE = "another host"
UNKNOWN = None

#: situation -> (what the lock says, other than ME; whether that run is over: True, False, or only the heartbeat can tell)
CASES = {
    "killed by kill -9, started again by hand": ({"pid": DEAD, "batch": "", "launcher": ""}, True),
    "killed by kill -9, its pid is another process now": ({"pid": RUNNING, "started": 1, "batch": ""}, True),
    "it runs beside us": ({"pid": RUNNING, "started": None, "batch": ""}, False),
    "it runs beside us in the same batch job, started twice": ({"pid": RUNNING, "started": None}, False),
    "it runs beside us under another torchrun of the batch job": (
        {"pid": RUNNING, "started": None, "launcher": "b", "restarts": (1, 0)},
        False,
    ),
    "torchrun without --rdzv-id: its restarts prove nothing": (
        {"pid": RUNNING, "started": None, "launcher": "", "restarts": (1, 0)},
        False,
    ),
    "requeued, on the same host": ({"pid": DEAD, "restarts": (0, 3)}, True),
    "requeued, on another host": ({"host": THERE, "boot": "b", "restarts": (0, 3)}, True),
    "requeued, the earlier attempt not gone yet": ({"pid": RUNNING, "started": None, "restarts": (0, 0)}, True),
    "--max-restarts, rank 0 on the same host": ({"pid": DEAD, "restarts": (1, 0)}, True),
    "--max-restarts, rank 0 on another host": ({"host": THERE, "boot": "b", "restarts": (1, 0)}, True),
    "a later attempt has it": ({"host": THERE, "boot": "b", "restarts": (2, 0)}, UNKNOWN),
    "another job on another host": ({"host": THERE, "boot": "b", "batch": "8"}, UNKNOWN),
    "another host, the same pid": ({"host": THERE, "boot": "b", "batch": "8", "pid": os.getpid()}, UNKNOWN),
    "the same host before it was booted anew, the same pid": ({"boot": "b", "pid": os.getpid()}, UNKNOWN),
    "another container of this host, the same pid": ({"namespace": "pid:[1]", "pid": os.getpid()}, UNKNOWN),
    "another container of this host, a pid that we lack": ({"namespace": "pid:[1]", "pid": DEAD}, UNKNOWN),
}


def started(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def owner(**changes: object) -> Owner:
    if changes.get("started", 0) is None:
        changes["started"] = started(int(str(changes["pid"])))
    return replace(ME, token="other", **changes)  # type: ignore[arg-type]


def hold(root: Path, holder: Owner, age_s: float = 0.0) -> Path:
    root.mkdir(exist_ok=True)
    path = root / LOCK
    path.write_bytes(holder.serialise())
    os.utime(path, (time.time() - age_s,) * 2)
    return path


@pytest.mark.parametrize("case", CASES)
def test_who_may_take_the_folder_from_whom(tmp_path: Path, case: str) -> None:
    changes, over = CASES[case]
    other = owner(**changes)
    assert is_over(other, ME) is over
    for age_s in (0.0, 1000.0):
        path = hold(tmp_path, other, age_s)
        begin = time.monotonic()
        if over is False or (over is UNKNOWN and age_s == 0):
            with pytest.raises(CheckpointError, match=f"process {other.pid} on {other.host}") as error:
                SaveLock(tmp_path, ME, beat_s=0.05, silent_s=60)
            assert "Stop that one first, or give another --save" in str(error.value)
            assert Owner.parse(path.read_bytes()) == other
        else:
            lock = SaveLock(tmp_path, ME, beat_s=0.05, silent_s=60)
            assert Owner.parse(path.read_bytes()) == ME
            lock.release()
            assert not path.exists()
        assert time.monotonic() - begin < 5
    assert os.listdir(tmp_path) in ([], [LOCK])


def test_a_heartbeat_counts_even_where_clocks_differ(tmp_path: Path) -> None:
    """The other host's clock is an hour behind, but the file is touched: it is alive."""
    path = hold(tmp_path, owner(host=THERE, boot="b", batch="8"), age_s=3600)
    toucher = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import os, time\nwhile True: t = time.time() - 3600; os.utime({str(path)!r}, (t, t)); time.sleep(.05)",
        ]
    )
    try:
        with pytest.raises(CheckpointError, match="another run saves there: batch job 8"):
            SaveLock(tmp_path, ME, beat_s=1.0, silent_s=60)
    finally:
        toucher.kill()
        toucher.wait()


@pytest.mark.parametrize("jump_days", [-400, 400])
def test_a_clock_that_jumps_makes_no_live_run_dead_and_no_dead_run_live(tmp_path: Path, jump_days: int) -> None:
    """The file is older or newer than our clock allows: only whether it is touched while we look says anything."""
    path = hold(tmp_path, owner(host=THERE, boot="b", batch="8"), age_s=jump_days * 86400)
    stop = threading.Event()

    def touch() -> None:
        then = time.time() - jump_days * 86400
        while not stop.wait(0.01):
            then += 0.01
            os.utime(path, (then, then))

    alive = threading.Thread(target=touch)
    alive.start()
    try:
        with pytest.raises(CheckpointError, match="another run saves there: batch job 8"):
            SaveLock(tmp_path, ME, beat_s=0.1, silent_s=0.4)
    finally:
        stop.set()
        alive.join()
    begin = time.monotonic()
    SaveLock(tmp_path, ME, beat_s=0.1, silent_s=0.4)
    assert time.monotonic() - begin >= (0.4 if jump_days < 0 else 0.1)


@pytest.mark.parametrize("text", [b"", b"{}", b"[1]", b"\xff", b'{"pid": "x"}'])
def test_a_lock_that_cannot_be_read_counts_as_anothers_while_it_is_fresh(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / LOCK
    path.write_bytes(text)
    with pytest.raises(CheckpointError, match="which one cannot be read"):
        SaveLock(tmp_path, ME, beat_s=0.05, silent_s=60)
    os.utime(path, (1, 1))
    SaveLock(tmp_path, ME, beat_s=0.05, silent_s=60)


def test_the_lock_is_kept_fresh_and_given_back(tmp_path: Path) -> None:
    lock = SaveLock(tmp_path, beat_s=0.05)
    os.utime(tmp_path / LOCK, (1, 1))
    while (tmp_path / LOCK).stat().st_mtime < 1000:
        time.sleep(0.02)
    again = SaveLock(tmp_path)  # the same process may have it twice
    lock.confirm()
    del again, lock
    assert os.listdir(tmp_path) == []


def test_a_run_that_lost_its_folder_writes_nothing_more(tmp_path: Path) -> None:
    run = Trainer(offline_context(device="cpu"))
    checkpoints = manager(run.ctx, tmp_path)
    checkpoints.save(run.state())
    hold(tmp_path, owner(host=THERE, boot="b", batch="8"))
    (tmp_path / "iter_0000001.incomplete").mkdir()
    run.train(1)
    with pytest.raises(CheckpointError, match=r"another run has taken it over: batch job 8"):
        checkpoints.save(run.state())
    assert (tmp_path / "iter_0000001.incomplete").is_dir()  # the other run's
    (tmp_path / LOCK).unlink()
    checkpoints.save(run.state())
    assert (tmp_path / LOCK).exists()


def test_loading_takes_no_lock(tmp_path: Path) -> None:
    run = Trainer(offline_context(device="cpu"))
    checkpoints = manager(run.ctx, tmp_path / "a")
    checkpoints.save(run.state())
    checkpoints._lock.release()
    hold(tmp_path / "a", owner(host=THERE, boot="b", batch="8"))
    assert run.resume(manager(run.ctx, tmp_path / "b", load=str(tmp_path / "a"))) is not None
    with pytest.raises(CheckpointError, match=r"--save .* cannot be used: another run saves there"):
        manager(run.ctx, tmp_path / "a")


HOLDER = """
import sys, time
from pathlib import Path
from megatron_lsh.checkpoint.lock import SaveLock
try:
    lock = SaveLock(Path(sys.argv[1]))
except Exception as error:
    print("refused", flush=True)
else:
    print("taken", flush=True)
    time.sleep(60)
"""


@contextmanager
def holders(root: Path, number: int) -> Iterator[list[subprocess.Popen[str]]]:
    command = [sys.executable, "-c", HOLDER, str(root)]
    found = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(number)]
    try:
        yield found
    finally:
        for process in found:
            process.kill()
            process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.slow
def test_of_processes_that_start_together_one_gets_it_and_kill_minus_nine_frees_it(tmp_path: Path) -> None:
    with holders(tmp_path, 4) as processes:
        answers = [said(process) for process in processes]
        assert sorted(answers) == ["refused"] * 3 + ["taken"]
        with pytest.raises(CheckpointError, match="another run saves there"):
            SaveLock(tmp_path)
        holder = processes[answers.index("taken")]
        holder.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, and a zombie as long as nobody waits for it
        SaveLock(tmp_path)
