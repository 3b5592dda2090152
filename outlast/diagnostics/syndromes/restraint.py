"""What keeps a verdict from becoming an injustice: state machines without clocks. Each call returns the next state.

A verdict is believed if it comes again (:class:`Debounce`), from a watcher that was awake (:class:`Watcher`), about a
node that the fault stays with (:class:`History`); and what is done about it has a budget (:class:`Budget`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from outlast.diagnostics.syndromes.verdict import Syndrome, Verdict

SAME_STEP = 2
"""A fault that comes back in the same step after so many restarts is the job's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Debounce:
    """A verdict counts once it was given in ``needed`` of the newest ``among`` looks.

    What is certain counts at once; what is weak never does.
    """

    needed: int = 2
    among: int = 3
    looks: tuple[frozenset[tuple[str, ...]], ...] = ()
    """The keys of what was said, look by look, the newest last."""

    def look(self, verdicts: Sequence[Verdict]) -> tuple[Debounce, tuple[Verdict, ...]]:
        """The state after another look, and which of its verdicts count."""
        firm = [one for one in verdicts if one.confidence != "weak"]
        looks = (*self.looks, frozenset(one.key for one in firm))[-self.among :]
        counted = tuple(
            one for one in firm if one.confidence == "certain" or sum(one.key in said for said in looks) >= self.needed
        )
        return replace(self, looks=looks), counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Watcher:
    """How long the watch itself did not run: it was stopped, or its machine suspended, paused or overloaded.

    Whoever is watched had no chance to move then, or nobody looked, so that time is no silence.
    """

    interval_s: float
    """Between two ticks, when all is well."""
    last_s: float
    """The newest tick."""
    slack_s: float = 1.0
    """A tick that is late by less is only slow."""
    lost: tuple[tuple[float, float], ...] = ()
    """End and length of each gap, seconds."""

    def tick(self, now_s: float) -> Watcher:
        """The watch runs now. Without a gap of more than ``slack_s`` nothing is excused."""
        late_s = now_s - self.last_s - self.interval_s
        if late_s > self.slack_s:
            return replace(self, last_s=now_s, lost=(*self.lost, (now_s, late_s)))
        return replace(self, last_s=now_s)

    def lost_s(self, since_s: float) -> float:
        """Seconds since a moment in which the watch did not run."""
        return sum(min(lost_s, end_s - since_s) for end_s, lost_s in self.lost if end_s > since_s)

    @property
    def is_back(self) -> bool:
        """Whether the newest tick ended a gap, so that what is seen now is what was so before it: judge nobody."""
        return bool(self.lost) and self.lost[-1][0] == self.last_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Accusation:
    """That a node was held to be at fault."""

    syndrome: Syndrome
    node: str
    ranks: tuple[int, ...]
    step: int | None
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """Who was accused in earlier generations of the job."""

    accused: tuple[Accusation, ...] = ()
    most: int = 64
    """Kept, the newest."""

    def add(self, verdict: Verdict, generation: int) -> History:
        """With another verdict that was acted upon. One that names no single node leaves nothing."""
        if len(verdict.culprit.nodes) != 1:
            return self
        one = Accusation(
            syndrome=verdict.syndrome,
            node=verdict.culprit.nodes[0],
            ranks=verdict.culprit.ranks,
            step=verdict.step,
            generation=generation,
        )
        return replace(self, accused=(*self.accused, one)[-self.most :])

    def follows_job(self, verdict: Verdict, generation: int) -> str:
        """Why a fault goes with the job and not with the node; empty if it does not.

        It does if the same ranks were accused of the same on another node before; if three nodes were; or if it comes
        back in the same step after every restart.
        """
        if verdict.is_software and verdict.cause:
            return f"{verdict.cause} would go with the job to another node"
        if len(verdict.culprit.nodes) != 1:
            return ""
        node = verdict.culprit.nodes[0]
        earlier = [one for one in self.accused if one.syndrome == verdict.syndrome and one.generation < generation]
        elsewhere = [one for one in earlier if one.node != node]
        for one in elsewhere:
            if one.ranks == verdict.culprit.ranks:
                return f"the same ranks had the same fault on {one.node} in generation {one.generation}"
        nodes = sorted({one.node for one in elsewhere})
        if len(nodes) >= 2:
            return f"{', '.join(nodes)} had the same fault before {node}: three nodes are not broken alike"
        again = [one for one in earlier if one.step is not None and one.step == verdict.step]
        if len({one.generation for one in again}) >= SAME_STEP:
            return f"it comes back in step {verdict.step} after every restart"
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How many nodes may be given up."""

    evictions_per_hour: int = 2
    least_nodes: int = 1
    """Nodes that have to remain."""
    shadow: bool = True
    """Say what would be done, and do nothing."""
    evicted_s: tuple[float, ...] = ()
    """When nodes were given up."""

    def refuses(self, now_s: float, healthy_nodes: int) -> str:
        """Why no node may be given up now; empty if one may."""
        if self.shadow:
            return "shadow mode: nothing is done"
        recent = [one for one in self.evicted_s if now_s - one < 3600.0]
        if len(recent) >= self.evictions_per_hour:
            return f"{len(recent)} nodes were given up within an hour, and {self.evictions_per_hour} may be"
        if healthy_nodes - 1 < self.least_nodes:
            return f"{healthy_nodes} nodes are healthy, and {self.least_nodes} have to remain"
        return ""

    def spend(self, now_s: float) -> Budget:
        """A node is given up now."""
        return replace(self, evicted_s=(*self.evicted_s, now_s)[-64:])
