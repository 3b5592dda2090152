"""The launcher's flags. Those that torchrun has too have its names and meanings."""

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
    """static: the nodes are numbered with node-rank and meet once, so it goes with max-restarts 0 only."""
    rdzv_endpoint: str = ""
    """HOST:PORT, the same on all nodes. May be left out on a single node (a free port is taken) and under srun with one
    launcher per node (the step's first node and a port made from the job's id)."""
    rdzv_id: str = ""
    """Tells jobs apart at one endpoint; the same on all nodes."""
    rdzv_conf: str = ""
    """key=value,… for the rendezvous backend."""
    standalone: bool = False
    """A single node, whatever the rendezvous flags say."""
    node_rank: int = 0
    """Number of this node; only for the static backend."""
    master_addr: str = ""
    """Host of node 0; with master-port it stands for rdzv-endpoint."""
    master_port: int = DEFAULT_PORT
    """Port on node 0."""
    local_addr: str | None = None
    """Address under which other nodes reach this one; without it, its host name."""
    max_restarts: int | None = None
    """Stands for --launch.max-restarts."""
    monitor_interval: float | None = None
    """Seconds; stands for --launch.monitor-interval-s."""
    log_dir: Path | None = None
    """Where output that is not passed to the terminal is kept; without it, launcher/ in the run's directory."""
    role: str = "trainer"
    """Name of the ranks' role, for torchelastic."""

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
