"""A simulated cluster around the real control plane: one thread, one clock, and faults drawn from a seed.

What runs is :class:`ControlNode` and :class:`Leading` as they are, each loop in a thread of its own, of which one at a
time goes on. Simulated are the clock, the network (messages are
lost, late, and out of order; links are cut), the place of the journal (slow, unreachable, writes whose answer is lost,
and reads that are stale, as over NFS), machines that stop and go on in the middle of any of these, and torchelastic
with its ranks.
"""

from __future__ import annotations

import heapq
import random
import threading
from collections.abc import Callable
from itertools import count
from typing import Any

from outlast.launch.control.board import SealedBoard
from outlast.launch.control.journal import Journal
from outlast.launch.control.leading import Leading
from outlast.launch.control.meeting import Meeting
from outlast.launch.control.messages import Report, Wish, from_header, to_header
from outlast.launch.control.node import ControlNode
from outlast.launch.control.records import Formed, Lead, Member, decode
from outlast.launch.control.settings import ControlSettings
from outlast.launch.sealed import Seal

SECRET = b"a secret of sixteen bytes or more"
POLL_S = 0.3
"""torchelastic looks this often."""
TURN_S = 0.25


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
        nodes: how many machines there are.
        least: nodes that the job needs.
        most: nodes that it has if it can.
    """

    def __init__(self, seed: int, *, nodes: int, least: int, most: int) -> None:
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
        self.nodes = [Node(self, f"n{index}") for index in range(nodes)]

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


class Ear:
    def __init__(self, world: World, node: Node, serve: Callable[[Any], None]) -> None:
        self.address = (node.name, world.new_port())
        self.node = node
        self.life = node.life
        self.leading: Leading = serve.__self__  # type: ignore[attr-defined]
        self.closed = False
        world.ears[self.address] = self

    def close(self) -> None:
        self.closed = True


class Line:
    """A connection to whoever leads."""

    def __init__(self, node: Node, ear: Ear, timeout_s: float) -> None:
        self._node, self._ear, self._timeout_s = node, ear, timeout_s
        self._header: dict[str, Any] = {}

    def send(self, header: dict[str, Any]) -> None:
        self._header = header

    def receive(self) -> dict[str, Any]:
        node, ear, world = self._node, self._ear, self._node.world
        rng = world.rng
        if ear.closed or ear.life != ear.node.life:
            raise ConnectionResetError("it was closed")
        trouble = rng.random() < world.trouble
        kind = rng.choice(["lost", "late", "answer lost", "slow"]) if trouble else ""
        if kind == "late":
            world.at(rng.uniform(0.5, 8.0), lambda: self._deliver() and None)
        if kind in ("lost", "late") or not node.reaches(ear.node):
            node.sleep(self._timeout_s)
            raise TimeoutError("no answer")
        node.sleep(rng.uniform(0.5, 1.0) if kind == "slow" else rng.uniform(0.001, 0.05))
        answer = self._deliver()
        if kind == "answer lost" or not node.reaches(ear.node):
            node.sleep(self._timeout_s)
            raise TimeoutError("no answer")
        node.sleep(rng.uniform(0.5, 1.0) if kind == "slow" else rng.uniform(0.001, 0.05))
        if answer is None:
            raise ConnectionResetError("it was closed")
        return answer

    def close(self) -> None:
        pass

    def _deliver(self) -> dict[str, Any] | None:
        ear = self._ear
        if ear.closed or ear.life != ear.node.life or ear.node.is_stopped:
            return None
        message = from_header(dict(self._header))
        assert isinstance(message, Report)
        reply = ear.leading.hear(message)
        return None if reply is None else to_header(reply)


class Place:
    """The journal's place, as one node sees it."""

    place = "simulated"

    def __init__(self, node: Node) -> None:
        self._node = node

    def append(self, number: int, data: bytes) -> None:
        world = self._node.world
        trouble = self._enter()
        if number in world.records:
            if world.records[number][1] == data:
                return
            raise FileExistsError(number)
        world.records[number] = (world.now, data)
        world.say(f"{self._node.name} writes {number}: {data[32:400]!r}")
        if trouble:
            self._node.sleep(world.rng.uniform(0.1, 6.0))
            if world.rng.random() < 0.5:
                raise TimeoutError("the answer to a write was lost")

    def read(self, number: int) -> bytes | None:
        seen_s = self._seen_s()
        found = self._node.world.records.get(number)
        return found[1] if found is not None and found[0] <= seen_s else None

    def show(self, sign: bytes) -> None:
        world = self._node.world
        if self._enter() and world.rng.random() < 0.3:
            raise TimeoutError("no answer")
        world.signs.append((world.now, sign))

    def sign(self) -> bytes | None:
        seen_s = self._seen_s()
        return next((sign for at, sign in reversed(self._node.world.signs) if at <= seen_s), None)

    def _enter(self) -> bool:
        """Reach the place; returns whether there is trouble."""
        node, world = self._node, self._node.world
        if node.name in world.no_board:
            node.sleep(1.0)
            raise TimeoutError("the place does not answer")
        trouble = world.rng.random() < world.trouble
        node.sleep(world.rng.uniform(0.1, 4.0) if trouble else world.rng.uniform(0.001, 0.02))
        return trouble

    def _seen_s(self) -> float:
        """What was written later is not seen."""
        stale = self._enter()
        world = self._node.world
        return world.now - (world.rng.uniform(0.0, world.settings.stale_s) if stale else 0.0)


