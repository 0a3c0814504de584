"""Run a function on several ranks of this machine, for tests of distributed behaviour without a cluster.

Processes are forked from a server that has imported torch, and what of this package the first caller had imported, once
(Python's ``forkserver``), so that after the first call a run costs a fraction of a second instead of the seconds that
imports take in every rank.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

# Modules that torch imports lazily, at the first optimizer step or collective, are worth a second per rank each.
_PRELOAD = [
    "torch",
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "megatron_lsh.parallel.testing",
]
_GRACE_S = 3.0  # after one rank failed, how long the others may take to report what they saw


class DistributedTestError(AssertionError):
    """A rank raised, died or did not finish in time. The message holds every traceback that was reported."""


def run_distributed_test(
    fn: Callable[..., Any], world_size: int, *args: Any, backend: str = "gloo", timeout_s: float = 120.0
) -> list[Any]:
    """Call ``fn(*args)`` on `world_size` fresh processes and return what each rank returned, in rank order.

    Every process sees the environment that torchrun would set (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, ...) and one
    torch thread. The process group is NOT initialised: call ``megatron_lsh.parallel.initialize.initialize`` or
    ``torch.distributed.init_process_group()`` in `fn`. What `fn` leaves initialised is destroyed afterwards.
    With ``backend="gloo"`` the ranks see no GPU.

    `fn`, `args` and the results are pickled, so `fn` must be defined at the top level of a module.
    Raises DistributedTestError (an AssertionError) with the traceback of each failed rank. Never hangs: at `timeout_s`,
    or shortly after the first failure, all ranks are killed.
    """
    # The parent hosts the store, as torchrun's agent does: no rank has to guess a free port.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    context = _process_context(backend)
    processes: list[BaseProcess] = []
    connections: list[Connection] = []
    try:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            environment = _environment(rank, world_size, store.port, backend)
            process = context.Process(target=_child, args=(sender, environment, fn, args), name=f"rank{rank}")
            process.start()
            sender.close()
            processes.append(process)
            connections.append(receiver)
        reports = _collect(connections, processes, timeout_s)
        for process in processes:
            process.join(_GRACE_S if all(report is not None for report in reports) else 0)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
        for process, connection in zip(processes, connections, strict=True):
            process.join()
            connection.close()
        del store
    problems = [
        f"--- rank {rank} of {world_size} {report[1]}" if report else f"--- rank {rank} of {world_size} was killed"
        for rank, report in enumerate(reports)
        if report is None or report[0] != "ok"
    ]
    if problems:
        late = "" if any(report is not None and report[0] != "ok" for report in reports) else f" within {timeout_s} s"
        raise DistributedTestError(f"{_name(fn)} failed on {world_size} ranks{late}\n" + "\n".join(problems))
    return [report[1] for report in reports if report is not None]


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__qualname__", repr(fn))


def _process_context(backend: str) -> Any:
    """Forkserver where there is one; NCCL ranks are spawned, because CUDA does not survive a fork."""
    if backend != "gloo" or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD + _own_modules())
    return context


def _own_modules() -> list[str]:
    """What the caller has imported of this package, of its tests and of pytest, so that no rank has to."""
    ours = {"megatron_lsh", "tests", "pytest"}
    return [name for name in sys.modules if name.partition(".")[0] in ours]


def _environment(rank: int, world_size: int, port: int, backend: str) -> dict[str, str]:
    """The caller's environment plus what torchrun sets."""
    environment = dict(os.environ)
    environment.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
        OMP_NUM_THREADS="1",
    )
    if backend == "gloo":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def _child(sender: Connection, environment: dict[str, str], fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        result = fn(*args)
    except BaseException:
        sender.send_bytes(pickle.dumps(("error", "raised\n" + traceback.format_exc())))
        sender.close()
        os._exit(1)  # no clean-up that could wait for the other ranks
    try:
        # Not Connection.send: multiprocessing would send tensors as handles that die with this process.
        report = pickle.dumps(("ok", result))
    except Exception:
        report = pickle.dumps(("error", "returned something that cannot be pickled\n" + traceback.format_exc()))
    sender.send_bytes(report)
    if dist.is_initialized():
        with contextlib.suppress(Exception):  # another rank may have failed; its report is the one that counts
            dist.barrier()
            dist.destroy_process_group()


def _collect(
    connections: list[Connection], processes: list[BaseProcess], timeout_s: float
) -> list[tuple[str, Any] | None]:
    """One ("ok", result) or ("error", text) per rank; None for a rank that had not reported when time was up."""
    reports: list[tuple[str, Any] | None] = [None] * len(connections)
    deadline = time.monotonic() + timeout_s
    pending = dict(zip(connections, range(len(connections)), strict=True))
    while pending and (left := deadline - time.monotonic()) > 0:
        for connection in wait(list(pending), timeout=left):
            assert isinstance(connection, Connection)
            rank = pending.pop(connection)
            try:
                reports[rank] = pickle.loads(connection.recv_bytes())
            except EOFError:
                processes[rank].join(1.0)
                reports[rank] = ("error", f"died without a report (exit code {processes[rank].exitcode})")
            if reports[rank] is not None and reports[rank][0] != "ok":  # type: ignore[index]
                deadline = min(deadline, time.monotonic() + _GRACE_S)
    return reports
