"""``outlast doctor``."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from outlast.cli.verb import Verb
from outlast.config import Overrides


@dataclass(frozen=True, kw_only=True)
class Doctor(Verb):
    """Check this machine: versions, backends, network, shared memory, disk, limits, and a live two-rank all-reduce."""

    dir: Path = Path("runs")
    """The directory that runs are written to; its disk is checked."""
    json: bool = False
    """Print JSON."""

    def run(self, overrides: Overrides) -> int:
        """Run every check; exit status 1 if one fails."""
        from outlast.diagnostics.doctor import checks

        results = checks.run_checks(self.dir)
        if self.json:
            print(json.dumps([dataclasses.asdict(check) for check in results]))
        else:
            checks.render(results, Console())
        return 1 if any(check.status == "FAIL" for check in results) else 0
