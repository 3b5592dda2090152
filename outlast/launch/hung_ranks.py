"""What is done about this node's ranks that make no progress: one line, an event, their stacks, and their end."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from outlast.diagnostics.live import Culprit, Ring
from outlast.diagnostics.live.kept import NEWEST, kept
from outlast.diagnostics.monitor import Accused
from outlast.events import EventLog, HangFound
from outlast.launch.hang_watch import HangWatch
from outlast.launch.processes import RankProcesses, dump_stacks
from outlast.launch.suspicions import Suspicions

HELD_S = 30.0
"""So long, collectives that were read when a rank was found hung are what a failure is told by."""

log = logging.getLogger("outlast.launch")


class HungRanks:
    """Kills the ranks that the watch convicts, one start after another.

    Args:
        watch: of this node's ranks; None if only the end of a process is noticed.
        events: where hangs are written.
    """

    def __init__(self, watch: HangWatch | None, events: EventLog) -> None:
        self._watch = watch
        self._events = events
        self._hung: dict[int, Culprit] = {}
        self._suspicions = Suspicions(events)
        self._waits = ""
        self._kept = False
        self._held: tuple[float, list[Ring]] = (0.0, [])
        self.ended: dict[int, int] = {}
        """By rank, the process that had ended before what had started it was killed."""

    def begin(self, ranks: tuple[int, ...]) -> None:
        """``ranks`` are about to be started."""
        if self._watch is not None:
            self._watch.begin(ranks)
        self._hung = {}
        self._kept, self._held = False, (0.0, [])
        self.ended = {}

    def keep_collectives(self, ranks: Sequence[int]) -> None:
        """Ranks have failed: write the newest collectives of all into the events, once in a start.

        If a rank was found hung just now, these are the ones from before it was killed: its peers lose their
        connections by that, and what they waited in is over.
        """
        if self._watch is None or self._kept:
            return
        self._kept = True
        held_s, rings = self._held
        if not rings or time.monotonic() - held_s > HELD_S:
            rings = self._watch.last_rings(ranks, NEWEST)
        ahead_s = time.time() - time.monotonic()
        for ring in rings:
            if ring.entered:
                self._events.write(kept(ring, ahead_s=ahead_s))

    def keep_held(self, ranks: Sequence[int]) -> None:
        """The ranks are ended because one on another node hung; those that waited for it here may not have failed."""
        if self._held[1] and time.monotonic() - self._held[0] <= HELD_S:
            self.keep_collectives(ranks)

    def look(self, processes: RankProcesses, *, alone: bool, accused: Sequence[Accused] = ()) -> None:
        """Find hung ranks and kill them.

        Args:
            processes: this node's ranks.
            alone: whether there are no other nodes.
            accused: ranks that are at fault as all nodes see it together.
        """
        if self._watch is None:
            return
        found = self._watch.find_hung(processes.running(), alone=alone, accused=accused)
        if (found or accused) and (not self._held[1] or time.monotonic() - self._held[0] > HELD_S):
            self._held = time.monotonic(), self._watch.last_rings(processes.running(), NEWEST)
        for culprit in found:
            self._kill(processes, culprit)
        self._end_wrappers(processes, self._watch)
        if alone:  # else one launcher tells it for all nodes
            self._suspicions.tell(self._watch.suspects)
        self._tell_wait(self._watch.waiting)

    @property
    def evidence(self) -> dict[int, str]:
        """Why each rank was killed that hung in this start."""
        return {rank: culprit.evidence for rank, culprit in self._hung.items()}

    def accused(self, node: int, host: str) -> list[Accused]:
        """The ranks that were killed because they hung, as other nodes are told of them."""
        return [
            Accused(
                rank=one.rank,
                node=node,
                host=host,
                pid=one.pid,
                step=one.step,
                entered=0,
                silent_s=one.silent_s,
                limit_s=one.limit_s,
                evidence=one.evidence,
            )
            for one in self._hung.values()
        ]

    def undying(self, processes: RankProcesses) -> list[int]:
        """Those that run although they were killed: they are in an uninterruptible sleep."""
        return sorted(self._hung.keys() & processes.running().keys()) if self._hung else []

    def waiting_in_collectives(self, processes: RankProcesses) -> list[int]:
        """Running ranks that are inside a collective, and so react to no SIGTERM."""
        observed = self._watch.observe(processes.running()) if self._watch is not None else []
        return [one.rank for one in observed if one.pending]

    def _kill(self, processes: RankProcesses, culprit: Culprit) -> None:
        """Have a hung rank write its stacks, then kill it."""
        if culprit.rank in self._hung:
            return
        self._hung[culprit.rank] = culprit
        dump_stacks(culprit.pid)
        log.error(
            "outlast: rank %d hangs at step %d (silent for %.1f s, limit %.1f s): %s; killing it",
            culprit.rank,
            culprit.step,
            culprit.silent_s,
            culprit.limit_s,
            culprit.evidence,
        )
        self._events.write(
            HangFound(
                culprit=culprit.rank,
                pid=culprit.pid,
                step=culprit.step,
                silent_s=culprit.silent_s,
                limit_s=culprit.limit_s,
                evidence=culprit.evidence,
            )
        )
        processes.kill(culprit.rank)

    def _end_wrappers(self, processes: RankProcesses, watch: HangWatch) -> None:
        """A rank whose process has ended is a crash, even if what had started the process still runs."""
        for rank, pid in watch.ended.items():
            if rank not in self.ended:
                self.ended[rank] = pid
                log.error("outlast: rank %d (pid %d) has ended, but what started it still runs; ending that", rank, pid)
                processes.kill(rank)

    def _tell_wait(self, waiting: str) -> None:
        """One line when the watch begins to wait, and one when progress goes on."""
        blame = waiting.partition(";")[2].partition(";")[0]
        if (blame or waiting) != self._waits:
            self._waits = blame or waiting
            if waiting:
                log.warning("outlast: %s", waiting)
            elif not self._hung:
                log.warning("outlast: the ranks make progress again")
