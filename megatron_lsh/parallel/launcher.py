"""Where this process stands among all, as its launcher tells it in the environment.

torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) are what torch and everything here read. Other
launchers have their own, which ``adopt`` translates into torchrun's, once, before anything else.
"""

from __future__ import annotations

import re
import socket
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from megatron_lsh.errors import ConfigError

TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launcher:
    """The variables in which a launcher tells each task its number, how many there are, and its number on its machine.

    `job`: variables that are the same for all tasks of one launch, and differ between launches.
    """

    name: str
    rank: str
    world_size: str
    local_rank: str
    job: tuple[str, ...] = ()


# The first that tells rank and world size counts. Those of MPI come before srun, which may have started no more than
# their daemons; srun tells the size of a step first, because that of a job is told to its batch script as well.
LAUNCHERS = (
    Launcher(
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    ),
    Launcher("mpirun", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
    Launcher("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    Launcher("flux run", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", ("FLUX_JOB_ID",)),
    Launcher("jsrun", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK"),
    Launcher("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ("SLURM_JOB_ID", "SLURM_STEP_ID")),
    Launcher("srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", ("SLURM_JOB_ID", "SLURM_STEP_ID")),
)
NODE_LISTS = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")


@dataclass(frozen=True)
class Place:
    """Number of this process among all and among those of its machine, how many there are, and a name of its node.

    `by_torchrun`: or by something that sets the same variables.
    """

    rank: int
    local_rank: int
    world_size: int
    node: str
    by_torchrun: bool


def place_of(environment: Mapping[str, str]) -> Place:
    """What torchrun's variables say; one process alone without them. Raises ConfigError if they make no sense."""
    rank, world_size = _number(environment, "RANK", "0"), _number(environment, "WORLD_SIZE", "1")
    if {"RANK", "WORLD_SIZE"} <= set(environment) and rank >= world_size:
        raise ConfigError(f"the environment's RANK ({rank}) must be less than WORLD_SIZE ({world_size}): use torchrun")
    local_rank = _number(environment, "LOCAL_RANK", str(rank))
    by_torchrun = "LOCAL_WORLD_SIZE" in environment
    node = environment.get("SLURMD_NODENAME") or socket.gethostname()
    if by_torchrun:  # it numbers the ranks of a node one after the other, and has several nodes on one machine at times
        node = f"ranks from {rank - local_rank}"
    return Place(rank, local_rank, world_size, node, by_torchrun)


def check_complete(environment: Mapping[str, str]) -> None:
    """Raise ConfigError where some of torchrun's variables are set, but not all that ranks need to meet."""
    missing = [name for name in TORCHRUN if name not in environment]
    if missing and not {"RANK", "WORLD_SIZE"} <= set(missing):
        raise ConfigError(f"environment variables {missing} are not set but other torchrun variables are: use torchrun")


def adopt(environment: MutableMapping[str, str]) -> None:
    """Set torchrun's variables to what another launcher says, if one started this process as one of several tasks.

    Raises ConfigError if it did but does not tell enough, because each task would then train alone.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment or _is_batch_script(environment):
        return
    told = [one for one in LAUNCHERS if one.rank in environment and one.world_size in environment]
    if not told:
        if "PMIX_RANK" in environment:
            raise ConfigError(
                f"PMIX_RANK is {environment['PMIX_RANK']}, so a launcher started this task, but not how many there are is "
                "set: use torchrun, srun or mpirun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
            )
        return
    launcher = told[0]
    rank, world_size = _number(environment, launcher.rank), _number(environment, launcher.world_size)
    if world_size == 1:
        return
    alike = [
        one
        for one in told
        if (_number(environment, one.rank), _number(environment, one.world_size)) == (rank, world_size)
    ]
    local_rank = next((_number(environment, one.local_rank) for one in alike if one.local_rank in environment), rank)
    address = environment.get("MASTER_ADDR") or _first_host(environment, rank == local_rank)
    if address is None:
        raise ConfigError(
            f"{launcher.name} started task {rank} of {world_size} and does not say where task 0 is: set MASTER_ADDR to the "
            "name of its machine, or use torchrun"
        )
    environment.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(local_rank),
        MASTER_ADDR=address,
        MASTER_PORT=environment.get("MASTER_PORT") or _port(environment, launcher),
    )


def _is_batch_script(environment: Mapping[str, str]) -> bool:
    """sbatch tells its script, which is one process, the number of tasks that srun would start."""
    return environment.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in environment


def _first_host(environment: Mapping[str, str], with_the_first: bool) -> str | None:
    """Where rank 0 is: on the first node of the job, or here, if all ranks before this one are on this machine."""
    hosts = next((environment[name] for name in NODE_LISTS if environment.get(name)), None)
    if hosts is None:
        return "127.0.0.1" if with_the_first else None
    first = _first_of(hosts)
    return "127.0.0.1" if first == hosts else first  # alone on its machine, a job needs no name that resolves


def _first_of(hosts: str) -> str:
    """The first name of a list of SLURM's: ``n[08-11,14]-a,m1`` gives ``n08-a``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group() if first else hosts)


def _port(environment: Mapping[str, str], launcher: Launcher) -> str:
    """The same for all tasks, another for other jobs, and below the ports that systems give to clients."""
    job = [environment[name] for name in launcher.job if name in environment]
    return str(10_000 + zlib.crc32("/".join(job).encode()) % 20_000 if job else 29_500)


def _number(environment: Mapping[str, str], name: str, default: str = "") -> int:
    text = environment.get(name, default)
    if not text.isdecimal():
        raise ConfigError(f"the environment's {name} ({text}) must be a number: start the ranks with torchrun")
    return int(text)
