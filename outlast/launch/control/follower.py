"""What a launcher knows and does as one of many. Pure: time and messages come in."""

from __future__ import annotations

from dataclasses import replace

from outlast.launch.control.messages import Reply, Report, State
from outlast.launch.control.records import Member
from outlast.launch.control.settings import ControlSettings


class Follower:
    """One launcher's place in its job.

    Args:
        member: this launcher.
        settings: how long it waits for what.
        now_s: by a clock that does not jump; likewise in all methods.
        order: see :class:`~outlast.launch.control.messages.Report`.
    """

    def __init__(self, member: Member, settings: ControlSettings, now_s: float, *, order: str = "") -> None:
        self.member = member
        self.state: State = "waits"
        self.ran = -1
        """The newest generation in which it has taken its place."""
        self.reply: Reply | None = None
        """The newest that it knows."""
        self.since_s = now_s
        """Since when it is in this state."""
        self.replaces = ""
        """See :class:`~outlast.launch.control.messages.Report`."""
        self._job = ""
        self._settings = settings
        self._order = order
        self._contact_s = now_s
        self._count = 0
        self._succeeded = False
        self._reason = ""

    @property
    def epoch(self) -> int:
        """Of the newest order that it knows."""
        return self.reply.epoch if self.reply is not None else 0

    @property
    def seen(self) -> int:
        """The newest record that it knows of."""
        return self.reply.number if self.reply is not None else 0

    def report(self) -> Report:
        """What it says of itself."""
        self._count += 1
        return Report(
            member=self.member,
            state=self.state,
            ran=self.ran,
            seen=self.seen,
            count=self._count,
            replaces=self.replaces,
            succeeded=self._succeeded,
            reason=self._reason,
            order=self._order,
        )

    def take(self, reply: Reply, now_s: float) -> bool:
        """Take what the leader, or the journal, says; False: it is older than what is known, and is refused."""
        if reply.number < self.seen or reply.epoch < self.epoch:
            return False
        self._contact_s = now_s
        if reply.number == self.seen and not reply.told and self.reply is not None:
            return True  # read from the journal, which knows no words
        self.reply = reply
        if not reply.done:
            self._job = reply.job
        return True

    @property
    def has_ended(self) -> bool:
        """Whether the job has ended that this launcher took part in, or waited for."""
        return self.reply is not None and bool(self.reply.done) and self.reply.job == self._job

    def wait(self, now_s: float, *, store_port: int, reason: str = "") -> None:
        """Its ranks do not run, and it wants a place in the next generation."""
        self._become("waits", now_s, reason)
        self.member = replace(self.member, store_port=store_port)

    def assignment(self) -> Reply | None:
        """Its place in a generation that it has not been in yet, if it waits and there is one."""
        reply = self.reply
        if self.state != "waits" or reply is None or reply.rank == -1 or reply.generation <= self.ran:
            return None
        return None if reply.over or reply.done or reply.evicted else reply

    def run(self, generation: int, now_s: float) -> None:
        """It takes its place."""
        self.ran = generation
        self._become("runs", now_s, "")

    def leave(self, now_s: float, *, succeeded: bool, reason: str) -> None:
        """Its ranks have ended, and it ends."""
        self._succeeded = succeeded
        self._become("left", now_s, reason)

    def why_stop(self, now_s: float) -> str:
        """Why its ranks must be stopped; empty if they need not."""
        reply = self.reply
        if self.state != "runs" or reply is None:
            return ""
        if reply.done:
            return reply.done
        if reply.generation > self.ran:
            return f"generation {reply.generation} has begun"
        if reply.over:
            return reply.over
        if self.is_cut_off(now_s):
            return (
                f"neither the launcher that leads nor the journal was reached for {now_s - self._contact_s:.0f} s, and "
                "others may go on without this node"
            )
        return ""

    def is_cut_off(self, now_s: float) -> bool:
        """Whether it has heard nothing for so long that others may go on without it."""
        return now_s - self._contact_s > self._settings.cut_off_s

    def _become(self, state: State, now_s: float, reason: str) -> None:
        if state != self.state or state == "waits":
            self.since_s = now_s
        self.state, self._reason = state, reason
