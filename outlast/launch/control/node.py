"""The control plane's part in one launcher: it follows the one that leads, and leads where it must."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace

from outlast.errors import CheckpointError, LaunchError
from outlast.launch.control.board import SealedBoard
from outlast.launch.control.election import Election
from outlast.launch.control.follower import Follower
from outlast.launch.control.identity import is_dead
from outlast.launch.control.journal import Journal
from outlast.launch.control.leading import Leading
from outlast.launch.control.meeting import Line, Meeting
from outlast.launch.control.messages import Reply, from_header, reply_for, to_header
from outlast.launch.control.records import BadRecord, Lead, Member, Record
from outlast.launch.control.settings import ControlSettings

log = logging.getLogger("outlast.launch")

DIAL_S = 2.0
"""A launcher that leads answers within this time or a third of ``lead_s``, or another way is looked for."""
LINGER_S = 30.0
"""The one that leads stays this long for the others to end, before it hands over."""
FOUND_S = 1.0
"""A launcher looks this often for who leads."""


@dataclass
class ControlNode:
    """Follows, and leads where it must; in threads of its own, so that a slow disk or network stops nobody's training.

    All that it is asked is answered from memory, at once.

    Args:
        meeting: where the job's launchers meet.
        member: this launcher.
        settings: how long it waits for what.
        order: where it belongs among the nodes.
    """

    meeting: Meeting
    member: Member
    settings: ControlSettings
    order: str = ""
    error: str = field(default="", init=False)
    """What keeps it from following, in words; empty if nothing does."""

    def __post_init__(self) -> None:
        self._now_s = self.meeting.means.now_s
        now_s = self._now_s()
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._follower = Follower(self.member, self.settings, now_s, order=self.order)
        self._journal = Journal()
        self._election = Election(self.settings, now_s)
        self._leading: Leading | None = None
        self._channel: Line | None = None
        self._broken = False
        self._left_told = False
        self._looked_at_last_start = False
        self._bad: BadRecord | None = None
        self._join: Callable[[float], None] | None = None

    def start(self) -> None:
        """Begin to follow."""
        self._join = self.meeting.means.spawn(self._follow, "outlast-control")

    def ask_place(self, *, store_port: int, reason: str = "") -> None:
        """This node's ranks do not run; it wants a place in the next generation."""
        with self._lock:
            self._follower.wait(self._now_s(), store_port=store_port, reason=reason)
        self._wake.set()

    def assignment(self, timeout_s: float) -> Reply | None:
        """This node's place in the next generation; None if it has none within the time.

        Raises:
            LaunchError: the journal cannot be read: it is another run's, or of another version.
        """
        with self._changed:
            self._changed.wait_for(self._is_decided, timeout_s)
            if self._bad is not None:
                raise LaunchError(
                    f"the job's journal cannot be read: {self._bad}",
                    "give all nodes the same secret, and each run a place or a --rdzv-id of its own",
                )
            reply = self._follower.assignment()
            if reply is not None:
                self._follower.run(reply.generation, self._now_s())
        if reply is not None:
            self._wake.set()
        return reply

    @property
    def newest(self) -> Reply | None:
        """The newest that this node knows of the job."""
        with self._lock:
            return self._follower.reply

    @property
    def has_ended(self) -> bool:
        """Whether the job has ended that this launcher took part in, or waited for."""
        with self._lock:
            return self._follower.has_ended

    @property
    def is_cut_off(self) -> bool:
        """Whether this node reaches neither the one that leads nor the journal."""
        with self._lock:
            return self._follower.is_cut_off(self._now_s())

    def why_stop(self) -> str:
        """Why this node's ranks must be stopped; empty if they need not."""
        with self._lock:
            return self._follower.why_stop(self._now_s())

    def leave(self, *, succeeded: bool, reason: str) -> None:
        """This node's ranks have ended, and its launcher ends. Tells the others, which takes seconds at most.

        One that leads stays until the others have ended too, at most ``LINGER_S``, and then hands over.
        """
        with self._lock:
            self._follower.leave(self._now_s(), succeeded=succeeded, reason=reason)
        self._wake.set()
        with self._changed:
            self._changed.wait_for(lambda: self._left_told, self.settings.lead_s + 2 * DIAL_S)
        leading = self._leading
        if leading is not None:
            leading.hand_over(LINGER_S)
        self.close()

    def close(self) -> None:
        """Stop following and leading, without a word."""
        self._closed.set()
        self._wake.set()
        leading = self._leading
        if leading is not None:
            leading.close()
        if self._channel is not None:
            self._channel.close()
        if self._join is not None:
            self._join(2 * DIAL_S)

    def _is_decided(self) -> bool:
        return self._bad is not None or self._closed.is_set() or self._follower.assignment() is not None

    def _follow(self) -> None:
        while not self._closed.is_set():
            self._wake.wait(self.step())
            self._wake.clear()
        if self._channel is not None:
            self._channel.close()

    def _pause_s(self) -> float:
        with self._lock:
            reply, waits = self._follower.reply, self._follower.state == "waits"
            if self._leading is None and self._channel is None:
                return min(FOUND_S / 4 if waits else FOUND_S, self.settings.lead_s / 5)
            if not waits:
                return self.settings.beat_s
            spare = reply is not None and reply.generation != -1 and not reply.over
            pace_s = reply.pace_s if reply is not None and reply.pace_s else 0.1
            return self.settings.beat_s if spare else min(pace_s, self.settings.silent_s / 3)

    def step(self) -> float:
        """Report once, or look for who leads; returns after how many seconds to do so again."""
        try:
            self._step()
            self.error = ""
        except BadRecord as error:
            with self._changed:
                self._bad = error
                self._changed.notify_all()
        except OSError as error:
            self.error = f"{self.meeting.place}: {error}"
        return self._pause_s()

    def _step(self) -> None:
        leading = self._leading
        if leading is not None:
            with self._lock:
                report = self._follower.report()
            reply = leading.hear(report)
            if reply is not None:
                self._take(reply, left=report.state == "left")
                return
            if leading.lost:
                self._leading = None
                leading.close()
            return
        if self._exchange():
            return
        self._look()

    def _exchange(self) -> bool:
        """Report to the one that leads; False if it cannot be reached."""
        if self._channel is None and not self._dial():
            return False
        assert self._channel is not None
        with self._lock:
            report = self._follower.report()
        try:
            self._channel.send(to_header(report))
            reply = from_header(self._channel.receive())
        except OSError:
            self._channel, self._broken = None, True
            return False
        if not isinstance(reply, Reply):
            raise BadRecord(f"the launcher that leads answered with a {type(reply).__name__}")
        self._broken = False
        self._take(reply, left=report.state == "left")
        return True

    def _dial(self) -> bool:
        fixed = self.meeting.fixed
        with self._lock:
            lead = self._journal.lead
        if fixed is not None and not self.meeting.leads:
            address = fixed
        elif lead is not None and lead.leader.agent != self.member.agent and self._journal.done is None:
            address = lead.leader.address, lead.port
        else:
            return False
        try:
            self._channel = self.meeting.means.dial(address, self.meeting.secret, min(DIAL_S, self.settings.lead_s / 3))
        except OSError as error:
            self._broken = True
            self.error = f"{address[0]}:{address[1]}: {error}"
            return False
        return True

    def _take(self, reply: Reply, *, left: bool = False) -> None:
        with self._changed:
            self._follower.take(reply, self._now_s())
            self._left_told |= left
            self._changed.notify_all()

    def _look(self) -> None:
        """Look into the journal: who leads, and what was decided; and take the lead if nobody does.

        Raises:
            OSError: it cannot be read.
            BadRecord: it is another run's.
        """
        board = self.meeting.board
        if board is None:
            return
        records, sign = board.read_on(self._journal), board.sign()
        for number, record in records:
            self._take_record(number, record)
        if self._leading is not None:
            return
        now_s = self._now_s()
        with self._lock:
            reply = reply_for(self._journal, self._follower.member)
            self._election.look(sign, self._journal.epoch, now_s)
            lead = self._journal.lead
            mine = lead is not None and lead.leader.agent == self.member.agent
            claims = not self._follower.has_ended and (
                mine or self._election.may_claim(self._journal, self.member, now_s, broken=self._broken)
            )
        self._take(reply)
        self._look_at_last_start()
        if claims:
            self._claim(board)

    def _claim(self, board: SealedBoard) -> None:
        """Take the lead, unless another one does so first."""
        with self._lock:
            lead, done = self._journal.lead, self._journal.done
            if self._follower.state == "left" and (lead is None or done is not None):
                self._left_told = True  # there is nobody to tell, and nothing to lead
                self._changed.notify_all()
                return
            number = self._journal.number + 1
            job = lead.job if lead is not None and done is None else secrets.token_hex(8)
        try:
            leading = Leading(self.meeting, self.member, self.settings, self._journal, self._lock, self._wake)
        except CheckpointError as error:
            if self.meeting.fixed is not None:  # a launcher of this host listens there already: that one leads
                self.meeting = replace(self.meeting, leads=False, board=None)
            raise OSError(f"this launcher cannot lead: {error}") from error
        record = Lead(epoch=number, at=time.time(), job=job, leader=self.member, port=leading.port)
        try:
            board.append(number, record)
        except FileExistsError:  # another was faster
            leading.close()
            return
        except OSError:
            leading.close()
            raise
        with self._lock:
            gone = lead.leader.agent if lead is not None and lead.leader.agent != self.member.agent else ""
            self._journal.take(number, record)
            leading.begin(gone=gone, gone_s=self._election.changed_s)
            self._leading = leading
        if lead is not None and done is None:
            log.warning("outlast: %s leads the job now; before it was %s", self.member.name, lead.leader.name)
        self._wake.set()

    def _look_at_last_start(self) -> None:
        """Find out whether an earlier start of this node's launcher is dead: nobody else can, for certain."""
        formed, member = self._journal.formed, self.member
        if self._looked_at_last_start or formed is None:
            return
        self._looked_at_last_start = True
        for one in formed.members:
            if one.node == member.node and one.agent != member.agent and is_dead(one.pid, one.started):
                with self._lock:
                    self._follower.replaces = one.agent

    def _take_record(self, number: int, record: Record) -> None:
        with self._lock:
            if number == self._journal.number + 1:
                self._journal.take(number, record)
        if isinstance(record, Lead):
            with suppress(OSError):
                if self._channel is not None:
                    self._channel.close()
            self._channel = None
