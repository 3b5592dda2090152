"""Who waits for whom: each pending call waits for the ranks of its group that have not entered it.

Walked back, the waits end at ranks that wait for nobody, at a collective that all have entered and nobody leaves, or
run in a circle.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from outlast.diagnostics.syndromes.flow import Flow, flow_of
from outlast.diagnostics.syndromes.meetings import Meetings, last_seq
from outlast.diagnostics.syndromes.trace import Bools, Ints, Trace


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Wait:
    """One collective, or point-to-point operation, in which ranks wait now."""

    row: int
    """The call of the rank that has waited longest."""
    group: int
    waiters: Ints
    """Ranks that are inside."""
    absent: Ints
    """Ranks that have to enter and have not."""
    entered: int
    """Ranks that have entered, whether they have left or not."""
    waited_s: float
    """The longest time that one has been inside."""
    met_s: float
    """The shortest; where all have entered, about the time since the last one did."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Waits:
    """All that ranks wait in."""

    trace: Trace
    collectives: tuple[Wait, ...]
    between_two: tuple[Wait, ...]
    """Point-to-point operations. The other one is absent if it is not in an operation with the waiter."""
    unheard: Bools
    """[ranks]: whether nothing is heard of their node, so that what is known of them is old."""
    flow: Flow
    """How ranks get from call to call."""

    @property
    def all(self) -> tuple[Wait, ...]:
        return self.collectives + self.between_two

    @cached_property
    def is_waiting(self) -> Bools:
        """[ranks]: whether it is inside any call."""
        found = np.zeros(self.trace.job.world_size, dtype=np.bool_)
        for one in self.all:
            found[one.waiters] = True
        return found & ~self.unheard

    @cached_property
    def is_held(self) -> Bools:
        """[ranks]: whether it is inside a call that is not made in the background."""
        found = np.zeros(self.trace.job.world_size, dtype=np.bool_)
        for one in self.collectives:
            if not self.flow.goes_on[one.row]:
                found[one.waiters] = True
        for one in self.between_two:
            found[one.waiters] = True
        return found & ~self.unheard

    @cached_property
    def awaited_s(self) -> dict[int, tuple[float, Wait]]:
        """By rank that somebody waits for, for how long, and in what."""
        found: dict[int, tuple[float, Wait]] = {}
        for one in self.all:
            for rank in map(int, one.absent):
                if rank not in found or found[rank][0] < one.waited_s:
                    found[rank] = one.waited_s, one
        return found


def waits_of(trace: Trace, meetings: Meetings, *, node_silent_s: float) -> Waits:
    """All that ranks wait in now.

    Args:
        trace: of the job.
        meetings: of the trace.
        node_silent_s: what is known of a node that was not heard of for so long is old; none of its ranks waits.
    """
    job, calls = trace.job, trace.calls
    unheard = trace.clocks.silent_s[job.node_of] > node_silent_s
    current = calls.pending & ~unheard[calls.rank]
    newest = last_seq(trace)
    inside = current[meetings.rows]
    collectives = []
    for meeting in np.unique(meetings.of_row[inside]).tolist():
        rows = meetings.rows_of(meeting)
        pending = rows[current[rows]]
        group, seq = int(meetings.group[meeting]), int(meetings.seq[meeting])
        ranks = job.members[group]
        absent = ranks[newest[job.slot_starts[group] : job.slot_starts[group + 1]] < seq]
        collectives.append(_wait(trace, group, pending, absent, len(ranks) - len(absent)))
    between = np.flatnonzero(current & ~calls.collective)
    pairs = {(int(calls.rank[row]), int(calls.peer[row])) for row in between}
    between_two = []
    for row in between:
        rank, peer = int(calls.rank[row]), int(calls.peer[row])
        known = peer >= 0
        absent = np.asarray([peer] if known and (peer, rank) not in pairs else [], dtype=np.int64)
        if known:
            between_two.append(_wait(trace, int(calls.group[row]), np.asarray([row]), absent, 2 - len(absent)))
    return Waits(
        trace=trace,
        collectives=tuple(collectives),
        between_two=tuple(between_two),
        unheard=unheard,
        flow=flow_of(trace),
    )


def _wait(trace: Trace, group: int, pending: Ints, absent: Ints, entered: int) -> Wait:
    waited = trace.waited_s[pending]
    return Wait(
        row=int(pending[waited.argmax()]),
        group=group,
        waiters=np.sort(trace.calls.rank[pending]),
        absent=absent,
        entered=entered,
        waited_s=float(waited.max()),
        met_s=float(waited.min()),
    )
