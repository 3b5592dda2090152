"""Watches a program from inside its own process, without its help: its collectives, its steps, its heartbeat.

A step ends where the program's optimizer has made its update (:meth:`ProgramWatch.on_optimizer_step`, called by torch's
global hook), or where the program says so (:meth:`ProgramWatch.take_steps`). A thread looks at torch's flight recorder
now and then, as :mod:`outlast.diagnostics.live.looks` says: how long collectives were pending, which is how a late rank
is told from its peers without comparing clocks; and whether anything moves. When nothing has moved for ``QUIET_S``, it
copies the newest collectives to the recorder's ring in shared memory, where the launcher finds them although this
process may be stopped or killed by then.
"""

from __future__ import annotations

import bisect
import os
import threading
import time
from collections import deque
from collections.abc import Sequence

from outlast.diagnostics.live.flight import FlightEntry, flight_counts, flight_entries, flight_status
from outlast.diagnostics.live.heartbeat import Heartbeat, Phase
from outlast.diagnostics.live.looks import EVERY_S, LookPlan
from outlast.diagnostics.live.pending_time import PendingTime
from outlast.diagnostics.live.point_to_point import Operation, issued, waiting
from outlast.diagnostics.live.recorder import Collective, Recorder
from outlast.diagnostics.live.step_delays import StepDelays
from outlast.events import EventLog, ProgramStep

SELDOM_S = 0.25
"""Between two looks where it is not looked closely; twice that while steps come, which show by themselves that the
program moves."""
BEAT_S = 0.2
"""Progress between steps is told this often at most."""
QUIET_S = 1.0
"""The ring is filled when nothing has moved for so long,"""
AGAIN_S = 5.0
"""and again each time this has passed, while collectives are pending."""
NEWEST = 256
"""Collectives copied to the ring."""
KEPT_STEPS = 512
_watching: list[ProgramWatch] = []
"""The one of this process, while it looks."""


def watched() -> ProgramWatch | None:
    """What watches this process; None if nothing does, and in a process forked from a watched one."""
    return next((one for one in _watching if one.pid == os.getpid()), None)


