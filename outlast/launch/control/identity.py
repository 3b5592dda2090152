"""Who this launcher is, for the others."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path

import psutil

from outlast.launch.control.records import Member

NODE_ID = "OUTLAST_NODE_ID"
"""Environment variable with this node's name, in place of its host name."""
TOPOLOGY = "OUTLAST_TOPOLOGY"
"""Environment variable that says where this node is, from the outside in: ``room2/rack7``. Nodes whose words are alike
get ranks next to each other."""


def this_member(address: str, environ: Mapping[str, str] | None = None) -> Member:
    """This process as a launcher.

    Args:
        address: where other nodes reach this one.
        environ: in place of the process's own.
    """
    process = psutil.Process()
    return Member(
        node=node_id(environ),
        agent=secrets.token_hex(8),
        address=address,
        pid=process.pid,
        started=process.create_time(),
    )


def node_id(environ: Mapping[str, str] | None = None) -> str:
    """This node's name and the id of its boot: another boot may be another machine, or a repaired one."""
    environ = os.environ if environ is None else environ
    name = environ.get(NODE_ID) or environ.get("SLURMD_NODENAME") or socket.gethostname()
    return f"{name}/{_boot_id()}"


def node_order(environ: Mapping[str, str] | None = None) -> str:
    """Where this node belongs among the others: by topology, then by the scheduler's number, then by name."""
    environ = os.environ if environ is None else environ
    where = environ.get(TOPOLOGY) or environ.get("SLURM_TOPOLOGY_ADDR", "").rpartition(".")[0]
    number = environ.get("SLURM_NODEID") or environ.get("JOB_COMPLETION_INDEX") or environ.get("GROUP_RANK")
    name = environ.get(NODE_ID) or environ.get("SLURMD_NODENAME") or socket.gethostname()
    return f"{where}/{number or name}"


def is_dead(pid: int, started: float) -> bool:
    """Whether that process of this node has ended, and left no ranks behind."""
    try:
        process = psutil.Process(pid)
        if abs(process.create_time() - started) < 1.0 and process.status() != psutil.STATUS_ZOMBIE:
            return False
    except psutil.NoSuchProcess:
        pass
    return not _ranks_without_launcher()


def _ranks_without_launcher() -> bool:
    """Whether ranks of this user run here whose launcher has died."""
    for process in psutil.process_iter():
        try:
            if process.ppid() == 1 and "TORCHELASTIC_RUN_ID" in process.environ():
                return True
        except psutil.Error:  # gone since, or another user's
            continue
    return False


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
    except OSError:  # not Linux
        return "boot"
