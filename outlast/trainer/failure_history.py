"""What earlier starts of a run came to: how long they trained, and how many of them failed."""

from __future__ import annotations

import logging
import mmap
from dataclasses import dataclass
from pathlib import Path

from outlast.errors import DiagnosticsError
from outlast.events import Record, RunEnded, RunStarted, StepDone, parse_event
from outlast.trainer.run_directory import Attempt

_LOG = logging.getLogger("outlast")


@dataclass(frozen=True, slots=True)
class History:
    """Of all starts before one; those that took no step do not count."""

    failures: int = 0
    """Starts that did not end of their own accord at the last step."""
    trained_rank_s: float = 0.0
    """Seconds from a start's first step to its last sign of life, times its ranks; summed."""


def read_history(attempt: Attempt) -> History:
    """From rank 0's events of the starts before ``attempt``; of each file its beginning and its last line are read.

    A file that cannot be read is told in the log, and its start does not count.
    """
    failures, trained_rank_s = 0, 0.0
    for number in range(1, attempt.number):
        path = Attempt(attempt.run, number).events_path(0)
        try:
            found = _ends(path)
        except (OSError, DiagnosticsError) as error:
            _LOG.warning("start %d of the run does not count for checkpoint.every_steps = auto: %s", number, error)
            continue
        if found is None:
            continue
        started, last = found
        failures += not (last.kind == RunEnded.kind and last["ok"])
        trained_rank_s += (last.t - started.t) * started["world_size"]
    return History(failures, trained_rank_s)


def _ends(path: Path) -> tuple[Record, Record] | None:
    """The record of a start, and the last one; None where no step was done."""
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
