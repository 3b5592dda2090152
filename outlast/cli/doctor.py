"""``outlast doctor``."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from outlast.cli.verb import Verb
from outlast.config import Overrides
from outlast.errors import ConfigError, LaunchError

MEET_S = 60.0
"""How long the nodes wait for one another."""


@dataclass(frozen=True, kw_only=True)
class Doctor(Verb):
    """Check this machine: versions, backends, network, shared memory, disk, limits, and a live two-rank all-reduce.

    With --nodes, started on each of them at once: try out each node, and the links between them.
    """

    dir: Path = Path("runs")
    """The directory that runs are written to; its disk is checked."""
    json: bool = False
    """Print JSON."""
    nodes: int = 1
    """How many nodes take part. What they share is in --dir, on shared storage, or in OUTLAST_LAUNCH_SECRET."""
    node: int = 0
    """The number of this node, from 0."""
    meet: str = ""
    """HOST:PORT of node 0, where the nodes meet; the port is free."""
    least_gbit: float | None = None
    """Gbit/s that each link must do. Without it links are compared with each other."""

    def run(self, overrides: Overrides) -> int:
        """Run every check; exit status 1 if one fails."""
        if self.nodes > 1:
            return self._run_nodes()
        from outlast.diagnostics.doctor import checks

        results = checks.run_checks(self.dir)
        if self.json:
            print(json.dumps([dataclasses.asdict(check) for check in results]))
        else:
            checks.render(results, Console())
        return 1 if any(check.status == "FAIL" for check in results) else 0

    def _run_nodes(self) -> int:
        host, _, port = self.meet.rpartition(":")
        if not host or not port.isdecimal() or not 0 <= self.node < self.nodes:
            raise ConfigError(
                f"--nodes {self.nodes} --node {self.node} --meet {self.meet!r}",
                "give each node its number, from 0, and all the same HOST:PORT, a free port of node 0",
            )
        from torch.distributed import DistError

        from outlast.launch.node_probe import leave, meeting_store, probe_nodes
        from outlast.launch.trusted_rendezvous import run_secret

        self.dir.mkdir(parents=True, exist_ok=True)
        try:
            store = meeting_store(host, int(port), node=self.node, nodes=self.nodes, timeout_s=MEET_S)
            probed = probe_nodes(
                store,
                secret=run_secret(self.dir),
                occasion="doctor",
                node=self.node,
                nodes=self.nodes,
                folder=self.dir,
                meet_s=MEET_S,
                least_bytes_s=None if self.least_gbit is None else self.least_gbit * 1e9 / 8,
            )
            # the store goes with node 0: whoever has read all says so
            leave(store, self.node, self.nodes)
        except (DistError, OSError) as error:
            raise LaunchError(
                f"the nodes cannot meet at {self.meet}: {error}", "start all of them within a minute; free the port"
            ) from error
        found = probed.findings
        if self.json:
            print(json.dumps({"links": dict(probed.rows), "findings": found}))
        elif self.node == 0:
            console = Console()
            for name, words in probed.rows:
                console.print(f"{name}: {words}", markup=False, highlight=False, soft_wrap=True)
            for words in found or ("no node and no link stands out",):
                console.print(words, style="bold", markup=False, highlight=False, soft_wrap=True)
        return 1 if found else 0
