"""The launcher's flags; those that torchrun has too keep its names and meanings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from outlast.config import require

DEFAULT_PORT = 29500


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
    node_rank: int = 0
    """Rank of this node; only for the static backend."""
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
        self.node_range()
        require(0 < self.master_port < 65536, "--master-port", self.master_port, "1 to 65535")
        require(self.node_rank >= 0, "--node-rank", self.node_rank, "0 or more")

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
