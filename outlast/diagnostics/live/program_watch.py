"""Watches a program from inside its own process, without its help: its collectives, its steps, its heartbeat.

A step ends where the program's optimizer has made its update (:meth:`ProgramWatch.on_optimizer_step`, called by torch's
global hook), or where the program says so (:meth:`ProgramWatch.take_steps`). A thread looks at torch's flight recorder
now and then: how long collectives were pending, which is how a late rank is told from its peers without
comparing clocks; and whether anything moves. When nothing has moved for ``QUIET_S``, it copies the newest collectives
to the recorder's ring in shared memory, where the launcher finds them although this process may be stopped or killed
by then.
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
from outlast.diagnostics.live.point_to_point import Operation, issued, waiting
from outlast.diagnostics.live.recorder import Collective, Recorder
from outlast.diagnostics.live.step_delays import StepDelays
from outlast.events import EventLog, ProgramStep

EVERY_S = 0.01
"""Between two looks, unless another time is asked for; each takes about 50 µs, most of them to wake the thread."""
SLEPT_S = 0.1
"""A pause of up to this is slept through when the watch is closed."""
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
        every_s: seconds between two looks. How late a rank is, is known to half of that in each collective.
    """

    def __init__(
        self,
        heartbeat: Heartbeat,
        recorder: Recorder,
        events: EventLog,
        *,
        first_step: int = 0,
        every_s: float = EVERY_S,
    ) -> None:
        self.events = events
        self.delays = StepDelays(events)
        """What keeps this process from its work, from :meth:`start` to :meth:`close`; a program that says where its
        steps end takes them from here."""
        self.pid = os.getpid()
        self.phase: Phase = "program"
        """Of the heartbeat, between steps too; set it with :meth:`begin_phase`."""
        self._every_s = every_s
        self._heartbeat = heartbeat
        self._recorder = recorder
        self._told = False
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._step = first_step
        self._steps: deque[tuple[int, int]] = deque(maxlen=KEPT_STEPS)  # (ns when it ended, step)
        self._leader: int | None = None
        self._step_began_s: float | None = None
        self._pending_s = 0.0
        self._heartbeat.beat(self.phase, self._step)
        self._thread = threading.Thread(target=self._run, name="outlast-watch", daemon=True)

    @property
    def step(self) -> int:
        """Steps taken so far, earlier starts included."""
        return self._step

    def start(self) -> None:
        """Begin to look."""
        _watching.append(self)
        self.delays.open()
        self._thread.start()

    def take_steps(self, step: int) -> None:
        """From now on the program says by :meth:`end_step` where its steps end; ``step`` was its last one."""
        with self._lock:
            self._told = True
            self._step, self._step_began_s, self._pending_s = step, None, 0.0
        self.begin_phase(self.phase)

    def begin_phase(self, phase: Phase) -> None:
        """What the program does from now on, for its heartbeat."""
        with self._lock:
            self.phase = phase
            if not self._stop.is_set():
                self._heartbeat.beat(phase, self._step)

    def go_on(self) -> None:
        """A phase is over: the program goes on with whatever it does."""
        self.begin_phase("program")

    def beat(self) -> None:
        """The program says that it makes progress, which is seen without that."""

    def begin_step(self, step: int) -> None:
        """A step begins, which is where the one before has ended."""

    def end_step(self, step: int) -> float:
        """A step has ended; returns the seconds of it in which a collective was under way."""
        with self._lock:
            pending_s, self._pending_s = self._pending_s, 0.0
            self._step = step
            self._steps.append((time.monotonic_ns(), step))
            if not self._stop.is_set():
                self._heartbeat.beat(self.phase, step)
        return pending_s

    def on_optimizer_step(self, optimizer: object) -> None:
        """An optimizer has made its update; of several, each step of the first one counts.

        In a process forked from the watched one it does nothing.
        """
        if os.getpid() != self.pid:
            return
        with self._lock:
            if self._stop.is_set() or self._told:
                return
            if self._leader is None:
                self._leader = id(optimizer)
            if id(optimizer) != self._leader:
                return
            now_s = time.monotonic()
            began_s, pending_s = self._step_began_s, self._pending_s
            self._step += 1
            self._step_began_s, self._pending_s = now_s, 0.0
            self._steps.append((round(now_s * 1e9), self._step))
            self._heartbeat.beat(self.phase, self._step)
        step_s = None if began_s is None else now_s - began_s  # nobody knows when the first step of a start began
        spent = self.delays.end_step(self._step, step_s)
        if step_s is not None:
            self.events.write(
                ProgramStep(
                    step=self._step,
                    step_s=step_s,
                    collective_s=min(pending_s, step_s),
                    data_s=min(spent.data_s, step_s),
                    batch_elements=spent.batch_elements,
                )
            )

    def close(self) -> None:
        """Stop looking; the thread has ended when this returns, or within a moment if it is inside torch."""
        with self._lock:
            self._stop.set()
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
        before: tuple[object, ...] = ()
        status, counts, pending, was_pending = b"", flight_counts(b""), False, False
        looked_s = moved_s = beaten_s = time.monotonic()
        collected_s = self.delays.collected_s()
        copied_s = 0.0  # 0: there are no copies, or they are no longer true
        while not self._paused():
            read, waits, sent = flight_status(), waiting(), issued()
            now_s = time.monotonic()
            if read != status:
                status, counts = read, flight_counts(read)
                pending = any(count.pending for count in counts.values())
            with self._lock:
                if self._stop.is_set():
                    return
                gap_s, before_s, collected_s = now_s - looked_s, collected_s, self.delays.collected_s()
                if was_pending != pending:
                    # nobody knows when it changed: half of the time is right on average; not in a pause for garbage
                    # collection, in which this thread does not run, and the program enters nothing
                    gap_s = max(gap_s - (collected_s - before_s), 0.0) / 2
                self._pending_s += gap_s if was_pending or pending else 0.0
                if (now := (counts, waits, sent, self._step)) != before:
                    before = now
                    moved_s = now_s
                    if now_s - beaten_s >= BEAT_S:
                        beaten_s = now_s
                        self._heartbeat.beat(self.phase, self._step)
                        self._recorder.count(sent + sum(count.enqueued for count in counts.values()))
                    if copied_s:
                        self._recorder.forget()
                    copied_s = 0.0
            looked_s, was_pending = now_s, pending
            quiet = now_s - moved_s >= QUIET_S
            if (counts or waits) and quiet and (copied_s == 0.0 or (pending and now_s - copied_s >= AGAIN_S)):
                copied_s = now_s
                self._copy_newest()

    def _paused(self) -> bool:
        """Whether to end, after the time between two looks."""
        if self._every_s > SLEPT_S:
            return self._stop.wait(self._every_s)
        time.sleep(self._every_s)  # with the fewest wake-ups, at a third less than a wait that can be cut short
        return self._stop.is_set()

    def _copy_newest(self) -> None:
        entries = flight_entries(NEWEST)
        with self._lock:
            if not self._stop.is_set():
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
