"""What a launcher does while it leads: it listens to the others, writes what is decided, and shows that it lives."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from outlast.launch.control.election import GONE
from outlast.launch.control.journal import Journal
from outlast.launch.control.leader import Leader
from outlast.launch.control.meeting import Line, Meeting
from outlast.launch.control.messages import Reply, Report, Wish, from_header, to_header
from outlast.launch.control.records import BadRecord, Done, Evicted, Formed, Lead, Member, Over, Readmitted, Record
from outlast.launch.control.settings import ControlSettings

log = logging.getLogger("outlast.launch")

TICK_S = 0.05
"""Between two looks at what is to be decided."""
READ_S = 2.0
"""Between two looks at whether another one leads."""
WISH_S = 20.0
"""Within this time a wish is granted, or refused."""


class Leading:
    """One time of leading. It listens from the start, and leads from :meth:`begin` until it is :attr:`lost` or closed.

    Args:
        meeting: where the job's launchers meet.
        member: this launcher.
        settings: how long it waits for what.
        journal: shared with its node, and changed under ``lock`` alone.
        lock: of both.
        wake: set when there is news for this node itself.

    Raises:
        CheckpointError: the address cannot be listened on.
    """

    def __init__(
        self,
        meeting: Meeting,
        member: Member,
        settings: ControlSettings,
        journal: Journal,
        lock: threading.RLock,
        wake: threading.Event,
    ) -> None:
        assert meeting.board is not None
        self.lost = False
        """Whether another one leads."""
        self._board = meeting.board
        self._settings = settings
        self._journal = journal
        self._lock = lock
        self._wake = wake
        self._leader: Leader | None = None
        self._epoch = 0
        self._closed = threading.Event()
        self._hurry = threading.Event()
        self._wishes: queue.SimpleQueue[tuple[Wish, queue.SimpleQueue[str]]] = queue.SimpleQueue()
        port = meeting.fixed[1] if meeting.fixed is not None else 0
        where = member.address, port
        self._means = meeting.means
        self._now_s = meeting.means.now_s
        self._listener = meeting.means.listen(where, meeting.secret, self._serve, settings.silent_s)
        self._join: Callable[[float], None] | None = None
        self._signed_s = self._read_s = -1e9
        self._signs = 0

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._listener.address[1]

    def begin(self, *, gone: str, gone_s: float) -> None:
        """Lead; the journal has this launcher's record as its newest."""
        self._leader = Leader(self._settings, self._journal, self._now_s(), gone=gone, gone_s=gone_s)
        self._epoch = self._journal.epoch
        self._join = self._means.spawn(self._lead, "outlast-lead")

    def hear(self, report: Report) -> Reply | None:
        """Take a launcher's report, and answer it; None if this one cannot know whether it still leads."""
        with self._lock:
            leader, now_s = self._leader, self._now_s()
            if leader is None or self.lost or not leader.may_answer(now_s):
                return None
            leader.hear(report, now_s)
            reply = leader.answer(report.member)
        self._hurry.set()
        return reply

    def broke(self, agent: str) -> None:
        """A launcher's connection has broken."""
        with self._lock:
            if self._leader is not None:
                self._leader.broke(agent, self._now_s())

    def wish(self, wish: Wish) -> queue.SimpleQueue[str]:
        """Have a wish granted, or refused; the answer, in words, comes within :data:`WISH_S` if at all."""
        answer: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._wishes.put((wish, answer))
        self._hurry.set()
        return answer

    def hand_over(self, within_s: float) -> None:
        """Stay until the others have left or the time is over; then let another one lead."""
        deadline_s = self._now_s() + within_s
        while self._now_s() < deadline_s and not self.lost:
            with self._lock:
                assert self._leader is not None
                if self._leader.all_left(self._now_s()):
                    break
            time.sleep(TICK_S)
        # What was decided last must have been written, and heard: the others ask several times a second.
        with self._lock:
            running = self._journal.running
        if running is not None:
            time.sleep(4 * TICK_S)
        self._closed.set()
        self._hurry.set()
        if self._join is not None:
            self._join(within_s)
        try:
            with self._lock:
                assert self._leader is not None
                record, number = self._leader.hand_over(time.time()), self._journal.number + 1
            if record is not None and not self.lost:
                self._board.append(number, record)
            if not self.lost:
                self._board.show(GONE)
        except OSError as error:
            log.warning("outlast: the lead could not be handed over, so the others wait for it: %s", error)

    def close(self) -> None:
        """Stop, without a word."""
        self._closed.set()
        self._hurry.set()
        self._listener.close()

    def _lead(self) -> None:
        while not self._closed.is_set() and not self.lost:
            if not self.turn():
                self._closed.wait(1.0)
            self._hurry.wait(TICK_S)
            self._hurry.clear()
        self._wake.set()

    def turn(self) -> bool:
        """Show a sign of life, look whether another one leads, and write what is to be decided, as far as each is due.

        Returns:
            Whether the journal's place answered.
        """
        now_s = self._now_s()
        try:
            if now_s - self._signed_s >= self._settings.sign_s:
                self._signs += 1
                self._board.show(f"{self._epoch} {self._signs}".encode())
                self._signed_s = now_s
                with self._lock:
                    assert self._leader is not None
                    self._leader.board_answered(now_s)
            if now_s - self._read_s >= READ_S:
                self._read_on()
                self._read_s = now_s
            if not self.lost:
                self._decide()
                self._grant()
        except OSError as error:
            log.warning("outlast: the journal in %s cannot be written: %s", self._board.place, error)
            return False
        except BadRecord as error:
            log.error("outlast: this launcher does not lead any more: %s", error)
            self.lost = True
        return True

    def _decide(self) -> None:
        while not self.lost:
            with self._lock:
                assert self._leader is not None
                record = self._leader.decide(self._now_s(), time.time())
            if record is None:
                return
            self._write(record)

    def _write(self, record: Record) -> bool:
        """Write the next record; False if another one stands there."""
        number = self._journal.number + 1
        try:
            self._board.append(number, record)
        except FileExistsError:
            self._read_on()
            return False
        self._took(number, record)
        return True

    def _read_on(self) -> None:
        for number, record in self._board.read_on(self._journal):
            self._took(number, record)

    def _took(self, number: int, record: Record) -> None:
        with self._lock:
            assert self._leader is not None
            if number != self._journal.number + 1:
                return
            self._leader.wrote(number, record, self._now_s())
            if isinstance(record, Lead):
                self.lost = True
        text = told(record)
        if text:
            log.warning("outlast: %s", text)
        self._wake.set()

    def _grant(self) -> None:
        while not self._wishes.empty():
            wish, answer = self._wishes.get_nowait()
            with self._lock:
                assert self._leader is not None
                record, text = self._leader.consider(wish, time.time(), self._now_s())
            if record is not None and not self._write(record):
                text = "another launcher leads since now: ask again"
            answer.put(text)

    def _serve(self, channel: Line) -> None:
        """One launcher's connection, or that of somebody with a wish."""
        with self._broken_later() as heard:
            while not self._closed.is_set():
                try:
                    message = from_header(channel.receive())
                except BadRecord as error:
                    raise ConnectionError(str(error)) from error
                if isinstance(message, Wish):
                    channel.send({"is": "Text", "text": self._ask(message)})
                elif isinstance(message, Report):
                    heard.add(message.member.agent)
                    reply = self.hear(message)
                    if reply is None:
                        return
                    channel.send(to_header(reply))

    @contextmanager
    def _broken_later(self) -> Iterator[set[str]]:
        heard: set[str] = set()
        try:
            yield heard
        finally:
            for agent in heard:
                self.broke(agent)

    def _ask(self, wish: Wish) -> str:
        try:
            return self.wish(wish).get(timeout=WISH_S)
        except queue.Empty:
            return f"no answer within {WISH_S:g} s: the journal cannot be written, or another launcher leads since now"


def told(record: Record) -> str:
    """A record in words; empty if it is not worth a line."""
    if isinstance(record, Formed):
        names = ", ".join(one.name for one in record.members)
        return f"generation {record.generation} begins with {len(record.members)} nodes: {names}"
    if isinstance(record, Over):
        return f"generation {record.generation} ends: {record.reason}"
    if isinstance(record, Evicted):
        return f"{record.node.partition('/')[0]} is evicted: {record.reason}"
    if isinstance(record, Readmitted):
        return f"{record.node.partition('/')[0]} may take part again"
    if isinstance(record, Done) and not record.succeeded:
        return f"the job ends: {record.reason}"
    return ""
