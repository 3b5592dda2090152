"""How long earlier attempts of a run trained, and how many of them failed."""

from __future__ import annotations

import logging
import mmap
from dataclasses import dataclass
from pathlib import Path

from outlast.errors import DiagnosticsError
from outlast.events import Record, RunEnded, RunStarted, StepDone, parse_event
from outlast.launch.attempt import Attempt

_LOG = logging.getLogger("outlast")


@dataclass(frozen=True, slots=True)
class FailureHistory:
    """Failures and training time of all earlier attempts; attempts without a step do not count."""

    failures: int = 0
    """Attempts that did not reach the last step."""
    trained_rank_s: float = 0.0
    """Seconds from each attempt's first step to its last event, times its world size; summed."""


def read_failure_history(attempt: Attempt) -> FailureHistory:
    """Read rank 0's events of the attempts before ``attempt``; of each file only the beginning and the last line.

    An attempt whose file cannot be read is logged and does not count.
    """
    failures, trained_rank_s = 0, 0.0
    for number in range(1, attempt.number):
        path = Attempt(attempt.run, number).events_path(0)
        try:
            ends = _ends(path)
        except (OSError, DiagnosticsError) as error:
            _LOG.warning("attempt %d does not count for checkpoint.every_steps = auto: %s", number, error)
            continue
        if ends is None:
            continue
        started, last = ends
        failures += not (last.kind == RunEnded.kind and last["ok"])
        trained_rank_s += (last.t - started.t) * started["world_size"]
    return FailureHistory(failures, trained_rank_s)


def _ends(path: Path) -> tuple[Record, Record] | None:
    """The record of the start and the last record; None if no step was done."""
    if not path.exists() or not path.stat().st_size:
        return None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        started: Record | None = None
        trained = False
        end = text.rfind(b"\n")
        at = 0
        while at < end and not trained:
            stop = text.find(b"\n", at)
            record = parse_event(text[at:stop], str(path))
            started = record if record.kind == RunStarted.kind else started
            trained = record.kind == StepDone.kind
            at = stop + 1
        if started is None or not trained:
            return None
        return started, parse_event(text[text.rfind(b"\n", 0, end) + 1 : end], str(path))
