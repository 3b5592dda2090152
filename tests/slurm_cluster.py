"""A real Slurm cluster on this machine: munged, slurmctld and one slurmd per node, on loopback and free ports.

Needs root and Debian's slurm-wlm and munge. Nodes are called n1, n2, …; their names do not resolve, as on clusters
whose nodes are only in Slurm's configuration, and their address is 127.0.0.1. A requeued job starts after as long as a
credential lives, which is short here.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from outlast.free_port import free_port

CONF = """
ClusterName=outlast
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/%n.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
SlurmdTimeout=15
KillWait=5
SchedulerParameters=sched_interval=1,batch_sched_delay=1
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")


class SlurmCluster:
    """Daemons that live as long as the ``with`` block.

    Args:
        folder: where configuration, state and logs lie; a short path, since a socket is among them.
        nodes: how many.
    """

    def __init__(self, folder: Path, nodes: int = 4) -> None:
        self.folder = folder
        self.nodes = nodes
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def environ(self) -> dict[str, str]:
        """What makes Slurm's commands talk to this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> Self:
        for name in ("munge", "state", "spool", "run", "log"):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        host = socket.gethostname()
        ctld_port, *ports = self._free_ports()
        cpus = os.cpu_count()
        nodes = "\n".join(
            f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=1000"
            for i, port in enumerate(ports, 1)
        )
        conf = CONF.format(host=host, ctld_port=ctld_port, folder=self.folder, nodes=nodes)
        (self.folder / "slurm.conf").write_text(conf)
        try:
            munge = [f"--{name}-file={self.folder}/munge/{name}" for name in ("key", "log", "pid", "seed")]
            self._start("munged", "munged", "--foreground", "--force", f"--socket={self.folder}/munge/socket", *munge)
            self._wait(lambda: (self.folder / "munge" / "socket").exists(), "munged's socket")
            self._start("slurmctld", "slurmctld", "-D", "-i")
            for i in range(1, self.nodes + 1):
                self.start_node(i)
            self._wait(lambda: self._idle() == self.nodes, f"{self.nodes} idle nodes")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def start_node(self, node: int) -> None:
        """Start the slurmd of node ``n<node>``."""
        self._start(f"n{node}", "slurmd", "-D", "-N", f"n{node}")

    def stop(self) -> None:
        """End all jobs and daemons."""
        if "slurmctld" in self._daemons:
            with contextlib.suppress(subprocess.SubprocessError):
                self.run("scancel", "--full", "--signal=KILL", "--state=RUNNING", check=False)
                self.run("scancel", "--user=root", check=False)
        for name in reversed(self._daemons):
            self._daemons[name].send_signal(signal.SIGTERM)
        for daemon in self._daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()

    def run(
        self,
        *command: str,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        check: bool = True,
        timeout_s: float = 60,
    ) -> str:
        """Run one of Slurm's commands; its stdout. Raises where it fails and ``check`` is set."""
        full = {**(os.environ if env is None else env), **self.environ}
        done = subprocess.run(
            command, capture_output=True, text=True, env=full, cwd=cwd, timeout=timeout_s, check=False
        )
        assert done.returncode == 0 or not check, f"{command} -> {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def sbatch(self, *arguments: str, env: Mapping[str, str], cwd: Path) -> int:
        """Submit a job; its number."""
        return int(self.run("sbatch", "--parsable", *arguments, env=env, cwd=cwd).strip().split(";")[0])

    def state(self, job: int) -> str:
        """E.g. ``RUNNING``."""
        match = re.search(r"JobState=(\S+)", self.run("scontrol", "show", "job", str(job)))
        assert match is not None
        return match[1]

    def wait(self, job: int, timeout_s: float = 240) -> str:
        """The state in which the job ends."""
        self._wait(lambda: self.state(job) in ENDED, f"job {job} to end", timeout_s)
        return self.state(job)

    def logs(self) -> str:
        """The daemons' last words, for a test that fails."""
        return "\n".join(
            f"== {path.name}\n{path.read_text()[-2000:]}" for path in sorted((self.folder / "log").iterdir())
        )

    def _idle(self) -> int:
        return sum(map(int, self.run("sinfo", "-h", "-t", "idle", "-o", "%D", check=False).split()))

    def _start(self, name: str, *command: str) -> None:
        path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        with (self.folder / "log" / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                command,
                stdout=out,
                stderr=out,
                env={**os.environ, **self.environ, "PATH": path},
                start_new_session=True,
            )

    def _free_ports(self) -> list[int]:
        """Of the controller, and of each node."""
        ports: dict[int, None] = {}
        while len(ports) <= self.nodes:
            ports[free_port()] = None
        return list(ports)

    def _wait(self, what: object, words: str, timeout_s: float = 30) -> None:
        assert callable(what)
        deadline = time.monotonic() + timeout_s
        while not what():
            assert time.monotonic() < deadline, f"waited {timeout_s} s in vain for {words}\n{self.logs()}"
            time.sleep(0.2)
