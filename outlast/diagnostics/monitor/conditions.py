"""From findings of single samples to conditions that begin, last and end, told at changes alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from outlast.diagnostics.monitor.findings import Finding
from outlast.events import Event

BEGIN_HITS = 2
"""A condition begins when it is found in this many of the last ``BEGIN_OF`` samples,"""
BEGIN_OF = 3
END_MISSES = 3
"""and ends when it was not found in this many in a row."""
FIRST_UPDATE_S = 10.0
"""How long a condition has lasted when it is told again; then each time after half as long again,"""
LONGEST_UPDATE_S = 60.0
"""... but at least this often: if the launcher dies, no more than that is not known."""
MOST_TRACKED = 64
MOST_OVER = 16
"""Conditions that have ended and are kept for those who could not be told."""
MOST_ONCE_PER_MINUTE = 10
"""Of one kind, such as lines of the kernel's log; the others are counted."""

State = Literal["began", "lasts", "ended", "once"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCondition(Event):
    """Something on a node began or ended that can make training slow, or went on, or happened once.

    Lines of one condition have the same ``host``, ``what``, ``key`` and ``since_t``; the newest counts.
    """

    kind: ClassVar[str] = "node_condition"
    host: str
    what: str
    """E.g. ``cpu_throttled``, ``busy_neighbour``, ``stopped``."""
    state: State
    words: str
    """A clause whose subject is the node, in the past tense."""
    since_t: float
    """When it began, seconds since the epoch."""
    seconds: float
    """How long it has lasted so far."""
    measured_s: float | None = None
    """Of these, the seconds that were measured, such as those in which a cgroup was held back; None if none can be."""
    value: float = 0.0
    """How much, in the newest sample; the unit is that of the kind of fact."""
    ranks: tuple[int, ...] = ()
    """Ranks that it concerned; empty if all of the node."""
    key: str = ""
    """Tells two of a kind apart."""


@dataclass(slots=True)
class _Tracked:
    finding: Finding
    since_t: float
    last_t: float
    measured_s: float | None
    hits: deque[bool] = field(default_factory=lambda: deque([True], maxlen=BEGIN_OF))
    began: bool = False
    misses: int = 0
    tell_at_s: float = FIRST_UPDATE_S

    def told(self, host: str, state: State) -> NodeCondition:
        return NodeCondition(
            host=host,
            what=self.finding.what,
            state=state,
            words=self.finding.words,
            since_t=self.since_t,
            seconds=self.last_t - self.since_t,
            measured_s=self.measured_s,
            value=self.finding.value,
            ranks=self.finding.ranks,
            key=self.finding.key,
        )


class Conditions:
    """The conditions of one node.

    Args:
        host: the node's name.
    """

    def __init__(self, host: str) -> None:
        self._host = host
        self._tracked: dict[tuple[str, str], _Tracked] = {}
        self._over: deque[NodeCondition] = deque(maxlen=MOST_OVER)
        self._once_t: dict[str, deque[float]] = {}
        self.untold = 0
        """Events that happened once, and of whose kind there were too many in a minute."""

    def look(self, findings: Sequence[Finding], t: float, seconds: float) -> list[NodeCondition]:
        """What changed with the findings of one sample.

        Args:
            findings: of the sample.
            t: its end, seconds since the epoch.
            seconds: its length.
        """
        changes = [one for finding in findings if not finding.lasts for one in self._happened(finding, t)]
        found = {(one.what, one.key): one for one in findings if one.lasts}
        for name, finding in found.items():
            changes += self._hit(name, finding, t, seconds)
        for name in [name for name in self._tracked if name not in found]:
            changes += self._miss(name)
        self._over += (one for one in changes if one.state in ("ended", "once"))
        return changes

    def current(self) -> list[NodeCondition]:
        """What holds now, and what ended last: enough for somebody who has missed changes. Bounded."""
        now = [one.told(self._host, "lasts") for one in self._tracked.values() if one.began]
        return [*self._over, *now]

    def end(self) -> list[NodeCondition]:
        """The monitor ends: so do the conditions that hold, as far as anybody knows."""
        ended = [one.told(self._host, "ended") for one in self._tracked.values() if one.began]
        self._tracked.clear()
        return ended

    def _hit(self, name: tuple[str, str], finding: Finding, t: float, seconds: float) -> list[NodeCondition]:
        one = self._tracked.get(name)
        if one is None:
            if len(self._tracked) >= MOST_TRACKED:
                self.untold += 1
                return []
            one = self._tracked[name] = _Tracked(finding, t - seconds, t, finding.measured_s)
        else:
            ranks = tuple(sorted({*one.finding.ranks, *finding.ranks})) if one.finding.ranks and finding.ranks else ()
            one.finding, one.last_t, one.misses = replace(finding, ranks=ranks), t, 0
            one.hits.append(True)
            if finding.measured_s is not None:
                one.measured_s = (one.measured_s or 0.0) + finding.measured_s
        if not one.began:
            if sum(one.hits) < BEGIN_HITS and not finding.at_once:
                return []
            one.began = True
            return [one.told(self._host, "began")]
        lasted_s = one.last_t - one.since_t
        if lasted_s < one.tell_at_s:
            return []
        one.tell_at_s = lasted_s + min(lasted_s / 2, LONGEST_UPDATE_S)
        return [one.told(self._host, "lasts")]

    def _miss(self, name: tuple[str, str]) -> list[NodeCondition]:
        one = self._tracked[name]
        one.hits.append(False)
        one.misses += 1
        if one.began and one.misses < END_MISSES and not one.finding.at_once:
            return []
        if not one.began and one.misses < BEGIN_OF - 1:
            return []
        del self._tracked[name]
        return [one.told(self._host, "ended")] if one.began else []

    def _happened(self, finding: Finding, t: float) -> list[NodeCondition]:
        recent = self._once_t.setdefault(finding.what, deque(maxlen=MOST_ONCE_PER_MINUTE))
        if len(recent) == MOST_ONCE_PER_MINUTE and t - recent[0] < 60.0:
            self.untold += 1
            return []
        recent.append(t)
        seconds = finding.measured_s or 0.0
        return [
            NodeCondition(
                host=self._host,
                what=finding.what,
                state="once",
                words=finding.words,
                since_t=t - seconds,
                seconds=seconds,
                measured_s=finding.measured_s,
                value=finding.value,
                ranks=finding.ranks,
                key=finding.key,
            )
        ]
