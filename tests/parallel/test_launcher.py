"""What launchers other than torchrun say is understood, or refused where tasks could not find one another."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist

from megatron_lsh.config.parallel import ParallelConfig
from megatron_lsh.errors import ConfigError
from megatron_lsh.parallel.initialize import gpu_of, initialize
from megatron_lsh.parallel.launcher import Place, adopt, place_of
from megatron_lsh.parallel.testing import run_distributed_test
from tests.parallel.toy import config

SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "6",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[08-09,12]",
}
MPIRUN = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}


def translated(environment: dict[str, str]) -> tuple[int, int, int, str, str]:
    adopt(environment)
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - set(environment)
    place = place_of(environment)
    return place.rank, place.world_size, place.local_rank, environment["MASTER_ADDR"], environment["MASTER_PORT"]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (SRUN, (5, 6, 1, "gpu08")),
        # A step smaller than its job: srun tells both sizes.
        (SRUN | {"SLURM_NTASKS": "16"}, (5, 6, 1, "gpu08")),
        # Nothing but the three variables that everyone reads, on one machine.
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}, (1, 2, 1, "127.0.0.1")),
        (MPIRUN, (3, 4, 3, "127.0.0.1")),
        (MPIRUN | {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "SLURM_JOB_NODELIST": "a1,a2"}, (3, 4, 1, "a1")),
        (MPIRUN | {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "MASTER_ADDR": "here"}, (3, 4, 1, "here")),
        # mpirun whose daemons were started by srun, one per node.
        (SRUN | MPIRUN, (3, 4, 3, "gpu08")),
        # Both say the same, and only one of them the number on the machine.
        (
            {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "SLURM_JOB_NODELIST": "n1"}
            | {"SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0"},
            (2, 4, 0, "127.0.0.1"),
        ),
        ({"PMI_SIZE": "2", "PMI_RANK": "0", "MPI_LOCALRANKID": "0"}, (0, 2, 0, "127.0.0.1")),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, (1, 2, 1, "127.0.0.1")),
        (
            {"MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_LOCAL_RANK": "1"},
            (1, 2, 1, "127.0.0.1"),
        ),
        ({"FLUX_JOB_SIZE": "8", "FLUX_TASK_RANK": "4", "FLUX_TASK_LOCAL_ID": "4"}, (4, 8, 4, "127.0.0.1")),
        (
            {"JSM_NAMESPACE_SIZE": "8", "JSM_NAMESPACE_RANK": "4", "JSM_NAMESPACE_LOCAL_RANK": "4"},
            (4, 8, 4, "127.0.0.1"),
        ),
    ],
)
def test_variables_are_translated(environment: dict[str, str], expected: tuple[int, int, int, str]) -> None:
    assert translated(dict(environment))[:4] == expected


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "127.0.0.1"),
        ("n1,n2", "n1"),
        ("n[1-2]", "n1"),
        ("n[08-11,14],m1", "n08"),
        ("rack[1-2]n[3,5]-ib,x", "rack1n3-ib"),
        ("a-b.cluster,c", "a-b.cluster"),
    ],
)
def test_the_first_node_of_a_list_is_where_ranks_meet(nodes: str, first: str) -> None:
    assert translated(SRUN | {"SLURM_STEP_NODELIST": nodes})[3] == first


def test_a_job_has_one_port_and_other_jobs_have_others() -> None:
    ports = {
        translated(SRUN | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})[4]
        for job in range(5)
        for step in (0, 1)
    }
    assert len(ports) == 10 and all(10_000 <= int(port) < 30_000 for port in ports)
    tasks = {translated(SRUN | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)})[4] for task in range(6)}
    assert len(tasks) == 1
    assert translated(SRUN | {"MASTER_PORT": "12"})[4] == "12"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"},  # a shell of salloc
        # The script of sbatch --ntasks 4, which is one process.
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "ENVIRONMENT": "BATCH"},
        # A shell on a node of the allocation, which is a step of one task.
        {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290"},
        {"RANK": "0", "WORLD_SIZE": "3"} | SRUN,  # torchrun, started by srun
    ],
    ids=str,
)
def test_a_process_that_is_alone_or_knows_its_place_is_left_alone(environment: dict[str, str]) -> None:
    before = dict(environment)
    adopt(environment)
    assert environment == before


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (MPIRUN | {"OMPI_COMM_WORLD_LOCAL_RANK": "1"}, "mpirun started task 3 of 4 and does not say where task 0 is"),
        ({"PMIX_RANK": "0"}, "PMIX_RANK is 0.*use torchrun"),
        (SRUN | {"SLURM_PROCID": "x"}, r"SLURM_PROCID \(x\) must be a number"),
    ],
)
def test_tasks_that_would_each_train_alone_are_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adopt(environment)


def test_ranks_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"RANK \(4\) must be less than WORLD_SIZE \(4\)"):
        place_of({"RANK": "4", "WORLD_SIZE": "4"})
    with pytest.raises(ConfigError, match=r"RANK \(-1\) must be a number"):
        place_of({"RANK": "-1", "WORLD_SIZE": "4"})


def test_nodes_have_names() -> None:
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert place_of(torchrun).node == place_of(torchrun | {"RANK": "4", "LOCAL_RANK": "0"}).node
    assert place_of(torchrun).node != place_of(torchrun | {"RANK": "3", "LOCAL_RANK": "3"}).node
    # Ranks that srun deals out to nodes in turn.
    dealt = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert place_of(dealt).node == socket.gethostname()
    assert place_of(dealt | {"SLURMD_NODENAME": "n7"}).node == "n7"


def test_which_gpu_a_rank_takes() -> None:
    assert gpu_of(Place(5, 1, 8, "n", True), gpus=4) == 1
    assert gpu_of(Place(5, 1, 8, "n", False), gpus=1) == 0  # the only one that its launcher shows it
    for by_torchrun, gpus in ((True, 1), (False, 2)):
        with pytest.raises(ConfigError, match=rf"local rank \(2\) must be less than .* \({gpus}\)"):
            gpu_of(Place(2, 2, 4, "n", by_torchrun), gpus)


def started_by_srun(job: int) -> None:
    """As `srun -n 2 python ...` would start it, in place of torchrun."""
    rank = os.environ["RANK"]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    del os.environ["TORCHELASTIC_USE_AGENT_STORE"]
    os.environ |= {"SLURM_JOB_ID": str(job), "SLURM_NTASKS": "2", "SLURM_PROCID": rank, "SLURM_LOCALID": rank}
    ctx = initialize(config())
    assert (ctx.rank, ctx.local_rank, ctx.world.size, ctx.node_of_rank) == (int(rank), int(rank), 2, (0, 0))
    total = torch.ones(1)
    dist.all_reduce(total, group=ctx.world.process_group)
    assert total.item() == 2


def test_two_tasks_of_srun_are_one_run() -> None:
    run_distributed_test(started_by_srun, 2, os.getpid())


def test_a_rank_whose_fellows_are_missing_says_where_it_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"rank 0 did not meet the other ranks of 2 at 127.0.0.1:{port} \(Timed out"):
        initialize(ParallelConfig(device="cpu", distributed_timeout_minutes=0.02))
