"""What a node's monitor has seen beside the collectives, as facts that explain a verdict or overturn it.

A fact says what was so, where, from when to when, and how much of it. It accuses nobody: a rank that is late is found
from its collectives, and a fact of the same time names the cause.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

FactKind = Literal[
    "garbage_collection",
    "data_wait",
    "checkpoint",
    "evaluation",
    "compile",
    "swap",
    "uneven_work",
    "busy_neighbour",
    "cpu_throttled",
    "memory_pressure",
    "io_pressure",
    "disk_slow",
    "gil_held",
    "thermal",
    "ecc_errors",
    "network_errors",
    "oom_kill",
    "kernel_log",
    "not_finite",
]
FACT_KINDS: tuple[FactKind, ...] = get_args(FactKind)

UNITS: Mapping[FactKind, str] = {
    "garbage_collection": "s in collections",
    "data_wait": "s waiting for data",
    "checkpoint": "s held by a checkpoint",
    "evaluation": "s of evaluation",
    "compile": "s of compiling",
    "swap": "bytes swapped in",
    "uneven_work": "x the median rank's work",
    "busy_neighbour": "cores used by other processes",
    "cpu_throttled": "of the time throttled by its cgroup",
    "memory_pressure": "of the time stalled for memory",
    "io_pressure": "of the time stalled for storage",
    "disk_slow": "s a write",
    "gil_held": "s without the interpreter lock",
    "thermal": "of full clock speed",
    "ecc_errors": "memory errors",
    "network_errors": "packets sent again or lost",
    "oom_kill": "processes killed by the kernel for memory",
    "kernel_log": "lines of the kernel's log",
    "not_finite": "values that are not finite",
}
"""What :attr:`Fact.value` counts."""

NAMES: Mapping[FactKind, str] = {
    "garbage_collection": "garbage collection",
    "data_wait": "data loading",
    "checkpoint": "a checkpoint",
    "evaluation": "evaluation",
    "compile": "compilation",
    "swap": "swapping",
    "uneven_work": "uneven work",
    "busy_neighbour": "another process on its cores",
    "cpu_throttled": "a throttled cgroup",
    "memory_pressure": "memory pressure",
    "io_pressure": "slow storage",
    "disk_slow": "a slow disk",
    "gil_held": "a held interpreter lock",
    "thermal": "a processor that is throttled for heat",
    "ecc_errors": "memory errors",
    "network_errors": "network errors",
    "oom_kill": "the kernel's OOM killer",
    "kernel_log": "the kernel's log",
    "not_finite": "values that are not finite",
}

SOFTWARE: frozenset[FactKind] = frozenset(
    (
        *("garbage_collection", "data_wait", "checkpoint", "evaluation", "compile", "swap", "uneven_work"),
        *("busy_neighbour", "cpu_throttled", "memory_pressure", "io_pressure", "gil_held"),
    )
)
"""Causes that would follow the job to another node, or leave with whoever shares this one: the node is not broken."""


TOLD_BY_RANKS: frozenset[FactKind] = frozenset(
    ("garbage_collection", "data_wait", "checkpoint", "evaluation", "compile", "uneven_work")
)
"""What a rank tells of itself, step by step; the others are seen by the node's monitor, which looks now and then."""


def overlap_s(begin_s: float, end_s: float, *, since_s: float, until_s: float) -> float:
    """Seconds that the time from begin to end has in common with another one."""
    return max(0.0, min(end_s, until_s) - max(begin_s, since_s))


def held_s(begin_s: float, end_s: float, measured_s: float | None, *, since_s: float, until_s: float) -> float:
    """Seconds, of the time from one moment until another, in which something held: measured, where that can be.

    Args:
        begin_s: when it began.
        end_s: when it ended.
        measured_s: in how many seconds between these it held ranks back; None if that is not known.
        since_s: of the time in question.
        until_s: its end.
    """
    both_s, length_s = overlap_s(begin_s, end_s, since_s=since_s, until_s=until_s), end_s - begin_s
    if measured_s is None or length_s <= 0:
        return both_s
    return both_s / length_s * measured_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One thing that was so on one node, or for one rank of it, for a while."""

    kind: FactKind
    node: str
    """As in :attr:`outlast.diagnostics.syndromes.trace.Job.nodes`."""
    rank: int | None = None
    """None: for the whole node."""
    begin_s: float
    """When it began, CLOCK_MONOTONIC seconds of the node."""
    end_s: float
    """When it ended, or when it was last seen."""
    value: float
    """How much, in the unit that :data:`UNITS` gives."""
    lost_s: float | None = None
    """Seconds for which it kept the rank from working, where that is measured: a collection's duration, the time
    throttled. None where only its presence is known."""
    detail: str = ""
    """In words, what a reader needs to act on it: a process's name and pid, a device, the kernel's line."""

    @property
    def is_software(self) -> bool:
        """Whether another node would not help."""
        return self.kind in SOFTWARE

    def overlap_s(self, since_s: float, until_s: float) -> float:
        """Seconds of the time between these moments in which it was so."""
        return overlap_s(self.begin_s, self.end_s, since_s=since_s, until_s=until_s)

    def held_s(self, since_s: float, until_s: float) -> float:
        """... and of these, those in which it kept ranks from working, as far as that is known."""
        return held_s(self.begin_s, self.end_s, self.lost_s, since_s=since_s, until_s=until_s)

    def words(self) -> str:
        """``garbage collection: 2.1 s in collections, 1.9 s lost (generation 2)``."""
        lost = "" if self.lost_s is None else f", {self.lost_s:.3g} s lost"
        detail = f" ({self.detail})" if self.detail else ""
        return f"{NAMES[self.kind]}: {self.value:.3g} {UNITS[self.kind]}{lost}{detail}"


def overlapping(
    facts: Iterable[Fact], *, node: str, rank: int | None, begin_s: float, end_s: float
) -> tuple[Fact, ...]:
    """The facts of a node at some time, those of one rank or of the whole node, the one that cost most first.

    Args:
        facts: to choose from.
        node: whose.
        rank: whose, beside those of the whole node; None for those of the node alone.
        begin_s: of the time in question, on the node's clock.
        end_s: its end.
    """
    found = [
        one
        for one in facts
        if one.node == node and one.rank in (None, rank) and one.begin_s <= end_s and begin_s <= one.end_s
    ]
    return tuple(sorted(found, key=lambda one: (-(one.lost_s or 0.0), FACT_KINDS.index(one.kind), one.begin_s)))
