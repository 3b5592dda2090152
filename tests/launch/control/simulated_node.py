"""A simulated cluster around the real control plane: one clock, and faults drawn from a seed.

What runs is :class:`ControlNode` and :class:`Leading` as they are, each loop in a thread of its own, of which one at a
time goes on. Simulated are the clock, the network (messages are lost, late, and out of order; links are cut), the place
of the journal (slow, unreachable, writes whose answer is lost, and reads that are stale, as over NFS), machines that
stop and go on in the middle of any of these, and torchelastic with its ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from outlast.launch.control.board import SealedBoard
from outlast.launch.control.leading import Leading
from outlast.launch.control.meeting import Meeting
from outlast.launch.control.messages import Report, from_header, to_header
from outlast.launch.control.node import ControlNode
from outlast.launch.control.records import Member

from .simulated_world import SECRET, Loop, Violation, World

POLL_S = 0.3
"""torchelastic looks this often."""
TURN_S = 0.25


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


def cluster(seed: int, *, nodes: int, least: int, most: int) -> World:
    """So many machines, none of them started yet."""
    world = World(seed, least=least, most=most)
    world.nodes = [Node(world, f"n{index}") for index in range(nodes)]
    return world
