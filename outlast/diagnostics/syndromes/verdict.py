"""What a syndrome's judgement says: which kind of trouble, whose, on what evidence, how sure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Syndrome = Literal[
    "crash",
    "numerical",
    "desynchronised",
    "non_communication_hang",
    "communication_hang",
    "non_communication_slow",
    "communication_slow",
]
SYNDROMES: tuple[Syndrome, ...] = get_args(Syndrome)
"""The worst first."""

Place = Literal["rank", "node", "link", "role", "group"]
Confidence = Literal["certain", "likely", "weak"]

NAMES: Mapping[Syndrome, str] = {
    "crash": "crash",
    "numerical": "numerical",
    "desynchronised": "desynchronised",
    "non_communication_hang": "hang outside communication",
    "communication_hang": "hang inside communication",
    "non_communication_slow": "slow outside communication",
    "communication_slow": "slow communication",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Culprit:
    """Who is at fault."""

    place: Place
    ranks: tuple[int, ...] = ()
    """The rank; of a node, role or group, its ranks; of a link, the ranks at its ends where they are known."""
    nodes: tuple[str, ...] = ()
    """The node of the rank, or the node; of a link from where to where."""
    role: str = ""
    """Of a role, its name; of a group, that of the process group."""

    @property
    def key(self) -> tuple[str, ...]:
        """What stays the same while the same one is at fault."""
        if self.place == "rank":
            return self.place, *map(str, self.ranks)
        return (self.place, self.role) if self.place in ("role", "group") else (self.place, *self.nodes)

    def __str__(self) -> str:
        if self.place == "rank":
            ranks = named(self.ranks)
            return f"rank{'s' if len(self.ranks) > 1 else ''} {ranks}{_on(self.nodes)}"
        if self.place == "node":
            return f"node {self.nodes[0]}"
        if self.place == "link":
            return f"the link from {self.nodes[0]} to {self.nodes[1]}"
        if self.place == "role":
            return f"role {self.role} (ranks {named(self.ranks)})"
        return f"the connections of group {self.role} (ranks {named(self.ranks)})"


def _on(nodes: Sequence[str]) -> str:
    return f" on {', '.join(nodes)}" if nodes else ""


def named(ranks: Sequence[int], most: int = 6) -> str:
    """``3``, ``0 to 7``, ``1, 4 and 9``, ``0, 2, 5 and 40 more``."""
    if len(ranks) > 2 and tuple(ranks) == tuple(range(ranks[0], ranks[0] + len(ranks))):
        return f"{ranks[0]} to {ranks[-1]}"
    if len(ranks) > most:
        return f"{', '.join(map(str, ranks[: most // 2]))} and {len(ranks) - most // 2} more"
    head, tail = ranks[:-1], ranks[-1:]
    return " and ".join([*([", ".join(map(str, head))] if head else []), *map(str, tail)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One judgement. It says nothing of what is to be done."""

    syndrome: Syndrome
    culprit: Culprit
    evidence: str
    """What was seen, with the values."""
    ruled_out: tuple[str, ...] = ()
    """What else it might have been, and why it is not."""
    confidence: Confidence
    """``certain``: what was recorded admits nothing else. ``likely``: it is the simplest explanation, and others were
    ruled out. ``weak``: others explain it as well; never a reason to end or leave anything."""
    step: int | None = None
    """The step in which it began."""
    cause: str = ""
    """The cause in words, where a fact of the same time explains it."""
    cause_confidence: Confidence | None = None
    """``likely`` if what it took was measured, and is as much as was lost; ``weak`` if it was merely so at the same
    time. None without a cause."""
    is_software: bool = False
    """Whether the cause would follow the job to another node."""
    cost_s: float | None = None
    """Of a hang, seconds since it began; of slowness, seconds a step."""
    tried: str = ""
    """What a probe of the node or link said before it was told; empty if there was none."""

    @property
    def key(self) -> tuple[str, ...]:
        """The same while the same one is at fault for the same."""
        return self.syndrome, *self.culprit.key

    def __str__(self) -> str:
        """One line: syndrome, culprit, cause, evidence."""
        step = "" if self.step is None else f" since step {self.step}"
        why = "perhaps because of" if self.cause_confidence == "weak" else "because of"
        cause = f", {why} {self.cause}" if self.cause else ""
        weak = " (weak evidence)" if self.confidence == "weak" else ""
        return f"{NAMES[self.syndrome]}: {self.culprit}{step}{cause}: {self.evidence}{weak}"

    def as_json(self) -> dict[str, Any]:
        """Of numbers, texts and lists, for an event or a connection."""
        return {
            "syndrome": self.syndrome,
            "place": self.culprit.place,
            "ranks": list(self.culprit.ranks),
            "nodes": list(self.culprit.nodes),
            "role": self.culprit.role,
            "evidence": self.evidence,
            "ruled_out": list(self.ruled_out),
            "confidence": self.confidence,
            "step": self.step,
            "cause": self.cause,
            "cause_confidence": self.cause_confidence,
            "is_software": self.is_software,
            "cost_s": self.cost_s,
            "tried": self.tried,
        }
