"""A line and an event for each rank that keeps its peers waiting, once for each place where it stands still."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from outlast.diagnostics.live.suspects import Suspect
from outlast.events import Event, EventLog

log = logging.getLogger("outlast.launch")


@dataclass(frozen=True, slots=True, kw_only=True)
class HangSuspected(Event):
    """A rank keeps its peers waiting; nobody is ended for it yet."""

    kind: ClassVar[str] = "hang_suspected"
    culprit: int
    """The rank that they wait for."""
    pid: int
    step: int
    """The step it is in."""
    awaited_s: float
    """For how long the first of its peers has been inside a collective."""
    evidence: str
    """What it does, and who waits where."""


class Suspicions:
    """What was told of whom.

    Args:
        events: where it is written.
    """

    def __init__(self, events: EventLog) -> None:
        self._events = events
        self._told: set[tuple[int, int, int, int]] = set()

    def tell(self, suspects: Iterable[Suspect]) -> None:
        """Of those that nothing was told of where they stand now."""
        for one in suspects:
            key = one.rank, one.pid, one.step, one.entered
            if key in self._told:
                continue
            self._told.add(key)
            log.warning(
                "outlast: rank %d keeps %d %s waiting at step %d: %s",
                *(one.rank, one.waiting, "peer" if one.waiting == 1 else "peers", one.step, one.evidence),
            )
            self._events.write(
                HangSuspected(
                    culprit=one.rank, pid=one.pid, step=one.step, awaited_s=one.awaited_s, evidence=one.evidence
                )
            )
