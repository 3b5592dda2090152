"""Goodput by cause: each second of a run's wall time belongs to exactly one of :data:`CAUSES`.

One computation serves the report, which gives it a run's whole history, and the metrics of a run that goes on. Events
are taken in the order of their time. Each one that ends something, a step for example, moves a cursor, and the time
that the cursor passes is divided among causes. So no part is negative, and the parts add up to the wall time, whatever
the events say.

Steps and evaluations are told by the lead, which is the lowest rank of a start; its peers take the same steps. All wait
for a rank that waits for data or is held by a checkpoint, so in each step the longest wait of any rank counts.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from outlast.diagnostics.report.load import COLUMNS, Loaded
from outlast.events import Record

CAUSES = ("useful", "redone", "restart", "hang", "checkpoint", "evaluation", "data", "startup")
"""What wall time goes to.

``useful``: steps that had not been done before, without their waits for data and checkpoints. ``redone``: steps that
are done again because what they did was lost. ``restart``: from the last progress before a failure until the first step
after it, without the hang. ``hang``: a rank made no progress, until that was found. ``checkpoint``: training was held
by one. ``evaluation``; ``data``: waiting for it. ``startup``: from a launch to its first step, and from its last step
to its end.
"""
SAME_START_S = 60.0
"""Nodes that start their ranks within this time of each other belong to the same start."""
STEPS = ("step", "program_step")
"""Kinds of events that are steps."""


@dataclass(slots=True)
class _Start:
    """One start of the ranks."""

    began_t: float
    generation: int
    hosts: set[str]
    cause: str
    """What its time belongs to until its first step is done: ``startup`` or ``restart``."""
    where: tuple[int, int] | None = None
    """(attempt, generation); None until a rank has told of it."""
    lead: int | None = None
    last_step: int | None = None
    """The last step that the lead has done in it."""
    over: str = ""
    """What time belongs to after its end: ``startup`` or ``restart``; empty while it goes on."""


@dataclass(slots=True)
class _Step:
    """A step that the lead has done, and whose peers may still tell of it."""

    t: float
    step: int
    redone: bool


class Goodput:
    """Divides a run's wall time among causes, event by event.

    Args:
        steps_done: the last step that was done before the first event that will be taken.
    """

    def __init__(self, *, steps_done: int = 0) -> None:
        self.seconds = dict.fromkeys(CAUSES, 0.0)
        """By cause. Each value only grows."""
        self.began_t: float | None = None
        """When the first event came, seconds since the epoch."""
        self.paused_s = 0.0
        """Time between launches by hand, which is no wall time of the run."""
        self._furthest_step = steps_done
        self._cursor_t = 0.0
        self._last_t = 0.0
        self._saved_t = -math.inf
        self._start: _Start | None = None
        self._done: _Step | None = None
        self._waits_s: dict[int, tuple[float, float]] = {}  # by step: the longest for data, and for a checkpoint

    def take(self, attempt: int, record: Record) -> None:
        """Take the next event; attempt 0 is for a launcher's.

        Events that are older than the cursor move nothing.
        """
        t, kind, get = record.t, record.kind, record.fields.get
        if self.began_t is None:
            self.began_t = self._cursor_t = self._last_t = t
        if kind in ("workers_started", "run_started"):
            self._begin(attempt, record)
        start = self._start
        if start is None:
            start = self._start = _Start(began_t=t, generation=record.generation, hosts=set(), cause="startup")
        if kind == "checkpoint_saved":
            self._saved_t = max(self._saved_t, t)
        elif kind in STEPS:
            leads = self._leads(start, attempt, record)
            if start.where == (attempt, record.generation):
                self._note_waits(record)
            if leads:
                self._step(start, record)
        elif kind == "eval" and self._leads(start, attempt, record):
            self._spend(t, evaluation=_seconds(get("seconds")))
        elif kind == "hang_found":
            start.over = "restart"
            self._spend(t, hang=_seconds(get("silent_s")))
        elif kind == "workers_failed":
            start.over = "restart"
            self._spend(t)
        elif kind == "run_ended" and start.where in (None, (attempt, record.generation)):
            self._end(start, record)
        self._last_t = max(self._last_t, t)

    def finish(self, until_t: float = -math.inf) -> None:
        """Divide what is left up to the newest event, or to a later ``until_t``. More events may come later."""
        self._last_t = max(self._last_t, until_t)
        if self._start is not None and not self._start.over and self._saved_t > self._cursor_t:
            self._spend(min(self._saved_t, self._last_t), checkpoint=math.inf)
        self._spend(self._last_t)

    @property
    def wall_s(self) -> float:
        """From the first to the newest event that was divided, without pauses between launches by hand."""
        return 0.0 if self.began_t is None else self._cursor_t - self.began_t - self.paused_s

    def _spend(self, until_t: float, **parts_s: float) -> None:
        """Divide the step that is done, then what comes after it."""
        done, self._done = self._done, None
        if done is not None:
            data_s, checkpoint_s = self._waits_s.get(done.step, (0.0, 0.0))
            self._waits_s = {step: waits_s for step, waits_s in self._waits_s.items() if step > done.step}
            if done.redone:
                self._move(done.t, redone=math.inf)
            else:
                self._move(done.t, data=data_s, checkpoint=checkpoint_s, useful=math.inf)
        self._move(until_t, **parts_s)

    def _move(self, until_t: float, **parts_s: float) -> None:
        """Move the cursor to ``until_t``: to each cause what it says, while there is time left; the rest to what goes
        on."""
        left_s = until_t - self._cursor_t
        if left_s <= 0:
            return
        self._cursor_t = until_t
        for cause, wanted_s in parts_s.items():
            part_s = min(max(wanted_s, 0.0), left_s)
            self.seconds[cause] += part_s
            left_s -= part_s
        self.seconds[self._going_on()] += left_s

    def _going_on(self) -> str:
        start = self._start
        if start is None:
            return "startup"
        if start.over:
            return start.over
        if start.last_step is None:
            return start.cause
        return "useful" if start.last_step >= self._furthest_step else "redone"

    def _begin(self, attempt: int, record: Record) -> None:
        """A start by the launcher, or the word of a rank that it has begun."""
        start, t = self._start, record.t
        host = str(record.fields.get("host", ""))
        if record.kind == "workers_started":
            same = (
                start is not None
                and not start.over
                and start.generation == record.generation
                and host not in start.hosts
                and t - start.began_t <= SAME_START_S
            )
        else:
            where = (attempt, record.generation)
            same = start is not None and start.where in (None, where) and not start.over
            if not same and start is not None and start.where is not None and where <= start.where:
                return  # of a start that is over
        if same and start is not None:
            start.hosts.add(host)
        else:
            by_hand = record.generation == 0
            if by_hand and start is not None:
                self.finish()
                self.paused_s += max(0.0, t - self._cursor_t)
                self._cursor_t = max(self._cursor_t, t)
            elif start is not None:
                start.over = "restart"  # what it did since its last progress is lost
            self._spend(t)
            cause = "startup" if by_hand or start is None else "restart"
            start = self._start = _Start(began_t=t, generation=record.generation, hosts={host}, cause=cause)
            self._waits_s.clear()
        if record.kind == "run_started":
            assert start is not None
            start.where = (attempt, record.generation)
            start.lead = record.rank if start.lead is None else min(start.lead, record.rank)
            self._spend(t)

    def _leads(self, start: _Start, attempt: int, record: Record) -> bool:
        """Whether the event is of this start, and of the rank that tells of it."""
        if start.where is None:  # its beginning is not told, as where an event was lost
            start.where, start.lead = (attempt, record.generation), record.rank
        return start.where == (attempt, record.generation) and record.rank == start.lead

    def _note_waits(self, record: Record) -> None:
        step, get = int(record.fields["step"]), record.fields.get
        data_s, checkpoint_s = self._waits_s.get(step, (0.0, 0.0))
        self._waits_s[step] = (max(data_s, _seconds(get("data_s"))), max(checkpoint_s, _seconds(get("checkpoint_s"))))

    def _step(self, start: _Start, record: Record) -> None:
        step = int(record.fields["step"])
        # What came before its first step is no part of that; between steps there is nothing.
        self._spend(record.t - _seconds(record.fields.get("step_s")) if start.last_step is None else -math.inf)
        start.last_step = step
        self._done = _Step(record.t, step, redone=step <= self._furthest_step)
        self._furthest_step = max(self._furthest_step, step)

    def _end(self, start: _Start, record: Record) -> None:
        """A rank has ended; after success, the last save was waited for, and the lead tells of it."""
        if record.fields.get("ok"):
            if start.lead not in (None, record.rank):
                return
            if not start.over:
                start.over = "startup"
            if self._saved_t > self._cursor_t:
                self._spend(min(self._saved_t, record.t), checkpoint=math.inf)
        else:
            start.over = "restart"
        self._spend(record.t)


def _seconds(value: Any) -> float:
    """A finite number of seconds, or 0 where an event has none."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0.0


