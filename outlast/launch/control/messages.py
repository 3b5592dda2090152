"""What launchers tell the one that leads, and what it tells them. A few hundred bytes each, whatever the job's size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from outlast.launch.control.journal import Journal
from outlast.launch.control.records import BadRecord, Member, plain, read

State = Literal["waits", "runs", "left"]
"""``waits``: its ranks do not run, and it wants to be in the next generation. ``runs``: it has taken its place in one.
``left``: its ranks do not run, and it ends."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a launcher says of itself."""

    member: Member
    state: State
    ran: int
    """The newest generation in which it has taken its place; -1: none. If it does not run, its ranks of that
    generation have ended."""
    seen: int = 0
    """The newest record of the journal that it knows of. It obeys nothing older any more."""
    count: int = 0
    """Of its reports; an older one that comes later is passed over."""
    replaces: str = ""
    """An earlier start of this node's launcher that is dead, together with its ranks."""
    succeeded: bool = False
    """With ``left``: its ranks have done their work."""
    reason: str = ""
    """Why it stopped or left, in words."""
    order: str = ""
    """Where it belongs among the nodes: those that are near each other have orders that are near each other."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What somebody wants of the one that leads: a person, or a verdict."""

    action: Literal["evict", "readmit", "status"]
    node: str = ""
    """Its name, or its id."""
    reason: str = ""
    by_person: bool = False
    """Then budgets do not apply."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a launcher needs to know of the journal; the same for all, but for its own place."""

    epoch: int
    number: int
    """The journal's newest record when this was said."""
    job: str
    generation: int
    """The newest; -1: none has begun."""
    rank: int
    """This launcher's place in it; -1: none."""
    nodes: int
    """In that generation."""
    address: str
    port: int
    """Of its store."""
    over: str
    """Why it has ended; empty if it has not."""
    done: str
    """How the job has ended; empty if it has not."""
    succeeded: bool
    """With ``done``."""
    evicted: str
    """Why this node takes no part; empty if it may."""
    told: str = ""
    """What the leader waits for, in words."""
    pace_s: float = 0.0
    """Between two reports of a launcher that waits; 0: as it likes."""


def reply_for(journal: Journal, member: Member, told: str = "", pace_s: float = 0.0) -> Reply:
    """What a launcher needs to know of the journal."""
    formed = journal.formed
    evicted = journal.evicted.get(member.node)
    return Reply(
        epoch=journal.epoch,
        number=journal.number,
        job=journal.lead.job if journal.lead is not None else "",
        generation=formed.generation if formed is not None else -1,
        rank=journal.rank_of(member),
        nodes=len(formed.members) if formed is not None else 0,
        address=formed.members[0].address if formed is not None else "",
        port=formed.members[0].store_port if formed is not None else 0,
        over=(journal.over.reason or "it has ended") if journal.over is not None else "",
        done=(journal.done.reason or "it has ended") if journal.done is not None else "",
        succeeded=journal.done is not None and journal.done.succeeded,
        evicted=evicted.reason if evicted is not None else "",
        told=told,
        pace_s=pace_s,
    )


def to_header(message: Report | Reply | Wish) -> dict[str, Any]:
    """As a frame's header."""
    return {"is": type(message).__name__, **plain(message)}


def from_header(header: Mapping[str, Any]) -> Report | Reply | Wish:
    """The message in a frame's header.

    Raises:
        BadRecord: there is none.
    """
    fields = dict(header)
    kind = fields.pop("is", None)
    if kind == "Report":
        fields["member"] = read(Member, fields.get("member"))
        report = read(Report, fields)
        if report.state not in get_args(State):
            raise BadRecord(f"a launcher in the state {report.state!r}")
        return report
    if kind == "Reply":
        return read(Reply, fields)
    if kind == "Wish":
        return read(Wish, fields)
    raise BadRecord(f"a message of kind {kind!r}")