class Node:
    """A machine with a launcher, torchelastic and ranks; also the launcher's clock, threads and network."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.life = 0
        """Of the launcher; another number is another process."""
        self.alive = False
        self.stopped_until = 0.0
        self.woke = -1e9
        self.control: ControlNode | None = None
        self.leading: Leading | None = None
        self.ranks: tuple[int, int] | None = None
        """Generation and rank that run here."""
        self.stopping = False
        self._ran = -1

    @property
    def is_stopped(self) -> bool:
        return self.world.now < self.stopped_until

    @property
    def ranks_move(self) -> bool:
        """Whether the ranks run. Those of a machine that was stopped, and shall end, may take their time for it."""
        return not self.is_stopped and self.world.now - self.woke > self.world.settings.stop_s + 2 * POLL_S

    def reaches(self, other: Node) -> bool:
        return self is other or (
            frozenset((self.name, other.name)) not in self.world.cut and other.alive and not other.is_stopped
        )

    def boot(self) -> None:
        """Start the launcher."""
        self.life += 1
        self.alive, self._ran, self.ranks, self.stopping, self.leading = True, -1, None, False, None
        member = Member(node=f"{self.name}/boot", agent=f"{self.name}.{self.life}", address=self.name)
        board = SealedBoard(Place(self), SECRET, "job")
        meeting = Meeting(secret=SECRET, board=board, means=self)
        self.control = ControlNode(meeting, member, self.world.settings, order=self.name)
        self.control.ask_place(store_port=1)
        self.world.say(f"{self.name} starts")
        Loop(self, 0.1 * self.world.rng.random(), self._step)
        Loop(self, POLL_S, self._poll)

    def crash(self) -> None:
        """The machine is gone, and all that ran there."""
        self.world.say(f"{self.name} dies")
        self.life += 1
        self.alive, self.control, self.ranks, self.leading = False, None, None, None

    def stop(self, for_s: float) -> None:
        """The machine stands still for a while."""
        self.world.say(f"{self.name} stands still for {for_s:.1f} s")
        self.stopped_until = max(self.stopped_until, self.world.now + for_s)
        until = self.stopped_until
        self.world.at(until - self.world.now, self._wake)

    def now_s(self) -> float:
        return self.world.now

    def spawn(self, work: Callable[[], None], name: str) -> Callable[[float], None]:
        if name == "outlast-lead":
            self.leading = work.__self__  # type: ignore[attr-defined]
            Loop(self, 0.01, lambda leading=self.leading: self._turn(leading))  # type: ignore[misc]
        return lambda within_s: None

    def dial(self, address: tuple[str, int], secret: bytes, timeout_s: float) -> Line:
        ear = self.world.ears.get(address)
        assert ear is not None
        assert secret == SECRET
        if not self.reaches(ear.node):
            self.sleep(timeout_s)
            raise TimeoutError("no answer")
        if ear.closed or ear.life != ear.node.life:
            raise ConnectionRefusedError("nobody listens")
        return Line(self, ear, timeout_s)

    def listen(self, address: tuple[str, int], secret: bytes, serve: Callable[[Any], None], timeout_s: float) -> Ear:
        return Ear(self.world, self, serve)

    def sleep(self, for_s: float) -> None:
        """Time passes in the middle of this node's code; it may die of it, or stand still."""
        assert Loop.current is not None
        Loop.current.sleep(for_s)

    def _wake(self) -> None:
        if not self.is_stopped:
            self.woke = self.world.now

    def _step(self) -> float:
        assert self.control is not None
        return self.control.step()

    def _turn(self, leading: Leading) -> float | None:
        if leading.lost:
            return None
        leading.turn()
        return TURN_S

    def _poll(self) -> float:
        """torchelastic looks at its ranks, and at the rendezvous."""
        control, world = self.control, self.world
        assert control is not None
        if self.stopping:
            return POLL_S
        if self.ranks is None:
            reply = control.assignment(0.0)
            if reply is not None:
                members = world.generations().get(reply.generation)
                if members is None or members[reply.rank].agent != control.member.agent:
                    raise Violation(f"{self.name} takes rank {reply.rank} of {reply.generation}, which is not its own")
                if reply.generation <= self._ran:
                    raise Violation(f"{self.name} obeys generation {reply.generation} after {self._ran}")
                self._ran = reply.generation
                self.ranks = reply.generation, reply.rank
                world.say(f"{self.name} runs as {self.ranks}")
        elif control.why_stop() or self._ranks_fail():
            self.stopping = True
            life = self.life
            world.at(world.rng.uniform(0.0, 0.8 * world.settings.stop_s), lambda: self._stopped(life))
        return POLL_S

    def _ranks_fail(self) -> bool:
        """Ranks notice that a peer is gone; not always, and not at once."""
        assert self.ranks is not None
        members = self.world.generations()[self.ranks[0]]
        there = sum(node.ranks is not None and node.ranks[0] == self.ranks[0] for node in self.world.nodes)
        return there < len(members) and self.world.rng.random() < 0.1

    def _stopped(self, life: int) -> None:
        if life != self.life or self.control is None:
            return
        if self.is_stopped:
            self.world.at(self.stopped_until - self.world.now + 0.01, lambda: self._stopped(life))
            return
        self.world.say(f"{self.name} has ended its ranks of {self.ranks}")
        self.ranks, self.stopping = None, False
        self.control.ask_place(store_port=1, reason="its ranks have ended")


