"""What is kept for the day when a rank is lost, and the day itself: torchrun starts all ranks again, and they go on."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_lsh.config import LoggingConfig
from megatron_lsh.families import GPT
from megatron_lsh.observing.reporter import Reporter, RunFigures
from megatron_lsh.parallel.context import offline_context
from megatron_lsh.training.train import train
from megatron_lsh.training.watchdogs import arm_flight_recorder, dump_flight_recorder
from tests.training.helpers import tiny_config

ROOT = Path(__file__).parents[2]


def test_the_recorder_is_armed_by_its_flag_alone_and_variables_that_are_set_hold(tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    arm_flight_recorder(LoggingConfig(), environ)
    assert not environ and dump_flight_recorder(LoggingConfig(), 0) is None
    environ = {"TORCH_FR_BUFFER_SIZE": "7"}
    cfg = LoggingConfig(flight_recorder_dump_path=str(tmp_path / "dumps"))
    arm_flight_recorder(cfg, environ)
    assert environ["TORCH_FR_BUFFER_SIZE"] == "7" and environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert environ["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] == str(tmp_path / "dumps" / "rank_")
    (tmp_path / "dumps").rmdir()
    said = dump_flight_recorder(cfg, 3)
    assert said is not None and "rank_3 (" in said and "could not be written" in said


def test_a_run_without_a_gpu_says_that_allocations_are_not_recorded() -> None:
    for flags in ("--memory-snapshot-path memory.pickle", "--record-memory-history"):
        assert f"no effect with --device cpu: {flags.split()[0]}" in tiny_config(flags).notices


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_allocations_of_a_gpu_are_written_with_the_rank_in_the_name(tmp_path: Path) -> None:
    train(tiny_config(f"--train-iters 1 --device cuda --memory-snapshot-path {tmp_path}/memory.pickle"), GPT)
    snapshot = pickle.loads((tmp_path / "memory_rank0.pickle").read_bytes())
    assert snapshot["segments"] and any(snapshot["device_traces"])


def test_the_slowest_rank_is_the_one_that_works_longest_without_the_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    reporter = Reporter(LoggingConfig(), offline_context(device="cpu"), RunFigures(1, 1, 1, 1.0, None))
    memory, slowest, share = reporter._ranks(100.0, 40.0)
    assert 0.05 < memory[0] < 500.0 and (slowest, share) == (0, 0.0)
    assert reporter._ranks(100.0, None)[1:] == (None, None)
    others = torch.tensor([[1.0, 50.0], [0.0, 0.0], [2.0, 40.0]], dtype=torch.float64)
    monkeypatch.setattr("megatron_lsh.observing.reporter.all_reduce_", lambda mine, group: torch.cat([mine, others]))
    _, slowest, share = reporter._ranks(100.0, 10.0)  # 90 ms, and 50, 0 and 40 of others
    assert slowest == 0 and share == pytest.approx(1.0)


DIES = """
import os, sys, time
sys.path.insert(0, {root!r})
from megatron_lsh.config import parse_args, validate
from megatron_lsh.families import GPT
from megatron_lsh.training.faults import launch
from megatron_lsh.training.train import train
from tests.training.helpers import TINY, gpt_with

rank, attempt, steps = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"]), 0

def losses(cfg, model, batch):
    global steps
    if model.training:
        steps += 1
        if rank == 1:
            time.sleep(0.3)
            if attempt == 0 and steps == 6:
                os._exit(1)  # as the memory killer ends a process: it says nothing
    return GPT.losses(cfg, model, batch)

cfg = lambda: validate(parse_args([*TINY.split(), *sys.argv[1:]]), 2)
sys.exit(launch(cfg, lambda cfg: train(cfg, gpt_with(losses))))
"""


@pytest.mark.slow
def test_torchrun_restarts_all_ranks_and_the_curve_is_that_of_an_uninterrupted_run(tmp_path: Path) -> None:
    """Rank 1, the slow one, dies in iteration 6; what rank 0 did last is on the disk; all go on from iteration 4."""
    (tmp_path / "run.py").write_text(DIES.format(root=str(ROOT)))
    flags = (
        f"--train-iters 8 --global-batch-size 4 --expert-model-parallel-size 2 --save-interval 2 --eval-iters 0 "
        f"--save {tmp_path}/s --load {tmp_path}/s --metrics-jsonl {tmp_path}/m.jsonl "
        f"--flight-recorder-dump-path {tmp_path}/fr"
    )
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "1",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run([*torchrun, tmp_path / "run.py", *flags.split()], env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]

    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    alone = tmp_path / "alone.jsonl"
    uninterrupted = f"--train-iters 8 --global-batch-size 4 --eval-iters 0 --metrics-jsonl {alone}"
    train(tiny_config(uninterrupted), GPT)
    expected = [json.loads(line)["lm_loss"] for line in alone.read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, 9)), "each iteration once"
    assert [line["lm_loss"] for line in lines] == pytest.approx(expected, rel=1e-5)
    assert "iteration        4" in done.stdout or "iter_0000004" in done.stdout, "where it went on is said"

    slow = [line["slowest_rank_share"] for line in lines if line["slowest_rank"] == 1]
    assert len(slow) > 4 and max(slow) > 0.2, "what else the machine does may slow rank 0 down now and then"
    assert all(len(line["peak_memory_gb_per_rank"]) == 2 and line["peak_memory_gb"] > 0.05 for line in lines)

    recorded = pickle.loads((tmp_path / "fr" / "rank_0").read_bytes())
    assert recorded["entries"][-1]["profiling_name"].startswith("gloo:")
    assert any("alltoall" in entry["profiling_name"].replace("_", "") for entry in recorded["entries"])
    assert "the last collectives of rank 0: " in done.stdout + done.stderr
