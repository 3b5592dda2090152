"""Whether a job is well, in few words: for probes of load balancers, Kubernetes and people with curl."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outlast.diagnostics.report.status import RunStatus, status_of
from outlast.errors import NoEvents

STARTING = "starting"
"""No launcher or rank has told anything yet."""
WELL = (STARTING, "running", "restarting", "finished", "ended")


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """A job at one moment."""

    alive: bool
    """Whether it runs and makes progress, is about to, or has ended well."""
    hung: bool
    """Whether a rank keeps its peers waiting, and no step was done since that was told."""
    state: str
    """As ``outlast status`` has it; ``starting`` before the first event."""
    step: int
    last_step_age_s: float | None
    """Seconds since a rank was done with a step; None before the first one."""
    verdict: str
    """What is wrong, the worst of it; else empty."""

    def to_json(self) -> dict[str, Any]:
        """Of plain values."""
        return dataclasses.asdict(self)


def health_of(run_dir: Path) -> Health:
    """Look now. Nothing is written, and nothing waits.

    Raises:
        DiagnosticsError: the run's directory is gone, or its shared memory is another user's.
    """
    try:
        return health_from(status_of(run_dir))
    except NoEvents:
        return Health(alive=True, hung=False, state=STARTING, step=0, last_step_age_s=None, verdict="")


def health_from(status: RunStatus) -> Health:
    """The same of what is known."""
    wrong = (*status.verdicts, status.reason)
    return Health(
        alive=status.state in WELL and not status.hung,
        hung=status.hung,
        state=status.state,
        step=status.step,
        last_step_age_s=status.step_age_s,
        verdict=next((words for words in wrong if words), ""),
    )
