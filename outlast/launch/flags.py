"""The launcher's flags; those that torchrun has too keep its names and meanings."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from outlast.config import require
from outlast.errors import ConfigError

DEFAULT_PORT = 29500
PREFIX = "PET_"
"""Of the environment variables that torchrun reads, and Kubeflow sets: ``PET_NNODES`` stands for ``--nnodes``."""
NOT_FLAGS = (
    *("PET_MODULE", "PET_NO_PYTHON", "PET_RUN_PATH", "PET_START_METHOD", "PET_EVENT_LOG_HANDLER", "PET_LOGS_SPECS"),
    *("PET_REDIRECTS", "PET_TEE", "PET_LOCAL_RANKS_FILTER", "PET_DUPLICATE_STDOUT_FILTERS", "PET_VIRTUAL_LOCAL_RANK"),
    *("PET_DUPLICATE_STDERR_FILTERS", "PET_NUMA_BINDING", "PET_SIGNALS_TO_HANDLE", "PET_SHUTDOWN_TIMEOUT"),
)
"""Those of torchrun's that have no flag here."""


@dataclass(frozen=True, kw_only=True)
class LaunchFlags:
    """How many ranks, and where they meet."""

    nnodes: str = "1"
    """Number of nodes, or MIN:MAX."""
    nproc_per_node: str = "1"
    """Ranks on this node: a number, cpu, gpu, or auto (accelerators where there are any, else CPUs)."""
    rdzv_backend: Literal["c10d", "static"] = "c10d"
    """static: nodes are numbered by --node-rank and meet only once, so it requires --max-restarts 0."""
    rdzv_endpoint: str = ""
    """HOST:PORT, the same on all nodes. Not needed on a single node, or under srun with one launcher per node."""
    rdzv_id: str = ""
    """Job id, the same on all nodes; it separates jobs that share an endpoint."""
    rdzv_conf: str = ""
    """Options of the rendezvous backend: key=value,key=value"""
    standalone: bool = False
    """Run on a single node and ignore the other rendezvous flags."""
    node_rank: int | None = None
    """Rank of this node. The static backend numbers nodes by it; with c10d, node 0 hosts the rendezvous."""
    master_addr: str = ""
    """Host of node 0; together with --master-port an alternative to --rdzv-endpoint."""
    master_port: int = DEFAULT_PORT
    """Port on node 0."""
    local_addr: str | None = None
    """Address at which other nodes reach this one; by default its host name."""
    max_restarts: int | None = None
    """Short for --launch.max-restarts."""
    monitor_interval: float | None = None
    """Seconds; short for --launch.monitor-interval-s."""
    log_dir: Path | None = None
    """Where the output of ranks goes that is not shown here; by default launcher/ in the run's directory."""
    role: str = "trainer"
    """torchelastic's name for the ranks' role."""

    def __post_init__(self) -> None:
        require(0 < self.master_port < 65536, "--master-port", self.master_port, "1 to 65535")
        most = self.node_range()[1]
        ok = self.node_rank is None or 0 <= self.node_rank < most
        require(ok, "--node-rank", self.node_rank, f"0 to {most - 1}, with --nnodes {self.nnodes}")

    def node_range(self) -> tuple[int, int]:
        """Fewest and most nodes.

        Raises:
            OutOfRange: ``nnodes`` is neither a number nor ``MIN:MAX``.
        """
        least, _, most = self.nnodes.partition(":")
        most = most or least
        ok = least.isdecimal() and most.isdecimal() and 0 < int(least) <= int(most)
        require(ok, "--nnodes", self.nnodes, "a number of nodes, or MIN:MAX with 1 <= MIN <= MAX")
        return int(least), int(most)


def arguments_from_environment(given: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """torchrun's variables as flags, but for those that stand on the command line.

    Args:
        given: the command line.
        environ: the environment.

    Raises:
        ConfigError: a variable stands for a flag of torchrun's that does not exist here, or two of them contradict
            one another.
    """
    named = {word.partition("=")[0].replace("_", "-") for word in given if word.startswith("--")}
    unknown = sorted(name for name in NOT_FLAGS if environ.get(name))
    if unknown:
        raise ConfigError(f"{unknown[0]} is set, and outlast launch has no such flag", f"unset {unknown[0]}")
    added: list[str] = []
    for field in fields(LaunchFlags):
        value = environ.get(f"{PREFIX}{field.name.upper()}")
        flag = f"--{field.name.replace('_', '-')}"
        if not value or flag in named:
            continue
        if field.name == "standalone":
            added += [flag] if value.lower() in ("1", "true", "yes") else []
        else:
            added += [flag, value]
    _refuse_contradictions(named, environ)
    return added


def _refuse_contradictions(named: Collection[str], environ: Mapping[str, str]) -> None:
    def source(flag: str) -> str | None:
        variable = f"{PREFIX}{flag[2:].replace('-', '_').upper()}"
        return flag if flag in named else f"{variable}={environ[variable]}" if environ.get(variable) else None

    for one, other in (("--rdzv-endpoint", "--master-addr"), ("--standalone", "--rdzv-endpoint")):
        first, second = source(one), source(other)
        # What stands on the command line is meant; of two variables nobody knows.
        if first and second and not {one, other} & set(named):
            raise ConfigError(f"{first} and {second} contradict one another", "unset one of them")
