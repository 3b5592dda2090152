"""Time, and the state of all that the nodes of a simulated cluster share. See :mod:`.simulated_node`."""

from __future__ import annotations

import heapq
import random
import threading
from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING

from outlast.launch.control.journal import Journal
from outlast.launch.control.records import Formed, Lead, Member, decode
from outlast.launch.control.settings import ControlSettings
from outlast.launch.sealed import Seal

if TYPE_CHECKING:
    from .simulated_node import Ear, Node

SECRET = b"a secret of sixteen bytes or more"


class Violation(AssertionError):
    """What must never be, was."""


class Gone(BaseException):
    """The process in whose code this is raised has died."""


def quick(least: int, most: int) -> ControlSettings:
    """Settings with which an hour of faults is over in a minute."""
    return ControlSettings(
        least=least,
        most=most,
        last_call_s=2.0,
        silent_s=3.0,
        redial_s=1.0,
        start_s=5.0,
        stop_s=4.0,
        lead_s=3.0,
        lead_broken_s=2.1,
        cut_off_s=6.0,
        stale_s=5.0,
        grow_after_s=8.0,
        evictions_per_hour=1000,
    )


class World:
    """The cluster.

    Args:
        seed: of all that happens.
        least: nodes that the job needs.
        most: nodes that it has if it can.
    """

    def __init__(self, seed: int, *, least: int, most: int) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.settings = quick(least, most)
        self.records: dict[int, tuple[float, bytes]] = {}
        self.signs: list[tuple[float, bytes]] = []
        self.ears: dict[tuple[str, int], Ear] = {}
        self.cut: set[frozenset[str]] = set()
        self.no_board: set[str] = set()
        self.trouble = 0.0
        """How likely it is that a message, or a look at the journal, goes wrong."""
        self.history: list[str] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = count()
        self.loops: list[Loop] = []
        self._read = 0
        self._members: dict[int, tuple[Member, ...]] = {}
        self._ports = count(1000)
        self.nodes: list[Node] = []

    def at(self, delay_s: float, event: Callable[[], None]) -> None:
        """Have something happen after a while."""
        heapq.heappush(self._events, (self.now + delay_s, next(self._count), event))

    def run(self, for_s: float) -> None:
        """Let time go on."""
        until = self.now + for_s
        while self._events and self._events[0][0] <= until:
            at, _, event = heapq.heappop(self._events)
            self.now = max(self.now, at)
            event()
            self.check()
        self.now = max(self.now, until)

    def new_port(self) -> int:
        return next(self._ports)

    def say(self, text: str) -> None:
        self.history.append(f"{self.now:8.2f} {text}")

    def log(self) -> Journal:
        """All that stands in the journal, each record checked against those before it."""
        journal, seal = Journal(), Seal(SECRET, "outlast control\0job")
        for number in range(1, len(self.records) + 1):
            opened = seal.open(self.records[number][1])
            assert opened is not None
            record = decode(opened)
            if not isinstance(record, Lead) and record.epoch != journal.epoch:
                raise Violation(f"record {number} is of epoch {record.epoch}, and {journal.epoch} had begun")
            if isinstance(record, Formed) and record.generation != journal.next_generation:
                raise Violation(f"record {number} forms generation {record.generation} a second time")
            journal.take(number, record)
        return journal

    def generations(self) -> dict[int, tuple[Member, ...]]:
        """The members of each generation that stands in the journal."""
        for number in range(self._read + 1, len(self.records) + 1):
            record = decode(Seal(SECRET, "outlast control\0job").open(self.records[number][1]) or b"")
            if isinstance(record, Formed):
                self._members[record.generation] = record.members
            self._read = number
        return self._members

    def check(self) -> None:
        """Never two generations, all of whose ranks run."""
        running: dict[int, int] = {}
        for node in self.nodes:
            if node.ranks is not None and node.ranks_move:
                running[node.ranks[0]] = running.get(node.ranks[0], 0) + 1
        if len(running) < 2:
            return
        size = {generation: len(members) for generation, members in self.generations().items()}
        whole = [one for one, ranks in running.items() if ranks == size[one]]
        if len(whole) > 1:
            raise Violation(f"generations {whole} run at once")

    def close(self) -> None:
        """End all that still waits in the middle of something."""
        for node in self.nodes:
            node.life += 1
        for loop in self.loops:
            loop.go_on()


class Loop:
    """Code of a node that takes time: it goes on where it was once that time is over."""

    current: Loop | None = None

    def __init__(self, node: Node, delay_s: float, what: Callable[[], float | None]) -> None:
        self._node, self._life, self._what = node, node.life, what
        self._mine, self._others = threading.Semaphore(0), threading.Semaphore(0)
        self._ended = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        node.world.loops.append(self)
        node.world.at(delay_s, self.go_on)

    def go_on(self) -> None:
        """Run until it waits again. Called by whoever lets time go on."""
        if self._ended:
            return
        node = self._node
        if node.is_stopped and node.life == self._life:
            node.world.at(node.stopped_until - node.world.now + 0.001, self.go_on)
            return
        before, Loop.current = Loop.current, self
        self._mine.release()
        assert self._others.acquire(timeout=60.0), "a loop does not come back"
        Loop.current = before

    def sleep(self, for_s: float) -> None:
        """Wait, in the middle of the loop's code."""
        self._node.world.at(for_s, self.go_on)
        self._others.release()
        self._mine.acquire()
        if self._node.life != self._life:
            raise Gone

    def _run(self) -> None:
        self._mine.acquire()
        try:
            while self._node.life == self._life:
                pause_s = self._what()
                if pause_s is None:
                    break
                self.sleep(pause_s)
        except Gone:
            pass
        finally:
            self._ended = True
            self._others.release()
