"""What a journal's records say."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar, TypeVar

MAX_RECORD_BYTES = 16 << 20
"""A generation of 4,096 nodes has about 1 MiB."""
T = TypeVar("T")


class BadRecord(ValueError):
    """A record, or a message, that is none of ours."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A launcher, as the others know it."""

    node: str
    """The node's name and, behind a slash, the id of its boot."""
    agent: str
    """Of this start of the launcher; drawn at random."""
    address: str
    """Where other nodes reach this one."""
    store_port: int = 0
    """Of the store that it offers for the next generation; 0: none."""
    pid: int = 0
    """On its node."""
    started: float = 0.0
    """When that process was started, in seconds since 1970 as its node's kernel has it."""

    @property
    def name(self) -> str:
        """The node's name, without its boot."""
        return name_of(self.node)


def name_of(node: str) -> str:
    """A node's name, from its id."""
    return node.partition("/")[0]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One record of a journal."""

    kind: ClassVar[str]
    epoch: int
    """The number of the ``lead`` record under which it was written; a ``lead`` record's own number."""
    at: float
    """When, in seconds since 1970 by its writer's clock: for people."""


@dataclass(frozen=True, kw_only=True)
class Lead(Record):
    """Its writer leads from now on."""

    kind = "lead"
    job: str
    """The job's name, which no other has. A new name begins a new job: what was decided before does not count."""
    leader: Member
    port: int
    """Where the leader listens, on ``leader.address``."""


@dataclass(frozen=True, kw_only=True)
class Formed(Record):
    """A generation begins. The first of its members has the store through which its ranks meet."""

    kind = "formed"
    generation: int
    members: tuple[Member, ...]
    """In the order of their ranks."""
    least: int
    """Nodes that the job needs at least."""
    most: int
    """Nodes that it has if it can."""


@dataclass(frozen=True, kw_only=True)
class Over(Record):
    """A generation ends: its members stop their ranks, and wait for the next."""

    kind = "over"
    generation: int
    reason: str
    node: str = ""
    """Because of which node; empty: of none."""


@dataclass(frozen=True, kw_only=True)
class Left(Record):
    """Launchers whose ranks have done their work, written for whoever leads after the one that heard them say so."""

    kind = "left"
    generation: int
    agents: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Evicted(Record):
    """A node takes no part in further generations."""

    kind = "evicted"
    node: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Readmitted(Record):
    """A node may take part again."""

    kind = "readmitted"
    node: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Done(Record):
    """The job has ended."""

    kind = "done"
    succeeded: bool
    reason: str


KINDS: dict[str, type[Record]] = {kind.kind: kind for kind in (Lead, Formed, Over, Left, Evicted, Readmitted, Done)}


def encode(record: Record) -> bytes:
    """A record as JSON."""
    return json.dumps({"v": 1, "kind": record.kind, **plain(record)}, separators=(",", ":")).encode()


def plain(value: Any) -> dict[str, Any]:
    """A dataclass's fields, with members as objects. Much faster than :func:`dataclasses.asdict`, which copies all."""
    found = dict(vars(value))
    for name in ("leader", "member"):
        if name in found:
            found[name] = vars(found[name])
    if "members" in found:
        found["members"] = [vars(one) for one in found["members"]]
    return found


def decode(data: bytes) -> Record:
    """The record in ``data``.

    Raises:
        BadRecord: it is none.
    """
    document = parse(data)
    version, kind = document.pop("v", None), document.pop("kind", None)
    if version != 1 or kind not in KINDS:
        raise BadRecord(f"a record of version {version!r} and kind {kind!r}")
    for name, value in document.items():
        if name == "leader":
            document[name] = read(Member, value)
        elif name == "members":
            if not isinstance(value, list):
                raise BadRecord("members are no list")
            document[name] = tuple(read(Member, one) for one in value)
        elif name == "agents":
            if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
                raise BadRecord("agents are no list of names")
            document[name] = tuple(value)
    return read(KINDS[kind], document)


def parse(data: bytes) -> dict[str, Any]:
    """The JSON object in ``data``.

    Raises:
        BadRecord: there is none.
    """
    try:
        document = json.loads(data)
    except ValueError as error:
        raise BadRecord(f"not JSON: {error}") from error
    if not isinstance(document, dict):
        raise BadRecord(f"a {type(document).__name__}, not an object")
    return document


_PLAIN: dict[str, type | tuple[type, ...]] = {"str": str, "int": int, "bool": bool, "float": (int, float)}


@cache
def _plain_fields(kind: type) -> tuple[tuple[str, type | tuple[type, ...]], ...]:
    return tuple((one.name, _PLAIN[str(one.type)]) for one in fields(kind) if str(one.type) in _PLAIN)


def read(kind: type[T], document: Any) -> T:
    """A dataclass from a JSON object; fields of plain types are checked.

    Raises:
        BadRecord: a field is missing, unknown or of another type.
    """
    if not isinstance(document, dict):
        raise BadRecord(f"a {type(document).__name__} in place of a {kind.__name__}")
    for name, expected in _plain_fields(kind):  # type: ignore[arg-type]
        if name in document:
            value = document[name]
            if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
                raise BadRecord(f"{kind.__name__}.{name} is a {type(value).__name__}")
    try:
        return kind(**document)
    except TypeError as error:
        raise BadRecord(str(error)) from error
