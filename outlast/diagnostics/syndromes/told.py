"""A verdict as the event that a launcher writes while the job runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from outlast.diagnostics.syndromes.verdict import Verdict
from outlast.events import Event

State = Literal["began", "ended"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictGiven(Event):
    """What is wrong with the job, with whom, on what evidence, told while it runs. Nobody is killed for it.

    Lines of one verdict have the same ``syndrome``, ``place``, ``ranks``, ``nodes`` and ``role``; it is open until one
    with state ``ended``, or until the ranks are started anew.
    """

    kind: ClassVar[str] = "verdict"
    state: State
    syndrome: str
    """One of :data:`outlast.diagnostics.syndromes.verdict.SYNDROMES`."""
    place: str
    """What is at fault: ``rank``, ``node``, ``link``, ``role`` or ``group``."""
    ranks: tuple[int, ...]
    nodes: tuple[str, ...]
    role: str
    """Of a role or group, its name."""
    words: str
    """The verdict in one line."""
    evidence: str
    ruled_out: tuple[str, ...]
    confidence: str
    """``certain`` or ``likely``."""
    step: int
    """Since when."""
    last_step: int
    """The newest step that was judged."""
    cause: str
    """In words, where something that the node's monitor saw explains it; else empty."""
    is_software: bool
    """Whether the cause would follow the job to another node."""
    cost_s: float
    """Seconds lost in each step."""

    @classmethod
    def of(cls, verdict: Verdict, state: State, newest_step: int) -> Self:
        """The event.

        Args:
            verdict: what is told.
            state: whether it begins to hold, or has ended.
            newest_step: that was judged, or in which it still held.
        """
        since = verdict.step if verdict.step is not None else newest_step
        return cls(
            state=state,
            syndrome=verdict.syndrome,
            place=verdict.culprit.place,
            ranks=verdict.culprit.ranks,
            nodes=verdict.culprit.nodes,
            role=verdict.culprit.role,
            words=str(verdict),
            evidence=verdict.evidence,
            ruled_out=verdict.ruled_out,
            confidence=verdict.confidence,
            step=since,
            last_step=max(since, newest_step),
            cause=verdict.cause,
            is_software=verdict.is_software,
            cost_s=verdict.cost_s or 0.0,
        )
