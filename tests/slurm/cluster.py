"""A real SLURM cluster of two nodes on one machine, for tests and for trying batch files without a cluster.

Needs Debian's ``slurm-wlm`` and ``munge`` and root. Everything (configuration, key, sockets, spool, logs) lives in one
folder of the caller's, the ports are free ones, and ``stop`` ends only the daemons that ``start`` started.

Try a batch file by hand::

    python tests/slurm/cluster.py sbatch --wait my.sbatch

starts the cluster, runs the command with ``SLURM_CONF`` set, and stops the cluster.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES = ("n1", "n2")

# pgid tracking and task/none need no cgroups. GraceTime is what a preempted job gets between SIGTERM and SIGKILL;
# KillWait is the same for a requeued or cancelled one.
CONFIGURATION = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
ReturnToService=2
JobRequeue=1
KillWait=60
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=bf_interval=5,sched_min_interval=1
{nodes}
PartitionName=normal Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL Default=NO MaxTime=INFINITE State=UP PriorityTier=10
"""


def missing_programs() -> list[str]:
    """Names of the SLURM and munge programs that are not on this machine."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class LocalCluster:
    """Two ``slurmd`` of one CPU each, their controller and ``munged``. Use as a context manager.

    Args:
        folder: an existing, empty folder. munge wants it, and its parents, not writable by others.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.env["PATH"] = self.env.get("PATH", "") + ":/usr/sbin:/sbin"
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> LocalCluster:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self, timeout_s: float = 60.0) -> None:
        """Start the daemons and wait until both nodes are idle.

        Raises:
            RuntimeError: a daemon ended, or the nodes did not come up in time; the message carries the logs' ends.
        """
        self._write_configuration()
        munge = ["munged", "--foreground", "--force", f"--key-file={self.folder}/munge.key"]
        munge += [f"--{name}-file={self.folder}/munge.{name}" for name in ("pid", "seed", "log")]
        self._spawn([*munge, f"--socket={self.folder}/munge.socket"], "munged")
        deadline = time.monotonic() + timeout_s
        self._wait_for(lambda: (self.folder / "munge.socket").exists(), deadline)
        self._spawn(["slurmctld", "-D", "-c"], "slurmctld")
        for node in NODES:
            self._spawn(["slurmd", "-D", "-N", node], f"slurmd-{node}")
        self._wait_for(
            lambda: self.run("sinfo", "-hN", "-p", "normal", "-o", "%t").split() == ["idle", "idle"], deadline
        )

    def stop(self) -> None:
        """Cancel what still runs and end the daemons, newest first."""
        if self._daemons and self._daemons[-1].poll() is None:
            subprocess.run(["scancel", "--state=RUNNING", "--user=root"], env=self.env, capture_output=True, timeout=30)
            time.sleep(1.0)
        for daemon in reversed(self._daemons):
            if daemon.poll() is None:
                daemon.send_signal(signal.SIGTERM)
                try:
                    daemon.wait(20)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
        self._daemons.clear()

    def run(
        self, *command: str, timeout_s: float = 60.0, cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> str:
        """Run a SLURM command against this cluster and return what it printed; "" if it failed."""
        done = subprocess.run(
            command, env={**self.env, **(env or {})}, cwd=cwd, timeout=timeout_s, text=True, capture_output=True
        )
        return done.stdout if done.returncode == 0 else ""

    def job_field(self, job: str, name: str) -> str:
        """One field of ``scontrol show job``, e.g. ``JobState`` or ``Restarts``."""
        for word in self.run("scontrol", "show", "job", job).split():
            key, _, value = word.partition("=")
            if key == name:
                return value
        return ""

    def logs(self, lines: int = 15) -> str:
        """The ends of all daemons' logs."""
        parts = []
        for path in sorted(self.folder.glob("*.log")) + sorted(self.folder.glob("*.out")):
            text = path.read_text(errors="replace").splitlines()[-lines:]
            parts.append(f"--- {path.name}\n" + "\n".join(text))
        return "\n".join(parts)

    def _write_configuration(self) -> None:
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        host = socket.gethostname().split(".")[0]
        ports = _free_ports(1 + len(NODES))
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 State=UNKNOWN"
            for node, port in zip(NODES, ports[1:], strict=True)
        )
        text = CONFIGURATION.format(host=host, controller_port=ports[0], folder=self.folder, nodes=nodes)
        (self.folder / "slurm.conf").write_text(text)

    def _spawn(self, command: Sequence[str], name: str) -> None:
        with open(self.folder / f"{name}.out", "wb") as out:
            self._daemons.append(
                subprocess.Popen(command, env=self.env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
            )

    def _wait_for(self, ready: Callable[[], bool], deadline: float) -> None:
        while not ready():
            ended = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                raise RuntimeError(f"the local SLURM cluster did not start (ended: {ended or 'none'}):\n{self.logs()}")
            time.sleep(0.2)


def main(command: list[str]) -> int:
    absent = missing_programs()
    if absent or os.geteuid() != 0:
        print(f"needs root and Debian's slurm-wlm and munge; missing: {', '.join(absent) or 'root'}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/run") as folder, LocalCluster(Path(folder)) as cluster:
        return subprocess.run(command or ["sinfo", "-N"], env=cluster.env).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