class ProgramWatch:
    """Counts a program's steps and collectives until :meth:`close`. It belongs to the process that made it.

    Args:
        heartbeat: shows the launcher that the program moves.
        recorder: takes the newest collectives when nothing moves.
        events: takes one event a step.
        first_step: how many steps the run has taken before.
        every_s: seconds between two looks, in every step; None looks closely at some steps, the same on all ranks.
    """

    def __init__(
        self,
        heartbeat: Heartbeat,
        recorder: Recorder,
        events: EventLog,
        *,
        first_step: int = 0,
        every_s: float | None = None,
    ) -> None:
        self.events = events
        self.delays = StepDelays(events)
        """What keeps this process from its work, from :meth:`start` to :meth:`close`; a program that says where its
        steps end takes them from here."""
        self.pid = os.getpid()
        self.phase: Phase = "program"
        """Of the heartbeat, between steps too; set it with :meth:`begin_phase`."""
        self._plan = LookPlan(every_s)
        self._heartbeat = heartbeat
        self._recorder = recorder
        self._told = False
        self._lock = threading.Lock()
        self._wake = threading.Lock()  # taken but for the moment in which the thread is to wake
        self._wake.acquire(blocking=False)
        self._closed = False
        self._step = first_step
        self._steps: deque[tuple[int, int]] = deque(maxlen=KEPT_STEPS)  # (ns when it ended, step)
        self._leader: int | None = None
        self._step_began_s: float | None = None
        self._pending = PendingTime(time.monotonic())
        self._gap_s = every_s or 0.0  # between two looks; 0: seldom
        self._heartbeat.beat(self.phase, self._step)
        self._looks = _Looks(self._step, time.monotonic())
        self._thread = threading.Thread(target=self._run, name="outlast-watch", daemon=True)

    @property
    def step(self) -> int:
        """Steps taken so far, earlier starts included."""
        return self._step

    @property
    def looks(self) -> int:
        """How often it has looked so far."""
        return self._looks.count

    def start(self) -> None:
        """Begin to look."""
        _watching.append(self)
        self.delays.open()
        self._thread.start()

    def take_steps(self, step: int) -> None:
        """From now on the program says by :meth:`end_step` where its steps end; ``step`` was its last one."""
        with self._lock:
            self._told = True
            self._step, self._step_began_s = step, None
            self._begin_step(time.monotonic())
        self.begin_phase(self.phase)

    def begin_phase(self, phase: Phase) -> None:
        """What the program does from now on, for its heartbeat."""
        with self._lock:
            self.phase = phase
            if not self._closed:
                self._heartbeat.beat(phase, self._step)

    def go_on(self) -> None:
        """A phase is over: the program goes on with whatever it does."""
        self.begin_phase("program")

    def beat(self) -> None:
        """The program says that it makes progress, which is seen without that."""

    def begin_step(self, step: int) -> None:
        """A step begins, which is where the one before has ended."""

    def end_step(self, step: int) -> float | None:
        """A step has ended; returns the seconds of it in which a collective was under way, None if that was not
        measured."""
        with self._lock:
            now_s = time.monotonic()
            pending_s = self._pending.end(now_s, self.delays.collected_s())
            self._step = step
            self._steps.append((round(now_s * 1e9), step))
            if not self._closed:
                self._heartbeat.beat(self.phase, step)
            self._begin_step(now_s)
        return pending_s

    def on_optimizer_step(self, optimizer: object) -> None:
        """An optimizer has made its update; of several, each step of the first one counts.

        In a process forked from the watched one it does nothing.
        """
        if os.getpid() != self.pid:
            return
        with self._lock:
            if self._closed or self._told:
                return
            if self._leader is None:
                self._leader = id(optimizer)
            if id(optimizer) != self._leader:
                return
            now_s = time.monotonic()
            pending_s = self._pending.end(now_s, self.delays.collected_s())
            began_s, self._step_began_s = self._step_began_s, now_s
            self._step += 1
            self._steps.append((round(now_s * 1e9), self._step))
            self._heartbeat.beat(self.phase, self._step)
        step_s = None if began_s is None else now_s - began_s  # nobody knows when the first step of a start began
        spent = self.delays.end_step(self._step, step_s)
        if step_s is not None:
            self.events.write(
                ProgramStep(
                    step=self._step,
                    step_s=step_s,
                    collective_s=pending_s,
                    data_s=min(spent.data_s, step_s),
                    batch_elements=spent.batch_elements,
                )
            )
        with self._lock:
            self._begin_step(now_s)

    def _begin_step(self, now_s: float) -> None:
        """The next step begins; wake the thread if it is to look closely, and does not yet. Call it with the lock."""
        before_s = self._gap_s
        self._gap_s = gap_s = self._plan.gap_s(self._step + 1, self._heartbeat.median_step_s)
        self._pending.begin(now_s, gap_s or SELDOM_S, close=gap_s > 0, collected_s=self.delays.collected_s())
        if gap_s and not before_s:
            self._wake_thread()

    def _wake_thread(self) -> None:
        if self._wake.locked():
            self._wake.release()

    def close(self) -> None:
        """Stop looking; the thread has ended when this returns, or within a moment if it is inside torch."""
        with self._lock:
            self._closed = True
            self._wake_thread()
        if self in _watching:
            _watching.remove(self)
        self.delays.close()
        if self._thread.is_alive() and os.getpid() == self.pid:
            self._thread.join(timeout=1.0)

    def keep_newest(self) -> None:
        """The program ends in the middle, and this watch is closed: leave its newest collectives for the launcher."""
        if os.getpid() != self.pid:
            return
        entries = flight_entries(NEWEST)
        self._recorder.forget()
        self._recorder.count(issued() + sum(count.enqueued for count in flight_counts().values()))
        self._copy(entries)

    def _run(self) -> None:
        looks, woken = self._looks, False
        cpu_s = time.thread_time()
        while True:
            gap_s = self._gap_s
            if looks.copied_s and looks.pending:
                pause_s = EVERY_S  # what was copied is not to be true for longer than it is
            elif gap_s:
                pause_s = self._plan.first_s(gap_s) if woken else gap_s
            else:
                pause_s = 2 * SELDOM_S if looks.stepping else SELDOM_S
            woken = self._wake.acquire(timeout=pause_s)
            if self._closed:
                return
            if not woken:
                self._look()
                before_s, cpu_s = cpu_s, time.thread_time()
                if gap_s:
                    self._plan.spent(cpu_s - before_s)

    def _look(self) -> None:
        looks, now_s = self._looks, time.monotonic()
        looks.stepping, looks.step = looks.step != self._step, self._step
        if looks.stepping and not self._gap_s and not looks.copied_s:
            looks.moved_s = now_s  # nothing else is asked
            return
        looks.count += 1
        read, waits, sent = flight_status(), waiting(), issued()
        now_s = time.monotonic()
        if read != looks.status:
            looks.status, looks.counts = read, flight_counts(read)
            looks.pending = any(count.pending for count in looks.counts.values())
        with self._lock:
            if self._closed:
                return
            self._pending.look(now_s, looks.pending, self.delays.collected_s())
            if (seen := (looks.counts, waits, sent, self._step)) != looks.seen:
                looks.seen, looks.moved_s = seen, now_s
                if now_s - looks.beaten_s >= BEAT_S:
                    looks.beaten_s = now_s
                    self._heartbeat.beat(self.phase, self._step)
                    self._recorder.count(sent + sum(count.enqueued for count in looks.counts.values()))
                if looks.copied_s:
                    self._recorder.forget()
                looks.copied_s = 0.0
        quiet = now_s - looks.moved_s >= QUIET_S
        again = looks.pending and now_s - looks.copied_s >= AGAIN_S
        if (looks.counts or waits) and quiet and (looks.copied_s == 0.0 or again):
            looks.copied_s = now_s
            self._copy_newest()

    def _copy_newest(self) -> None:
        entries = flight_entries(NEWEST)
        with self._lock:
            if not self._closed:
                self._copy(entries)

    def _copy(self, entries: Sequence[FlightEntry]) -> None:
        ends = [end_ns for end_ns, _ in self._steps]
        for entry in entries:
            self._recorder.copy(_collective(entry, self._step_at(entry.entered_ns, ends)))
        for seq, one in enumerate(waiting(), max((entry.record + 1 for entry in entries), default=0)):
            self._recorder.copy(_wait(one, seq, self._step_at(one.began_ns, ends)))

    def _step_at(self, t_ns: int, ends: list[int]) -> int:
        """The step that was under way at a time: the one after the last that had ended."""
        after = bisect.bisect_right(ends, t_ns)
        return self._steps[after - 1][1] + 1 if after else (self._steps[0][1] if self._steps else self._step + 1)


class _Looks:
    """What the thread has seen so far."""

    def __init__(self, step: int, now_s: float) -> None:
        self.count = 0
        self.step = step
        self.stepping = False
        """Whether a step ended between the last two looks."""
        self.status = b""
        self.counts = flight_counts(b"")
        self.pending = False
        self.seen: tuple[object, ...] = ()
        self.moved_s = self.beaten_s = now_s
        self.copied_s = 0.0
        """0: there are no copies, or they are no longer true."""


def _collective(entry: FlightEntry, step: int) -> Collective:
    return Collective(
        seq=entry.record,
        op=entry.op,
        label="",
        nbytes=entry.nbytes,
        step=step,
        entered_s=entry.entered_ns / 1e9,
        completed_s=entry.completed_ns / 1e9 if entry.completed_ns else None,
        group=entry.group,
        group_seq=entry.group_seq,
    )


def _wait(one: Operation, seq: int, step: int) -> Collective:
    return Collective(
        seq=seq,
        op=one.op,
        label="",
        nbytes=one.nbytes,
        step=step,
        entered_s=one.began_ns / 1e9,
        completed_s=None,
        group=one.group,
        group_seq=one.number,
    )
