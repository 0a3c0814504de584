"""Nodes of one machine behind slow links: a network namespace for each, joined by a bridge, each sending at a set rate.

A node has one rank or several, which share its namespace: what they send to each other takes its loopback, at full speed.

Needs root, iproute2 and the kernel's veth, bridge and tbf. Every namespace is made here, has addresses that exist only
inside, and is removed afterwards; the machine's own network is not touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

INTERFACE = "eth0"
_SUBNET = "10.77.0"
_ETC = Path("/etc/netns")
"""where ip-netns(8) looks for a namespace's own configuration files"""


def why_not() -> str | None:
    """Why there can be no slow links on this machine, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"needs {' and '.join(missing)} (Debian: iproute2)" if missing else None


class SlowLinks:
    """Context manager: a namespace per node with the addresses 10.77.0.1, 10.77.0.2, ... on their interface eth0."""

    def __init__(self, ranks: int, ranks_per_node: int = 1) -> None:
        self.ranks, self.ranks_per_node = ranks, ranks_per_node
        self.nodes = ranks // ranks_per_node
        self._prefix = f"mlsh{os.getpid()}"
        self._made: list[str] = []
        self._made_etc = not _ETC.exists()
        self._before: Any = signal.SIG_DFL

    def __enter__(self) -> SlowLinks:
        # A benchmark that is told to end must still clean up.
        self._before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
        try:
            hub = self._namespace("hub")
            _run("ip", "-n", hub, "link", "add", "bridge", "type", "bridge")
            _run("ip", "-n", hub, "link", "set", "bridge", "up")
            for node in range(self.nodes):
                here, port = self._namespace(str(node)), f"port{node}"
                _run("ip", "-n", hub, "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", here)
                _run("ip", "-n", hub, "link", "set", port, "master", "bridge", "up")
                _run("ip", "-n", here, "addr", "add", f"{self.address(node)}/24", "dev", INTERFACE)
                _run("ip", "-n", here, "link", "set", INTERFACE, "up")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self._before)
        while self._made:  # with a namespace go its interfaces and their peers
            name = self._made.pop()
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
            shutil.rmtree(_ETC / name, ignore_errors=True)
        if self._made_etc:
            with contextlib.suppress(OSError):  # someone else's by now
                _ETC.rmdir()

    def address(self, node: int) -> str:
        return f"{_SUBNET}.{node + 1}"

    def start(self, rank: int, command: Sequence[str], port: int, log: Path | None = None) -> subprocess.Popen[bytes]:
        """Start a rank in its namespace with torchrun's environment variables; output to `log`, or here."""
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank % self.ranks_per_node), "WORLD_SIZE": str(self.ranks),
            "LOCAL_WORLD_SIZE": str(self.ranks_per_node),
            "MASTER_ADDR": self.address(0), "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": INTERFACE,
            "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        out = log.open("wb") if log is not None else None
        try:
            inside = ["ip", "netns", "exec", f"{self._prefix}-{rank // self.ranks_per_node}", *command]
            return subprocess.Popen(inside, env=environment, stdout=out, stderr=out)
        finally:
            if out is not None:
                out.close()

    def _namespace(self, name: str) -> str:
        name = f"{self._prefix}-{name}"
        _run("ip", "netns", "add", name)
        self._made.append(name)
        # What processes inside see in /etc: without names to find, every connection waits for a DNS time-out.
        (_ETC / name).mkdir(parents=True)
        names = [f"{self.address(node)} node{node}\n" for node in range(self.nodes)]
        (_ETC / name / "hosts").write_text("127.0.0.1 localhost\n" + "".join(names))
        (_ETC / name / "nsswitch.conf").write_text("hosts: files\n")
        _run("ip", "-n", name, "link", "set", "lo", "up")
        return name


def wait(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Until all ranks are done, or one has failed; none is left behind."""
    try:
        while any(process.poll() is None for process in processes) and not any(process.poll() for process in processes):
            time.sleep(0.2)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run_ranks(module: str, words: Sequence[object], port: int, ranks: int, ranks_per_node: int = 1) -> Any:
    """Run ``python -m MODULE --worker --out FILE WORDS`` as every rank behind slow links; rank 0's output comes here.

    Returns:
        The JSON that rank 0 wrote to FILE.

    Raises:
        SystemExit: it wrote nothing; with the last words of the other ranks.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        logs = [None, *(Path(folder) / f"rank{rank}.log" for rank in range(1, ranks))]
        command = [sys.executable, "-m", module, "--worker", "--out", str(out), *map(str, words)]
        with SlowLinks(ranks, ranks_per_node) as links:
            wait([links.start(rank, command, port, log) for rank, log in enumerate(logs)])
        if not out.exists():
            tails = "\n".join(log.read_text(errors="replace")[-2000:] for log in logs if log is not None)
            raise SystemExit(f"a rank failed\n{tails}")
        return json.loads(out.read_text())


def first_of_node() -> bool:
    """Whether this rank is the one that sets and reads its node's interface."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def set_rate(mbit: float | None, burst_kb: float = 256) -> None:
    """From within a namespace: limit what this node sends to `mbit` Mbit/s; None lifts the limit. The node's other ranks do
    nothing; who measures lets all ranks wait for each other first. After a pause `burst_kb` kilobytes leave at once."""
    if not first_of_node():
        return
    subprocess.run(["tc", "qdisc", "del", "dev", INTERFACE, "root"], check=False, capture_output=True)
    if mbit is not None:
        limit = ["rate", f"{round(mbit * 1000)}kbit", "burst", f"{round(burst_kb)}kb", "latency", "50ms"]
        _run("tc", "qdisc", "add", "dev", INTERFACE, "root", "tbf", *limit)


def sent_bytes() -> int:
    """From within a namespace: bytes the interface has sent, headers included; of a node's other ranks 0."""
    if not first_of_node():
        return 0
    return int(Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes").read_text())


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{' '.join(command)} failed: {error.stderr.strip()}") from error
