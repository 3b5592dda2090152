"""The launcher's flags; those that torchrun has too keep its names and meanings."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from outlast.config import require
from outlast.errors import ConfigError

DEFAULT_PORT = 29500
HANDLED_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"
"""torchrun's default. The launcher takes SIGUSR1 and SIGUSR2 too, because schedulers announce an end by them."""
NUMA_BINDINGS = ("node", "socket", "exclusive", "core-complex")
NO_FLAGS = {
    "--logs-specs": (
        "the launcher names and reads the ranks' output files by itself, to tell why a rank failed",
        "choose where output goes with --log-dir, --redirects, --tee and --local-ranks-filter",
    ),
}
"""torchrun's flags that do not exist here: why, and what to do instead."""

_STREAMS = re.compile(r"[0-3]|\d+:[0-3](,\d+:[0-3])*")
_STREAMS_ALLOWED = "0 none, 1 stdout, 2 stderr, 3 both; for some local ranks: 0:3,1:2"


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
    redirects: str = ""
    """Short -r. Output that goes only to files: 0 none, 1 stdout, 2 stderr, 3 both; for some local ranks 0:3,1:2. With
    this or --tee, what neither names goes to the console."""
    tee: str = ""
    """Short -t. Output that goes to files and, with the rank before each line, to the console; written as --redirects.
    Without both, rank 0 writes to the console, and of the others stderr is shown and all is kept in files."""
    local_ranks_filter: str = ""
    """Local ranks whose output is shown: 0,2. That of the others is only kept in files."""
    duplicate_stdout_filters: str = ""
    """Lines of stdout with one of these words, with commas (,, is a comma), go to filtered_stdout.log too; of ranks
    that --tee names."""
    duplicate_stderr_filters: str = ""
    """The same for stderr, in filtered_stderr.log."""
    shutdown_timeout: float | None = None
    """Seconds between SIGTERM and SIGKILL for ranks that shall end; short for --launch.stop-grace-s."""
    signals_to_handle: str = HANDLED_SIGNALS
    """Signals that end the ranks when the launcher gets them. SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 are a notice
    in any case."""
    virtual_local_rank: bool = False
    """Each rank has LOCAL_RANK 0 and sees its own GPU alone, by CUDA_VISIBLE_DEVICES."""
    numa_binding: str = ""
    """Bind ranks to CPUs near their GPUs: node, socket, exclusive or core-complex. Needs GPUs and numactl."""
    event_log_handler: str = "null"
    """Where torchelastic writes its own events: null or console. outlast's are in the run's directory."""
    start_method: str = "spawn"
    """Only spawn: each rank is an interpreter of its own."""

    def __post_init__(self) -> None:
        require(0 < self.master_port < 65536, "--master-port", self.master_port, "1 to 65535")
        most = self.node_range()[1]
        ok = self.node_rank is None or 0 <= self.node_rank < most
        require(ok, "--node-rank", self.node_rank, f"0 to {most - 1}, with --nnodes {self.nnodes}")
        self._check_output()
        grace_s = self.shutdown_timeout
        require(grace_s is None or grace_s >= 0, "--shutdown-timeout", grace_s, "0 or more seconds")
        for name in self.signals_to_handle.split(","):
            number = getattr(signal, name.strip(), None) if name.strip().startswith("SIG") else None
            ok = isinstance(number, signal.Signals) and number not in (signal.SIGKILL, signal.SIGSTOP)
            allowed = "names of signals that a process can handle, with commas: SIGTERM,SIGUSR1"
            require(ok, "--signals-to-handle", self.signals_to_handle, allowed)
        if self.start_method != "spawn":
            raise ConfigError(
                f"--start-method {self.start_method} is not possible: ranks are commands, and each is started anew",
                "leave it out",
            )
        ok = self.numa_binding in ("", *NUMA_BINDINGS)
        require(ok, "--numa-binding", self.numa_binding, ", ".join(NUMA_BINDINGS))

    def _check_output(self) -> None:
        for flag, value in (("--redirects", self.redirects), ("--tee", self.tee)):
            require(not value or _STREAMS.fullmatch(value) is not None, flag, value, _STREAMS_ALLOWED)
        shown = self.local_ranks_filter
        ok = re.fullmatch(r"(\d+(,\d+)*)?", shown) is not None
        require(ok, "--local-ranks-filter", shown, "local ranks, with commas: 0,2")
        for stream, number, words in (
            ("stdout", 1, self.duplicate_stdout_filters),
            ("stderr", 2, self.duplicate_stderr_filters),
        ):
            if words and not any(int(one[-1]) & number for one in (self.tee or "0").split(",")):
                raise ConfigError(
                    f"--duplicate-{stream}-filters {words} takes lines of what --tee shows, and no {stream} is",
                    f"add --tee {number}",
                )

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
