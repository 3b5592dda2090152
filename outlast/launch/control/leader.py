"""What the launcher that leads decides, from what it hears. Pure: time and messages come in, records go out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from outlast.launch.control.journal import Journal
from outlast.launch.control.messages import Reply, Report, Wish, reply_for
from outlast.launch.control.places import in_order
from outlast.launch.control.records import (
    Done,
    Evicted,
    Formed,
    Left,
    Member,
    Over,
    Readmitted,
    Record,
    name_of,
)
from outlast.launch.control.settings import ControlSettings

HOUR_S = 3600.0
REPORTS_PER_S = 1000.0
"""Launchers that wait report so often that the leader hears this many, at most."""
QUICK_S = 0.1
"""... but none more often than this."""


@dataclass
class Heard:
    """What the leader knows of a launcher."""

    report: Report
    at_s: float
    """When the newest report came."""
    since_s: float
    """When it was first heard in this state."""
    broken_s: float | None = None
    """When its connection broke, if there is none since."""


class Leader:
    """Decides for a job while its launcher leads.

    Nothing is decided until its record stands in the journal: :meth:`decide` says what to write, and :meth:`wrote`
    takes it when that is done.

    Args:
        settings: how long it waits for what.
        journal: as it stands, this launcher's own ``lead`` record included; changed by :meth:`wrote` alone.
        now_s: by a clock that does not jump; likewise in all methods.
        gone: the agent that led before, which has given no sign since ``gone_s``.
    """

    def __init__(
        self, settings: ControlSettings, journal: Journal, now_s: float, *, gone: str = "", gone_s: float = 0.0
    ) -> None:
        self.journal = journal
        self._settings = settings
        self._heard: dict[str, Heard] = {}
        self._began_s = now_s
        self._board_s = now_s
        self._formed_s = now_s
        self._over_s = now_s
        self._gained_s = now_s
        self._gone = {gone: gone_s} if gone else {}
        self._dead: set[str] = set()
        self._told = ""

    def board_answered(self, now_s: float) -> None:
        """The journal's place has taken this leader's newest sign of life."""
        self._board_s = now_s

    def may_answer(self, now_s: float) -> bool:
        """Whether it may still lead, so far as it can know: others cannot have taken over without a pause."""
        return now_s - self._board_s <= self._settings.lead_s

    def hear(self, report: Report, now_s: float) -> None:
        """Take a launcher's report."""
        agent = report.member.agent
        known = self._heard.get(agent)
        if known is not None and (report.count < known.report.count or known.report.state == "left"):
            return
        if report.replaces:
            self._dead.add(report.replaces)
        if known is None or known.report.state != report.state:
            if report.state == "waits":
                self._gained_s = now_s
            self._heard[agent] = Heard(report, now_s, now_s)
        else:
            known.report, known.at_s, known.broken_s = report, now_s, None

    def broke(self, agent: str, now_s: float) -> None:
        """A launcher's connection has broken."""
        known = self._heard.get(agent)
        if known is not None:
            known.broken_s = now_s

    def answer(self, member: Member) -> Reply:
        """What to tell a launcher."""
        pace_s = max(QUICK_S, len(self._heard) / REPORTS_PER_S)
        return reply_for(self.journal, member, self._told, pace_s)

    def decide(self, now_s: float, at: float) -> Record | None:
        """What is to be written next, if anything.

        Args:
            now_s: see the class.
            at: the time of day, for the record.
        """
        if self.journal.done is not None:
            return None
        running = self.journal.running
        if running is not None:
            self._told = ""
            return self._end(running, now_s, at)
        return self._form(now_s, at)

    def wrote(self, number: int, record: Record, now_s: float) -> None:
        """A record stands in the journal: this leader's, or that of another."""
        self.journal.take(number, record)
        if isinstance(record, Formed):
            self._formed_s = now_s
        elif isinstance(record, Over):
            self._over_s = now_s

    def consider(self, wish: Wish, at: float, now_s: float) -> tuple[Record | None, str]:
        """What is to be written for somebody's wish, if anything, and the answer in words."""
        if wish.action == "status":
            return None, self.describe(now_s)
        if wish.action == "readmit":
            return self._readmit(wish, at)
        return self._evict(wish, at, now_s)

    def hand_over(self, at: float) -> Record | None:
        """What whoever leads next must know, and only this leader does."""
        formed = self.journal.running
        if formed is None:
            return None
        agents = tuple(one.agent for one in formed.members if self._has_succeeded(one.agent))
        new = tuple(agent for agent in agents if agent not in self.journal.left)
        if not new:
            return None
        return Left(epoch=self.journal.epoch, at=at, generation=formed.generation, agents=agents)

    def all_left(self, now_s: float) -> bool:
        """Whether every launcher that was heard of has left, or is lost."""
        return all(one.report.state == "left" or self._is_lost(agent, now_s) for agent, one in self._heard.items())

    def describe(self, now_s: float) -> str:
        """The launchers that are known, one a line."""
        lines = []
        for agent, one in sorted(self._heard.items(), key=lambda item: item[1].report.member.node):
            node, state = one.report.member.node, one.report.state
            rank = self.journal.rank_of(one.report.member)
            if node in self.journal.evicted:
                text = f"evicted: {self.journal.evicted[node].reason}"
            elif self._is_lost(agent, now_s):
                text = f"lost, last heard of {now_s - one.at_s:.0f} s ago"
            elif state == "runs":
                text = f"runs as node {rank}"
            elif state == "waits":
                text = "a spare" if self.journal.running is not None and rank == -1 else "waits"
            else:
                text = "has done its work" if one.report.succeeded else f"left: {one.report.reason}"
            lines.append(f"{name_of(node)}  {text}")
        return "\n".join(lines)

    def _end(self, running: Formed, now_s: float, at: float) -> Record | None:
        if all(self._has_succeeded(one.agent) for one in running.members):
            return Done(epoch=self.journal.epoch, at=at, succeeded=True, reason="all ranks have done their work")
        found = self._why_over(running, now_s)
        if found is None:
            return None
        reason, node = found
        return Over(epoch=self.journal.epoch, at=at, generation=running.generation, reason=reason, node=node)

    def _why_over(self, running: Formed, now_s: float) -> tuple[str, str] | None:
        """Why a generation cannot go on, and because of which node; the likelier cause first."""
        settings = self._settings
        for member in running.members:
            if member.node in self.journal.evicted:
                return f"{member.name} is evicted: {self.journal.evicted[member.node].reason}", member.node
        for member in running.members:
            if not self._has_succeeded(member.agent) and self._is_lost(member.agent, now_s):
                return f"{member.name} is lost: {self._how_lost(member.agent, now_s)}", member.node
        for member in running.members:
            known = self._heard.get(member.agent)
            if known is None or self._has_succeeded(member.agent):
                continue
            report = known.report
            if report.state == "left":
                return f"{member.name} left: {report.reason or 'it gave no reason'}", member.node
            if report.state == "waits" and report.ran >= running.generation:
                return f"{member.name}: {report.reason or 'its ranks have ended'}", member.node
            if report.state == "waits" and now_s - max(self._formed_s, known.since_s) > settings.start_s:
                return f"{member.name} has not begun for {settings.start_s:g} s", member.node
        fewer = len(running.members) < settings.most
        if fewer and not any(self._has_succeeded(one.agent) for one in running.members):
            ready = [
                one
                for one in self._waiting(now_s)
                if now_s - one.since_s >= settings.grow_after_s and self.journal.rank_of(one.report.member) == -1
            ]
            if ready:
                node = ready[0].report.member.node
                return f"{name_of(node)} joins: the job may have {settings.most} nodes", node
        return None

    def _form(self, now_s: float, at: float) -> Record | None:
        settings, formed = self._settings, self.journal.formed
        waiting = self._waiting(now_s)
        if formed is not None and self.journal.fenced:
            stopped = [one for one in formed.members if self._has_stopped(one)]
            if not stopped and now_s - self._over_s < settings.fence_s:
                self._told = (
                    f"no launcher of generation {formed.generation} says that its ranks have ended; after "
                    f"{settings.fence_s:g} s they have ended by themselves"
                )
                return None
            stopping = self._stopping(formed, now_s)
            if stopping and now_s - self._over_s < settings.stop_s:
                self._told = f"these end their ranks: {_names(stopping)}"
                return None
        if len(waiting) < settings.least:
            self._told = (
                f"{len(waiting)} of {settings.least} nodes are here: {_names(one.report.member for one in waiting)}"
            )
            lost = self._missing(now_s)
            self._told += f"; missing: {lost}" if lost else ""
            return self._give_up(formed, len(waiting), now_s, at)
        settled_s = max(self._gained_s, self._over_s, self._began_s)
        if len(waiting) < settings.most and now_s - settled_s < settings.last_call_s:
            self._told = (
                f"{len(waiting)} nodes are here, which is enough; up to {settings.most - len(waiting)} more are waited "
                f"for, {settings.last_call_s - (now_s - settled_s):.0f} s longer"
            )
            return None
        self._told = ""
        return Formed(
            epoch=self.journal.epoch,
            at=at,
            generation=self.journal.next_generation,
            members=in_order([one.report for one in waiting], formed.members if formed else (), settings.most),
            least=settings.least,
            most=settings.most,
        )

    def _give_up(self, formed: Formed | None, here: int, now_s: float, at: float) -> Record | None:
        """The job's end, if it has too few nodes and one of them did not get lost, but left."""
        if formed is None or not self.journal.generations:
            return None
        left = [
            one.report
            for one in self._heard.values()
            if one.report.state == "left" and self.journal.rank_of(one.report.member) != -1
        ]
        if not left or self._stopping(formed, now_s):
            return None
        why = "; ".join(f"{one.member.name} {_ending(one)}" for one in left)
        reason = f"{here} of {self._settings.least} nodes are left, and no spare: {why}"
        return Done(epoch=self.journal.epoch, at=at, succeeded=False, reason=reason)

    def _waiting(self, now_s: float) -> list[Heard]:
        """Launchers that can take part."""
        return [
            one
            for agent, one in self._heard.items()
            if one.report.state == "waits"
            and one.report.member.node not in self.journal.evicted
            and not self._is_lost(agent, now_s)
            and (self.journal.rank_of(one.report.member) == -1 or self._has_stopped(one.report.member))
        ]

    def _stopping(self, formed: Formed, now_s: float) -> list[Member]:
        """Launchers of a generation that has ended that live, and whose ranks may still run."""
        return [
            one
            for one in formed.members
            if not self._has_stopped(one) and not self._is_lost(one.agent, now_s) and not self._has_succeeded(one.agent)
        ]

    def _has_stopped(self, member: Member) -> bool:
        """Whether the ranks of one of the newest generation's launchers have ended for good, as it says itself."""
        if member.agent in self._dead or member.agent in self.journal.left:
            return True
        known = self._heard.get(member.agent)
        if known is None or known.report.state == "runs":
            return False
        return known.report.ran >= self.journal.next_generation - 1 or known.report.seen >= self.journal.over_number > 0

    def _has_succeeded(self, agent: str) -> bool:
        known = self._heard.get(agent)
        return agent in self.journal.left or (
            known is not None and known.report.state == "left" and known.report.succeeded
        )

    def _is_lost(self, agent: str, now_s: float) -> bool:
        if agent in self._dead:
            return True
        settings, known = self._settings, self._heard.get(agent)
        if known is None:
            since_s = max(self._began_s, self._formed_s)
            if agent in self._gone:  # its silence is why this one leads
                since_s = max(self._gone[agent], self._began_s - settings.silent_s + settings.redial_s)
            return now_s - since_s > settings.silent_s
        if known.report.state == "left":
            return False
        if known.broken_s is not None and now_s - known.broken_s > settings.redial_s:
            return True
        return now_s - known.at_s > settings.silent_s

    def _how_lost(self, agent: str, now_s: float) -> str:
        known = self._heard.get(agent)
        if agent in self._dead:
            return "its launcher was started again"
        if known is None:
            return "it was not heard of since this node leads"
        if known.broken_s is not None:
            return f"its launcher's connection broke {now_s - known.broken_s:.1f} s ago"
        return f"its launcher was last heard of {now_s - known.at_s:.1f} s ago"

    def _missing(self, now_s: float) -> str:
        formed = self.journal.formed
        if formed is None or not self.journal.generations:
            return ""
        here = {one.report.member.node for one in self._waiting(now_s)}
        gone = [one for one in formed.members if one.node not in here]
        return "; ".join(f"{one.name} ({self._how_missing(one, now_s)})" for one in gone)

    def _how_missing(self, member: Member, now_s: float) -> str:
        if member.node in self.journal.evicted:
            return f"evicted: {self.journal.evicted[member.node].reason}"
        known = self._heard.get(member.agent)
        if known is not None and known.report.state == "left":
            return _ending(known.report)
        return self._how_lost(member.agent, now_s) if self._is_lost(member.agent, now_s) else "ends its ranks"

    def _known_nodes(self) -> set[str]:
        members = self.journal.formed.members if self.journal.formed is not None else ()
        return {one.report.member.node for one in self._heard.values()} | {one.node for one in members}

    def _evict(self, wish: Wish, at: float, now_s: float) -> tuple[Record | None, str]:
        found = [node for node in self._known_nodes() if wish.node in (node, name_of(node))]
        if not found:
            return None, f"no node {wish.node!r} is known; known are {_listed(self._known_nodes())}"
        node = found[0]
        if node in self.journal.evicted:
            return None, f"{name_of(node)} is evicted already: {self.journal.evicted[node].reason}"
        hour = sum(at - one < HOUR_S for one in self.journal.evicted_at)
        if not wish.by_person and hour >= self._settings.evictions_per_hour:
            return None, (
                f"{name_of(node)} is not evicted: {hour} evictions in the last hour, at most "
                f"{self._settings.evictions_per_hour} are allowed (evictions_per_hour)"
            )
        out = {node, *self.journal.evicted}
        others = [
            agent
            for agent, one in self._heard.items()
            if one.report.member.node not in out and one.report.state != "left" and not self._is_lost(agent, now_s)
        ]
        short = len(others) < self._settings.least
        if short and not wish.by_person:
            return None, (
                f"{name_of(node)} is not evicted: {len(others)} other nodes are fit, and the job needs "
                f"{self._settings.least}"
            )
        record = Evicted(epoch=self.journal.epoch, at=at, node=node, reason=wish.reason or "no reason was given")
        text = f"{name_of(node)} is evicted"
        if short:
            text += f"; the job needs {self._settings.least} nodes and has {len(others)} others: it waits for more"
        return record, text

    def _readmit(self, wish: Wish, at: float) -> tuple[Record | None, str]:
        found = [node for node in self.journal.evicted if wish.node in (node, name_of(node))]
        if not found:
            return None, f"no node {wish.node!r} is evicted; evicted are {_listed(self.journal.evicted) or 'none'}"
        record = Readmitted(epoch=self.journal.epoch, at=at, node=found[0], reason=wish.reason)
        return record, f"{name_of(found[0])} may take part again"


def _ending(report: Report) -> str:
    return "has done its work" if report.succeeded else f"left ({report.reason or 'it gave no reason'})"


def _names(members: Iterable[Member]) -> str:
    return ", ".join(sorted(one.name for one in members)) or "none"


def _listed(nodes: Iterable[str]) -> str:
    return ", ".join(sorted(map(name_of, nodes)))