def goodput_of(loaded: Loaded) -> Goodput:
    """That of a whole run."""
    goodput = Goodput()
    for attempt, record in heapq.merge(loaded.others, _leads_steps(loaded), key=lambda told: told[1].t):
        goodput.take(attempt, record)
    goodput.finish(max((end_t for _, end_t in loaded.spans.values()), default=-math.inf))
    return goodput


def _leads_steps(loaded: Loaded) -> Iterator[tuple[int, Record]]:
    """The steps of each start's lead, oldest first, with the longest waits of any rank."""
    rows = loaded.rows
    if not len(rows):
        return
    leads: dict[tuple[int, int], int] = {}
    for attempt, record in loaded.others:
        if record.kind == "run_started":
            where = (attempt, record.generation)
            leads[where] = min(record.rank, leads.get(where, record.rank))
    kept = np.zeros(len(rows), dtype=np.bool_)
    at = {name: COLUMNS.index(name) for name in ("t", "step", "step_s", "data_s", "checkpoint_s")}
    rows = rows.copy()
    for attempt, generation in np.unique(rows[:, :2], axis=0):
        here = (rows[:, 0] == attempt) & (rows[:, 1] == generation)
        lead = leads.get((int(attempt), int(generation)), int(rows[here, 2].min()))
        kept |= here & (rows[:, 2] == lead)
        steps, number = np.unique(rows[here, at["step"]], return_inverse=True)
        for column in (at["data_s"], at["checkpoint_s"]):
            longest = np.zeros(len(steps))
            np.maximum.at(longest, number.reshape(-1), np.nan_to_num(rows[here, column]))
            rows[here, column] = longest[number.reshape(-1)]
    rows = rows[kept]
    for row in rows[np.argsort(rows[:, at["t"]], kind="stable")]:
        fields: dict[str, Any] = {name: float(row[column]) for name, column in at.items() if name != "t"}
        t, rank, generation = float(row[at["t"]]), int(row[2]), int(row[1])
        yield int(row[0]), Record(t=t, rank=rank, generation=generation, kind="step", fields=fields)
