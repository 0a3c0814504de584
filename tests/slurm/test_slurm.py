"""The batch file on a real SLURM cluster: two nodes, stopped twice, resumed twice, finished."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import LocalCluster, missing_programs

ROOT = Path(__file__).parent.parent.parent
TRAIN_ITERS = 300

pytestmark = [
    pytest.mark.slow,
    pytest.mark.network,
    pytest.mark.skipif(
        bool(missing_programs()) or os.geteuid() != 0, reason="needs root and SLURM (Debian: slurm-wlm, munge)"
    ),
]

# A model small enough for one CPU per node; these flags come after those of scripts/moe_flags.sh and win.
TINY = shlex.split("""
    --device cpu --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --num-experts 4
    --moe-ffn-hidden-size 64 --expert-model-parallel-size 2 --micro-batch-size 4 --global-batch-size 8
    --tokenizer-type ByteTokenizer --split 90,10,0 --eval-iters 1 --save-interval 100 --no-progress
""")


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/run") as folder, LocalCluster(Path(folder)) as running:
        yield running


def until(condition: Callable[[], object], what: str, log: Path, timeout_s: float = 240.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"timed out: {what}\n{log.read_text() if log.exists() else 'no log'}")
        time.sleep(0.2)


def iterations(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\] iteration +(\d+)/", text)]


def attempts(text: str) -> list[str]:
    """The log of each attempt of the job."""
    return re.split(r"(?m)^(?=job \d+, attempt )", text)[1:]


def test_batch_file_resumes_after_requeue_and_after_sigterm(cluster: LocalCluster, tmp_path: Path) -> None:
    corpus = tmp_path / "text.txt"
    corpus.write_text("\n".join(path.read_text() for path in sorted((ROOT / "megatron_lsh").rglob("*.py"))))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    preprocess = [sys.executable, ROOT / "tools" / "preprocess_data.py", "--input", corpus, "--output-prefix"]
    preprocess += [tmp_path / "tiny", "--tokenizer-type", "ByteTokenizer", "--text-documents", "paragraph"]
    subprocess.run(preprocess, check=True, env=env, capture_output=True)
    (prefix,) = (path.with_suffix("") for path in tmp_path.glob("tiny*.idx"))

    log = tmp_path / "job.out"
    settings = {
        "RUN_DIR": str(tmp_path / "run"),
        "DATA_PATH": str(prefix),
        "TRAIN_ITERS": str(TRAIN_ITERS),
        "NPROC": "1",
    }
    settings |= {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{cluster.env['PATH']}"}
    settings["VIRTUAL_ENV"] = sys.prefix  # the interpreter that runs this test, not another .venv
    submit = ["sbatch", "--parsable", f"--output={log}", "scripts/slurm_moe.sbatch", *TINY]
    job = cluster.run(*submit, cwd=ROOT, env=settings).strip()
    assert job, cluster.logs()

    def text() -> str:
        return log.read_text(errors="replace") if log.exists() else ""

    def trains(attempt: int) -> bool:
        parts = attempts(text())
        assert "not requeueing" not in text(), text()
        return len(parts) >= attempt and bool(iterations(parts[attempt - 1]))

    def start_now() -> None:
        until(lambda: cluster.job_field(job, "JobState") == "PENDING", "requeued", log)
        cluster.run("scontrol", "update", f"jobid={job}", "starttime=now")  # SLURM waits two minutes by itself

    until(lambda: trains(1), "the first attempt trains", log)
    cluster.run("scontrol", "requeue", job)  # as an administrator, a failing node or a preemption does
    start_now()
    until(lambda: trains(2), "the second attempt trains", log)
    cluster.run("scancel", "--signal=TERM", job)  # as SLURM does before the time limit
    start_now()
    until(lambda: "finished at iteration" in text(), "the third attempt finishes", log)

    first, second, third = attempts(text())
    for earlier, later in ((first, second), (second, third)):
        (resumed,) = re.findall(r"newest checkpoint: iteration (\d+)", later)
        # Nothing is lost: it was saved no earlier than the last line of the log, and not by --save-interval.
        assert int(resumed) >= iterations(earlier)[-1] > 0
        assert int(resumed) % 100 != 0
        assert int(resumed) < iterations(later)[0] <= int(resumed) + 10
    assert "requeueing" in second
    assert f"finished at iteration {TRAIN_ITERS}" in third
    assert iterations(third)[-1] == TRAIN_ITERS
    assert cluster.job_field(job, "Restarts") == "2"


MEET = """
import torch
import torch.distributed as dist
from megatron_lsh.config.parallel import ParallelConfig
from megatron_lsh.parallel.initialize import initialize
ctx = initialize(ParallelConfig(device="cpu", distributed_timeout_minutes=2))
total = torch.ones(1)
if ctx.world.size > 1:
    dist.all_reduce(total)
print(f"rank {ctx.rank} of {ctx.world.size} local {ctx.local_rank} nodes {ctx.node_of_rank} sum {total.item()}", flush=True)
"""


def test_tasks_of_srun_without_torchrun_are_one_run_and_the_batch_script_is_alone(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    (tmp_path / "meet.py").write_text(MEET)
    python = f"{shlex.quote(sys.executable)} -W ignore {tmp_path / 'meet.py'}"
    batch, log = tmp_path / "batch.sh", tmp_path / "meet.out"
    # The names of the nodes do not resolve on this machine, hence the address.
    batch.write_text(f"#!/bin/bash\n{python}\nMASTER_ADDR=127.0.0.1 srun {python}\n")
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    cluster.run("sbatch", "--wait", "--nodes=2", "--ntasks=2", f"--output={log}", str(batch), cwd=ROOT, env=env)
    alone, *both = [line for line in log.read_text().splitlines() if line.startswith("rank")]
    assert alone == "rank 0 of 1 local 0 nodes (0,) sum 1.0"
    assert sorted(both) == [f"rank {rank} of 2 local 0 nodes (0, 1) sum 2.0" for rank in (0, 1)]
