"""A verdict as the event that a launcher writes while the job runs, and its story, as people read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from outlast.diagnostics.syndromes.verdict import Verdict
from outlast.events import Event

State = Literal["began", "lasts", "ended"]
NOTHING_DONE = "nothing: nobody is ended for being slow"


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictGiven(Event):
    """What is wrong with the job, with whom, on what evidence, told while it runs. Nobody is killed for it.

    Lines of one verdict have the same ``syndrome``, ``place``, ``ranks``, ``nodes`` and ``role``; it is open until one
    with state ``ended``, or until the ranks are started anew. The newest line counts.
    """

    kind: ClassVar[str] = "verdict"
    state: State
    """``lasts``: more is known of it than when it began, such as its cause."""
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
    """In words, where something that the rank told, or that the node's monitor saw, explains it; else empty."""
    cause_confidence: str = ""
    """``likely`` if what it took was measured, and is as much as was lost; ``weak`` if it was merely so at the same
    time. Empty without a cause."""
    is_software: bool
    """Whether the cause would follow the job to another node."""
    cost_s: float
    """Seconds lost in each step."""
    tried: str = ""
    """What a probe of the node or link said before it was told; or why there was none."""
    done: str = NOTHING_DONE
    """What was done about it."""

    @classmethod
    def of(cls, verdict: Verdict, state: State, newest_step: int) -> Self:
        """The event.

        Args:
            verdict: what is told.
            state: whether it begins to hold, goes on, or has ended.
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
            cause_confidence=verdict.cause_confidence or "",
            is_software=verdict.is_software,
            cost_s=verdict.cost_s or 0.0,
            tried=verdict.tried,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """What stands behind a verdict, for people."""

    verdict: str
    """In one line."""
    ruled_out: tuple[str, ...]
    cause: str
    """With how sure it is; empty if none is known."""
    tried: str
    done: str

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """From the fields of a ``verdict`` event, of whichever version: what it lacks stays empty."""
        cause = str(fields.get("cause") or "")
        if cause:
            measured = fields.get("cause_confidence") != "weak"
            how = "likely: it was measured" if measured else "weak: it was so at the same time"
            whose = ", software" if fields.get("is_software") else ""
            cause = f"{cause} ({how}{whose})"
        ruled_out = fields.get("ruled_out")
        return cls(
            verdict=str(fields.get("words") or ""),
            ruled_out=tuple(map(str, ruled_out)) if isinstance(ruled_out, (list, tuple)) else (),
            cause=cause,
            tried=str(fields.get("tried") or ""),
            done=str(fields.get("done") or ""),
        )

    def lines(self) -> tuple[str, ...]:
        """What was ruled out, the cause, what a probe said, and what was done: a line each, as far as it is known."""
        parts = (
            ("ruled out", "; ".join(self.ruled_out)),
            ("cause", self.cause),
            ("tried out", self.tried),
            ("done", self.done),
        )
        return tuple(f"{name}: {words}" for name, words in parts if words)
