"""One rank's events as slices: its steps with their parts, evaluations and restores, and how its starts ended."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from outlast.diagnostics.report.endings import Ending
from outlast.diagnostics.trace.arrows import Arrows
from outlast.diagnostics.trace.places import RUN, Places
from outlast.diagnostics.trace.trace_file import Place, TraceFile
from outlast.events import CheckpointRestored, CheckpointSaved, EvalDone, ProgramStep, Record, RunStarted, StepDone

UNKNOWN_HOST = "unknown"
COMPUTE = "forward and backward"
PARTS = (("data", "data_s"), (COMPUTE, ""), ("communication", "comm_s"), ("checkpoint", "checkpoint_s"))
"""The parts of a step in the order of a training loop, by the field that has their time; the one without a field takes
what the others leave. Their lengths were measured, where they lie in the step follows from the order."""


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Times of day as microseconds of the trace."""

    zero_t: float
    """Seconds since the epoch."""
    ahead_s: Mapping[str, float]
    """By host, how far its clock is ahead."""

    def us(self, t: float, host: str) -> int:
        return max(0, round((t - self.zero_t - self.ahead_s.get(host, 0.0)) * 1e6))


class RankStory:
    """Writes one rank's slices, in the order of time.

    Args:
        trace: where they go.
        places: the threads.
        clock: turns times of day into those of the trace.
        rank: whose events these are.
        endings: of the run, oldest first.
        arrows: is told where waiting ranks and culprits were.
        counted: whether the run's counters follow this rank.
    """

    def __init__(
        self,
        trace: TraceFile,
        places: Places,
        clock: Clock,
        rank: int,
        endings: Iterable[Ending],
        arrows: Arrows,
        *,
        counted: bool,
    ) -> None:
        self.host = UNKNOWN_HOST
        self.moved = 0
        """Slices that stand later than their events say, because the clock was set back in between."""
        self._trace = trace
        self._places = places
        self._clock = clock
        self._rank = rank
        self._arrows = arrows
        self._counted = counted
        self._end_us = 0
        self._left = [
            (number, one)
            for number, one in enumerate(endings)
            if rank == one.culprit or rank in one.failed or rank in one.collectives
        ]

    def begin(self, records: list[Record]) -> None:
        """Events of a start whose host may come later: those up to its first step."""
        for record in records:
            if record.kind == RunStarted.kind:
                self.host = str(record.fields.get("host", UNKNOWN_HOST))
                break
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        """The next event.

        Raises:
            KeyError, TypeError, ValueError: it lacks a value, or has one that is no number.
        """
        while self._left and self._clock.us(self._left[0][1].t, "") < self._clock.us(record.t, self.host):
            self._finish(*self._left.pop(0))
        if record.kind == StepDone.kind:
            self._step(record)
        elif record.kind == ProgramStep.kind:
            self._program_step(record)
        elif record.kind == RunStarted.kind:
            self.host = str(record.fields.get("host", UNKNOWN_HOST))
        elif record.kind == EvalDone.kind:
            self._slice(
                "evaluation", record, float(record["seconds"]), {"loss": record["loss"], "step": record["step"]}
            )
        elif record.kind == CheckpointRestored.kind:
            self._slice(f"restore of step {record['step']}", record, float(record["seconds"]), {"url": record["url"]})
        elif record.kind == CheckpointSaved.kind:
            self._saved(record)

    def close(self) -> None:
        """There are no more events of this rank."""
        while self._left:
            self._finish(*self._left.pop(0))

    @property
    def _thread(self) -> Place:
        return self._places.rank(self.host, self._rank)

    def _range(self, t: float, length_s: float) -> tuple[int, int]:
        """Begin and end of what ended at a time: not before what came before it has ended."""
        end_us = self._clock.us(t, self.host)
        length_us = max(1, round(length_s * 1e6))
        begin_us = max(self._end_us, end_us - length_us)
        if begin_us + length_us - end_us > 1_000_000:
            self.moved += 1
        return begin_us, begin_us + length_us

    def _slice(self, name: str, record: Record, length_s: float, args: Mapping[str, Any]) -> tuple[int, int]:
        begin_us, end_us = self._range(record.t, length_s)
        self._trace.slice(self._thread, name, begin_us, end_us, record.kind, args)
        self._end_us = end_us
        return begin_us, end_us

    def _step(self, record: Record) -> None:
        step, step_s = int(record["step"]), float(record["step_s"])
        args = {"loss": record.fields.get("loss"), "collective_s": record["collective_s"]}
        begin_us, end_us = self._slice(f"step {step}", record, step_s, args)
        told_us = {name: round(float(record[field]) * 1e6) if field else 0 for name, field in PARTS}
        told_us[COMPUTE] = max(0, end_us - begin_us - sum(told_us.values()))
        at_us = begin_us
        for name, length_us in told_us.items():
            until_us = min(end_us, at_us + max(0, length_us))
            if until_us > at_us:
                self._trace.slice(self._thread, name, at_us, until_us, "part")
                if name == COMPUTE:
                    self._arrows.worked(step, self._rank, self._thread, (at_us, until_us), self._trace)
                elif name == "communication":
                    self._arrows.waited(step, self._rank, self._thread, (at_us, until_us))
            at_us = until_us
        if self._counted:
            self._trace.counter(RUN.pid, "step time (s)", begin_us, step_s)
            if (loss := record.fields.get("loss")) is not None and math.isfinite(loss):
                self._trace.counter(RUN.pid, "loss", end_us, float(loss))

    def _program_step(self, record: Record) -> None:
        step, step_s = int(record["step"]), float(record["step_s"])
        whole = self._slice(f"step {step}", record, step_s, {"collective_s": record["collective_s"]})
        self._arrows.worked(step, self._rank, self._thread, whole, self._trace)
        self._arrows.waited(step, self._rank, self._thread, whole)
        if self._counted:
            self._trace.counter(RUN.pid, "step time (s)", whole[0], step_s)

    def _saved(self, record: Record) -> None:
        end_us = self._clock.us(record.t, self.host)
        begin_us = max(0, end_us - max(1, round(float(record["durable_s"]) * 1e6)))
        end_us = max(end_us, begin_us + 1)
        place = self._places.lane(self.host, self._rank, "checkpoints", begin_us, end_us)
        tier = record.fields.get("tier", "storage")
        args = {"bytes": record.fields.get("size_bytes"), "blocked_s": record.fields.get("blocked_s")}
        self._trace.slice(place, f"checkpoint of step {record['step']} to {tier}", begin_us, end_us, record.kind, args)

    def _finish(self, number: int, ending: Ending) -> None:
        """This rank's last collectives before the failure, and what it did when it came: waited, hung or failed."""
        at_us = max(self._clock.us(ending.t, ""), self._end_us + 1)
        for one in ending.collectives.get(self._rank, ()):
            begin_us = self._clock.us(one.entered_s, self.host)
            end_us = at_us if one.completed_s is None else self._clock.us(one.completed_s, self.host)
            end_us = max(end_us, begin_us + 1)
            place = self._places.lane(self.host, self._rank, "collectives", begin_us, end_us)
            args = {"group": one.group, "label": one.label, "bytes": one.nbytes, "step": one.step, "seq": one.seq}
            shown = f"{one.op} #{one.number}" + (", not completed" if one.completed_s is None else "")
            self._trace.slice(place, shown, begin_us, end_us, "collective", args)
        pending = ending.waiting().get(self._rank)
        if self._rank == ending.culprit:
            begin_us = self._end_us
            if ending.hung_for_s is not None:
                begin_us = max(begin_us, at_us - round(ending.hung_for_s * 1e6))
            name, why = "hung" if ending.hung_for_s is not None else "failed", ending.why
        elif pending is not None:
            begin_us = max(self._end_us, self._clock.us(pending.entered_s, self.host))
            name, why = f"waits in {pending.op} #{pending.number}", ending.failed.get(self._rank, "")
        else:
            return
        begin_us = min(begin_us, at_us - 1)
        self._trace.slice(self._thread, name, begin_us, at_us, "failure", {"why": why})
        self._end_us = at_us
        self._arrows.ended(
            number, self._rank, self._thread, (begin_us, at_us), self._trace, is_culprit=name in ("hung", "failed")
        )
