"""What ranks tell one another during a restore: typed records, sent as JSON text."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple, Self, TypeVar

from outlast import errors
from outlast.checkpoint.format.fields import Malformed, as_list, as_mapping
from outlast.checkpoint.format.records import Fault
from outlast.checkpoint.peers.collectives import Agreement
from outlast.errors import CheckpointError


class SaveKey(NamedTuple):
    """Which save of which attempt."""

    attempt_id: str
    save_id: int


@dataclass(frozen=True)
class Message:
    """Base of the records. Every field is a string, a number or a boolean, so that JSON gives back the same record."""


@dataclass(frozen=True)
class Failure(Message):
    """Why a rank could not do its part."""

    kind: str
    """Name of the error's class in :mod:`outlast.errors`."""
    reason: str
    fix: str = ""
    file: str = ""
    """Relative to the step's folder; empty where no single file is at fault."""

    @classmethod
    def of(cls, error: Exception) -> Self:
        """The record of what was raised."""
        if isinstance(error, Fault):
            return cls(error.kind.__name__, error.reason, file=error.file)
        if isinstance(error, CheckpointError):
            return cls(type(error).__name__, error.what, error.fix)
        return cls(CheckpointError.__name__, f"{type(error).__name__}: {error}")

    @property
    def error_type(self) -> type[CheckpointError]:
        """The class of the error."""
        kind = getattr(errors, self.kind, None)
        return kind if isinstance(kind, type) and issubclass(kind, CheckpointError) else CheckpointError

    def as_fault(self) -> Fault:
        """The fault of a file."""
        return Fault(self.error_type, self.file, self.reason)

    def as_error(self) -> CheckpointError:
        """The error of a rank."""
        return self.error_type(self.reason, self.fix)


@dataclass(frozen=True)
class Ask(Message):
    """What a rank asks for, and where it runs."""

    node: str
    digest: int = -1
    """Of the tensors that it asks for; -1 for all tensors, whole."""
    selection: str = ""
    """What it takes of them, in words."""
    problem: str = ""
    """Why it cannot ask, if so."""
    fix: str = ""


@dataclass(frozen=True)
class StoredStep(Message):
    """A step in storage."""

    step: int
    committed: bool
    replaced: bool = False
    """Whether its older commit is read, because overwriting it was interrupted."""


@dataclass(frozen=True)
class PartOnNode(Message):
    """A node has one rank's part of a save."""

    node: str
    attempt_id: str
    save_id: int
    rank: int
    """That saved the part."""
    in_memory: bool
    """Whether the node has it in memory; otherwise it is on the node's disk."""


@dataclass(frozen=True)
class SealedCommit(Message):
    """A commit record."""

    text: str
    """The record's file, which carries a checksum of itself."""


@dataclass(frozen=True)
class SealedVote(Message):
    """One rank's vote for a save."""

    rank: int
    text: str
    """The vote's file, which carries a checksum of itself."""


@dataclass(frozen=True)
class FileOnNode(Message):
    """A file of a save, on one node."""

    node: str
    path: str


@dataclass(frozen=True)
class DamagedCopy(Message):
    """A copy of a file is not what was written."""

    node: str
    path: str
    tier: str
    reason: str


M = TypeVar("M", bound=Message)
_TYPES = {"str": str, "int": int, "bool": bool}


def all_gather_messages(agreement: Agreement, kind: type[M], messages: Sequence[M]) -> list[tuple[int, M]]:
    """Every rank's messages, each with its sender's rank, in the order of the ranks; collective.

    Where no rank has any (the common case), this is one all-reduce. Fails as :class:`Agreement` does.

    Raises:
        CheckpointError: what a rank sent is no such message; raised on every rank, and names the rank.
    """
    text = json.dumps([asdict(message) for message in messages]) if messages else ""
    return [
        (rank, message)
        for rank, received in enumerate(agreement.all_gather_text(text))
        if received
        for message in _parse(received, kind, rank)
    ]


def _parse(text: str, kind: type[M], rank: int) -> list[M]:
    types = {field.name: _TYPES[str(field.type)] for field in dataclasses.fields(kind)}
    try:
        parsed = [as_mapping(item, "a message") for item in as_list(json.loads(text), "the messages")]
        for item in parsed:
            if item.keys() != types.keys() or any(type(item[name]) is not types[name] for name in types):
                raise Malformed(f"a {kind.__name__} has the fields {sorted(item)[:9]}")
    except (RecursionError, ValueError) as error:
        raise CheckpointError(
            f"rank {rank} sent what is no {kind.__name__}: {str(error)[:200]}",
            "run the same version of outlast on all ranks",
        ) from error
    return [kind(**item) for item in parsed]
