"""Arrows from each rank that waited to the one it waited for: in failures, and in the worst step of slow ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from outlast.diagnostics.report.model import Report
from outlast.diagnostics.trace.trace_file import Place, TraceFile

MOST_STORIES = 20
"""Slow ranks and phases whose waits are drawn: each takes as many arrows as the run has ranks."""
WAITER_SHARE = 0.5
"""A rank waited in a step if it was less than this share as late as the culprit."""
MARK_US = 1000
"""Length of the slice to which arrows lead: shorter than what makes a rank a late one."""

Span = tuple[int, int]


@dataclass(slots=True)
class _Story:
    """Where one culprit was, and those that waited for it."""

    name: str
    culprit: int | None = None
    waiters: frozenset[int] | None = None
    """None: whoever says so."""
    there: tuple[Place, Span] | None = None
    here: dict[int, tuple[Place, Span]] = field(default_factory=dict)


class Arrows:
    """Remembers where ranks waited while their slices are written, and draws the arrows in the end.

    Args:
        report: of the run; its stragglers and slow phases are drawn.
    """

    def __init__(self, report: Report) -> None:
        self.left_out = 0
        """Arrows that could not be drawn, because by the nodes' clocks the wait began after the culprit was done."""
        self._steps: dict[int, list[_Story]] = {}
        self._endings: dict[int, _Story] = {}
        late = report.lateness
        columns = {rank: index for index, rank in enumerate(late.ranks)}
        for rank, first, last in _slow(report)[:MOST_STORIES]:
            steps = np.asarray(late.steps)
            here = np.flatnonzero((steps >= first) & (steps <= last))
            mine = np.asarray(late.late_ms[columns[rank]], dtype=np.float64)[here]
            if not np.isfinite(mine).any():
                continue
            worst = int(here[int(np.nanargmax(mine))])
            most_ms = float(np.nanmax(mine))
            waiters = frozenset(
                other
                for other, index in columns.items()
                if other != rank and late.late_ms[index][worst] < WAITER_SHARE * most_ms
            )
            story = _Story(f"waits for rank {rank}", rank, waiters)
            self._steps.setdefault(late.steps[worst], []).append(story)

    def worked(self, step: int, rank: int, place: Place, span: Span, trace: TraceFile) -> None:
        """A rank computed in a step, as the slice that was just written shows. The last execution counts."""
        for story in self._steps.get(step, ()):
            if rank == story.culprit:
                story.there = (place, _mark(trace, place, span))

    def waited(self, step: int, rank: int, place: Place, span: Span) -> None:
        """A rank communicated in a step. The last execution counts."""
        for story in self._steps.get(step, ()):
            if story.waiters is not None and rank in story.waiters:
                story.here[rank] = (place, span)

    def ended(self, number: int, rank: int, place: Place, span: Span, trace: TraceFile, *, is_culprit: bool) -> None:
        """A rank waited, or was the culprit, when a start ended."""
        story = self._endings.setdefault(number, _Story(""))
        if is_culprit:
            story.there = (place, _mark(trace, place, span))
            story.culprit, story.name = rank, f"waits for rank {rank}"
        else:
            story.here[rank] = (place, span)

    def draw(self, trace: TraceFile) -> None:
        """Write all arrows."""
        for story in (*(one for some in self._steps.values() for one in some), *self._endings.values()):
            if story.there is not None:
                self._draw(trace, story.name, story.there, story.here.values())

    def _draw(
        self, trace: TraceFile, name: str, there: tuple[Place, Span], waits: Iterable[tuple[Place, Span]]
    ) -> None:
        place, (until_us, _) = there
        for here, (begin_us, _) in waits:
            if begin_us >= until_us:
                self.left_out += 1
            else:
                trace.arrow(name, (here, begin_us), (place, until_us))


def _mark(trace: TraceFile, place: Place, span: Span) -> Span:
    """A slice at the end of what the culprit did, to which arrows lead.

    Perfetto draws an arrow from the slice that begins first, whatever the arrow says; what a culprit did began before
    anybody waited for it.
    """
    begin_us, end_us = span
    mark = (max(begin_us, end_us - MARK_US), end_us)
    trace.slice(place, "waited for", *mark, "waits")
    return mark


def _slow(report: Report) -> list[tuple[int, int, int]]:
    """Rank, first and last step of what kept others waiting, the most expensive phase first."""
    steps, ranks = report.lateness.steps, set(report.lateness.ranks)
    always = [(row.rank, steps[0], steps[-1]) for row in report.stragglers if row.straggler and steps]
    phases = sorted(report.slow_phases, key=lambda one: -one.cost_s)
    found = [*always, *((one.rank, one.first_step, one.last_step) for one in phases)]
    return [one for one in found if one[0] in ranks]
