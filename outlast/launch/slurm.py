"""Parses Slurm's environment variables: node lists, tasks per node, addresses, and a port for the job step."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Mapping

from outlast.errors import PlaceError

FIRST_PORT = 61440
_ASK_S = 30.0
PORTS = 4096
"""61440 to 65535 are above Linux's ephemeral ports (32768 to 60999), so no outgoing connection uses one."""


def master_port(job_id: int, step_id: int) -> int:
    """The master port of a job step, the same on all its ranks: ``61440 + (16 x job_id + step_id mod 16) mod 4096``.

    The ports of 256 consecutive jobs, and of 16 consecutive steps of each, differ, because they may share a node.
    """
    return FIRST_PORT + (job_id * 16 + step_id % 16) % PORTS


def expand_nodelist(nodelist: str) -> list[str]:
    """The names in a node list, in order: ``"n[1-2,07-08],gpu3"`` is n1, n2, n07, n08, gpu3.

    Raises:
        PlaceError: it is empty, or a bracket does not contain ranges of numbers.
    """
    names: list[str] = []
    for part in _split(nodelist):
        names += _expand_one(part, nodelist)
    if not names:
        raise PlaceError("Slurm's node list is empty", "start the ranks with srun")
    return names


def _split(nodelist: str) -> list[str]:
    """Cut at commas outside brackets."""
    parts, depth = [""], 0
    for char in nodelist:
        depth += (char == "[") - (char == "]")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part for part in parts if part]


def _expand_one(part: str, nodelist: str) -> list[str]:
    head, bracket, rest = part.partition("[")
    if not bracket:
        return [part]
    ranges, closing, tail = rest.partition("]")
    names = []
    for item in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
        if match is None or not closing:
            raise PlaceError(
                f"Slurm's node list {nodelist!r} cannot be parsed", "set MASTER_ADDR to the host of rank 0"
            )
        first, last = match[1], match[2] or match[1]
        numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
        names += [head + number + end for number in numbers for end in _expand_one(tail, nodelist)]
    return names


def tasks_on_node(tasks_per_node: str, node: int) -> int:
    """How many tasks node ``node`` (from 0) has: ``"2(x3),1"`` means 2 on nodes 0 to 2 and 1 on node 3.

    Raises:
        PlaceError: the text cannot be parsed, or lacks the node.
    """
    counts: list[int] = []
    for item in tasks_per_node.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if match is None:
            raise PlaceError(f"Slurm's tasks per node, {tasks_per_node!r}, cannot be parsed")
        counts += [int(match[1])] * int(match[2] or 1)
    if not 0 <= node < len(counts):
        raise PlaceError(
            f"SLURM_NODEID is {node}, but SLURM_STEP_TASKS_PER_NODE={tasks_per_node!r} has {len(counts)} nodes"
        )
    return counts[node]


def node_address(name: str) -> str:
    """An address at which other nodes reach node ``name``: the name if it resolves, else Slurm's NodeAddr.

    Raises:
        PlaceError: the name does not resolve, and ``scontrol`` prints no address for it.
    """
    if _resolves(name):
        return name
    fix = "set MASTER_ADDR to an address of the first node"
    scontrol = shutil.which("scontrol")
    if scontrol is None:
        raise PlaceError(f"Slurm node {name!r} does not resolve here, and scontrol is not installed", fix)
    asked = subprocess.run([scontrol, "show", "node", name], capture_output=True, text=True, timeout=30, check=False)
    match = re.search(r"\bNodeAddr=(\S+)", asked.stdout)
    if match is None or not _resolves(match[1]):
        output = (asked.stdout + asked.stderr).strip().splitlines()[:1]
        raise PlaceError(
            f"Slurm node {name!r} does not resolve here, and scontrol prints no address for it: {output}", fix
        )
    return match[1]


def true_restarts(job_id: str) -> int | None:
    """How often Slurm says that it has requeued a job; None if it does not say so."""
    scontrol = shutil.which("scontrol")
    if scontrol is None:
        return None
    try:
        asked = subprocess.run(
            [scontrol, "--oneliner", "show", "job", job_id],
            capture_output=True,
            text=True,
            timeout=_ASK_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    match = re.search(r"\bRestarts=(\d+)", asked.stdout)
    return int(match[1]) if match is not None else None


def _resolves(name: str) -> bool:
    try:
        socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return True


def first_node_address(environ: Mapping[str, str]) -> str:
    """Address of the first node of this job step, or of the job if there is no step."""
    for key in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if environ.get(key):
            return node_address(expand_nodelist(environ[key])[0])
    raise PlaceError("Slurm's environment has no node list", "set MASTER_ADDR to the host of rank 0")