def faults(world: World, for_s: float) -> None:
    """Let things go wrong for a while; then all is well again, but for machines that died for good."""
    rng = world.rng
    end = world.now + for_s
    world.trouble = rng.choice([0.0, 0.02, 0.1, 0.3])
    while world.now < end:
        world.run(rng.expovariate(0.3))
        node, other = rng.sample(world.nodes, 2)
        kind = rng.choice(["crash", "crash", "stop", "stop", "cut", "alone", "no board", "trouble", "ranks", "word"])
        if kind == "crash" and node.alive:
            node.crash()
            world.at(rng.uniform(0.5, 20.0), node.boot)
        elif kind == "stop" and node.alive:
            node.stop(rng.choice([rng.uniform(0.1, 3.0), rng.uniform(3.0, 25.0)]))
        elif kind == "cut":
            pair = frozenset((node.name, other.name))
            world.say(f"{node.name} - {other.name} is cut")
            world.cut.add(pair)
            world.at(rng.uniform(1.0, 25.0), lambda pair=pair: world.cut.discard(pair))  # type: ignore[misc]
        elif kind in ("alone", "no board"):
            group = rng.sample(world.nodes, rng.randint(1, len(world.nodes) - 1))
            _part(world, group, rng.uniform(1.0, 30.0), board=kind == "no board" or rng.random() < 0.5)
        elif kind == "trouble":
            world.trouble = rng.choice([0.0, 0.05, 0.3])
        elif kind == "ranks" and node.ranks is not None and not node.stopping:
            node.stopping = True
            life = node.life
            world.at(0.1, lambda node=node, life=life: node._stopped(life))  # type: ignore[misc]
        elif kind == "word":
            leading = next((one.leading for one in world.nodes if one.leading is not None), None)
            if leading is not None:
                action = rng.choice(["evict", "readmit", "readmit"])
                leading.wish(Wish(action=action, node=node.name, by_person=rng.random() < 0.5))
    world.cut.clear()
    world.no_board.clear()
    world.trouble = 0.0
    world.run(26.0)
    world.say("all is well")


def _part(world: World, group: list[Node], for_s: float, *, board: bool) -> None:
    inside = {node.name for node in group}
    pairs = {frozenset((a, b.name)) for a in inside for b in world.nodes if b.name not in inside}
    world.say(f"{sorted(inside)} are cut off, the journal too: {board}")
    world.cut |= pairs
    world.no_board |= inside if board else set()

    def heal() -> None:
        world.cut -= pairs
        world.no_board -= inside

    world.at(for_s, heal)


def settle(world: World, for_s: float) -> None:
    """Readmit whoever was evicted, give the job time, and check that all that live have a place in it."""
    world.run(for_s / 2)
    for node in world.nodes:
        leading = node.leading
        if leading is not None and not leading.lost:
            for name in world.log().evicted:
                leading.wish(Wish(action="readmit", node=name, by_person=True))
    world.run(for_s / 2)
    journal = world.log()
    formed = journal.running
    if formed is None:
        raise Violation(f"no generation runs: {journal.over}, {journal.done}; {_states(world)}")
    members = {one.agent for one in formed.members}
    fit = [node for node in world.nodes if node.alive and f"{node.name}/boot" not in journal.evicted]
    for node in fit:
        assert node.control is not None
        inside = node.control.member.agent in members
        runs = node.ranks is not None and node.ranks[0] == formed.generation
        if inside != runs:
            raise Violation(f"{node.name} is {'' if inside else 'not '}in {formed.generation}: {_states(world)}")
    wanted = min(world.settings.most, len(fit))
    if len(formed.members) != wanted:
        raise Violation(f"{len(formed.members)} nodes run, {len(fit)} are fit: {_states(world)}")


def _states(world: World) -> str:
    return ", ".join(
        f"{node.name}: {'alive' if node.alive else 'dead'} {node.ranks} "
        f"{node.control.newest if node.control is not None else ''}"
        for node in world.nodes
    )
