"""Who holds a place: a process of a job, on a machine, since a time; and whether it may still be alive."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

JOB = "OUTLAST_JOB"
"""Names the job in the environment of all its processes, now and after each restart, and those of no other job.
``outlast launch`` sets it; without it, Slurm's job and step do."""

_RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
_GENERATION = "OUTLAST_GENERATION"


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A process that holds, or held, a place."""

    host: str
    pid: int
    machine: str
    """Equal for processes whose pids can be compared: the machine's boot id and the pid namespace. Empty: unknown."""
    started: int
    """When the process started, in clock ticks since boot: a pid may be used again."""
    job: str
    """See :data:`JOB`; empty where nothing names the job."""
    generation: int
    """How often the job was restarted before."""

    @classmethod
    def this_process(cls, environ: Mapping[str, str] | None = None) -> Holder:
        """The process that calls this."""
        environ = os.environ if environ is None else environ
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            machine=_machine(),
            started=_started(os.getpid()) or 0,
            job=_job(environ),
            generation=_generation(environ),
        )

    def state_for(self, newcomer: Holder) -> Literal["over", "own", "restarted", "held", "unknown"]:
        """What a newcomer can tell at once.

        Returns:
            ``over``: the holder is dead. ``own``: it is the newcomer itself. ``restarted``: its job was restarted, and
            the newcomer is of the restart. ``held``: it is alive, on this machine. ``unknown``: only waiting can tell.
        """
        same_machine = bool(self.machine) and self.machine == newcomer.machine
        if same_machine and (self.pid, self.started) == (newcomer.pid, newcomer.started):
            return "own"
        if same_machine and not self.is_alive():
            return "over"
        if self.job and self.job == newcomer.job and (self.generation < newcomer.generation or not same_machine):
            return "restarted"
        return "held" if same_machine else "unknown"

    def is_alive(self) -> bool:
        """Whether the process runs, or is stopped; on the holder's own machine."""
        started = _started(self.pid)
        return started is not None and (not self.started or started == self.started)

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Holder:
        """The holder in a record; raises KeyError or ValueError."""
        return cls(
            host=str(fields["host"])[:255],
            pid=int(fields["pid"]),
            machine=str(fields["machine"]),
            started=int(fields["started"]),
            job=str(fields["job"])[:255],
            generation=int(fields["generation"]),
        )


def local_time(t_s: float) -> str:
    """A Unix time as people of this place write it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(t_s))


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}:{Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return ""


def _started(pid: int) -> int | None:
    """When a process started, in ticks since boot; None if it has ended, even if its parent has not seen that yet."""
    try:
        # The name in parentheses may have spaces, and parentheses.
        words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if words[0] in "ZX" else int(words[19])


def _job(environ: Mapping[str, str]) -> str:
    if environ.get(JOB):
        return environ[JOB]
    if environ.get("SLURM_JOB_ID") and environ.get("SLURM_STEP_ID"):
        cluster = environ.get("SLURM_CLUSTER_NAME", "slurm")
        return f"{cluster}-{environ['SLURM_JOB_ID']}.{environ['SLURM_STEP_ID']}"
    return ""


def _generation(environ: Mapping[str, str]) -> int:
    names = (_GENERATION,) if environ.get(_GENERATION) else _RESTARTS
    counts = [environ.get(name, "") for name in names]
    return sum(int(count) for count in counts if count.isdecimal())
