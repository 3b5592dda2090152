"""Votes and commit records: small JSON files that carry a checksum of themselves.

Every format version keeps three properties, so that each version recognises the others' files: the file ends in
``,"crc32c":"XXXXXXXX"}`` and a newline, the checksum is over all bytes before that, and there is a ``format_version``.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any

import crc32c

from outlast.checkpoint.format.fields import (
    MAX_DOCUMENT_BYTES,
    MAX_INTEGER,
    Malformed,
    as_count,
    as_flag,
    as_list,
    as_mapping,
    as_text,
    as_time,
    member,
    only,
    parse,
)
from outlast.checkpoint.format.file_paths import check_path
from outlast.checkpoint.format.names import COMMIT, VOTES, rank_name
from outlast.errors import CheckpointError, CorruptCheckpoint, UnknownFormatVersion

FORMAT_VERSION = 3
"""Of what is written. Version 2 recorded neither the order of containers nor their types."""
READABLE_VERSIONS = (2, 3)
_MAX_VERSION = 1_000_000
CRC_BYTES = 4
"""Size of the checksum at the end of a chunk."""
_SEAL = re.compile(rb',"crc32c":"([0-9a-f]{8})"\}\n\Z')
_SEAL_BYTES = 22
_CRC = re.compile(r"[0-9a-f]{8}")


class Fault(Exception):
    """A checkpoint cannot be used: which file is at fault, and why.

    Args:
        kind: the public error that it becomes.
        file: relative to the step's folder; empty where no single file is at fault.
        reason: in words, with the values.
    """

    def __init__(self, kind: type[CheckpointError], file: str, reason: str) -> None:
        super().__init__(kind, file, reason)
        self.kind = kind
        self.file = file
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}" if self.file else self.reason


@dataclass(frozen=True)
class FileEntry:
    """One file of a vote."""

    path: str
    """Relative to the step's folder."""
    size_bytes: int
    crc32c: str
    """8 hex digits. Of the whole file; for a chunk, of all but the 4 bytes of CRC32C at its end, which must match: the
    CRC of bytes followed by their own CRC is a constant, and would not tell one chunk from another."""
    chunk: bool
    """Whether it is a Zarr chunk."""

    @property
    def body_bytes(self) -> int:
        """Its size without the checksum at a chunk's end."""
        return self.size_bytes - (CRC_BYTES if self.chunk else 0)


@dataclass(frozen=True)
class Vote:
    """What one rank wrote; all of it was durable before the vote was written."""

    step: int
    rank: int
    world_size: int
    attempt_id: str
    """The attempt it belongs to; a vote of another attempt never counts."""
    save_id: int
    """Number of the save within the attempt, so that a late vote for an abandoned save does not count either."""
    layout: str
    """Checksum of the names, shapes and types of the replicated state, which must be equal on all ranks."""
    files: tuple[FileEntry, ...]
    replicas: dict[str, str] = field(default_factory=dict)
    """CRC32C of pieces of the replicated state as this rank has them, of each from two ranks, and of its values."""


@dataclass(frozen=True)
class Commit:
    """The commit record: the checkpoint is complete."""

    step: int
    world_size: int
    attempt_id: str
    save_id: int
    saved_at: float
    """Unix time, in seconds."""
    size_bytes: int
    """Total size of all files that the votes list."""
    votes: tuple[FileEntry, ...]
    """By rank."""
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class SlotIndex:
    """The contents of one slot of shared memory."""

    vote: Vote
    places: dict[str, int]
    """The offset of each of the vote's files, in bytes; the vote says how long each is."""


_KINDS: dict[type, str] = {Vote: "vote", Commit: "commit", SlotIndex: "placed"}
"""What a record calls itself in its file, whatever its class is called here."""
_KEYS = {"attempt_id": "epoch", "save_id": "serial"}
"""The keys in the file of fields that are called otherwise here."""


def crc_hex(*parts: bytes | memoryview) -> str:
    """CRC32C of the concatenation, as 8 hex digits."""
    value = 0
    for part in parts:
        value = crc32c.crc32c(part, value)
    return f"{value:08x}"


class RunningChecksum:
    """The number of bytes in pieces that arrive one after the other, and their CRC32C."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.crc = 0

    def __call__(self, piece: bytes | memoryview) -> None:
        """Add the next piece."""
        self.nbytes += len(piece)
        self.crc = crc32c.crc32c(piece, self.crc)


def check_file(entry: FileEntry, data: memoryview) -> None:
    """Compare a file's bytes with its entry in the vote; raises :class:`Fault`."""
    if len(data) != entry.size_bytes:
        raise wrong_size(entry, len(data))
    seen = RunningChecksum()
    seen(data[: entry.body_bytes])
    check_pieces(entry, seen, bytes(data[entry.body_bytes :]))


def check_pieces(entry: FileEntry, seen: RunningChecksum, end: bytes) -> None:
    """As :func:`check_file`, for a file that was read in pieces.

    Args:
        entry: of the file.
        seen: all its bytes but the checksum at a chunk's end.
        end: the rest.
    """
    if seen.nbytes + len(end) != entry.size_bytes:
        raise wrong_size(entry, seen.nbytes + len(end))
    if entry.chunk and (stored := end[::-1].hex()) != entry.crc32c:
        raise Fault(
            CorruptCheckpoint,
            entry.path,
            f"checksum at its end: expected CRC32C {entry.crc32c}, found {stored}",
        )
    computed = f"{seen.crc:08x}"
    if computed != entry.crc32c:
        raise Fault(CorruptCheckpoint, entry.path, f"expected CRC32C {entry.crc32c}, found {computed}")


def wrong_size(entry: FileEntry, nbytes: int) -> Fault:
    """The fault of a file of another size."""
    return Fault(CorruptCheckpoint, entry.path, f"expected {entry.size_bytes} bytes, found {nbytes}")


def seal(record: Vote | Commit | SlotIndex) -> bytes:
    """The bytes of a record's file."""
    fields = {"vote": _keyed(record.vote), "places": record.places} if isinstance(record, SlotIndex) else _keyed(record)
    body = {"format_version": FORMAT_VERSION, "kind": _KINDS[type(record)], **fields}
    text = json.dumps(body, indent=1, allow_nan=False).encode()[:-1].rstrip(b"\n")
    if len(text) + _SEAL_BYTES > MAX_DOCUMENT_BYTES:
        raise CheckpointError(
            f"a {_KINDS[type(record)]} record would have {len(text)} bytes; at most {MAX_DOCUMENT_BYTES} are read",
            "save fewer tensors, or pack more of them (checkpoint.pack_below_kb)",
        )
    return text + b',"crc32c":"' + crc_hex(text).encode() + b'"}\n'


def unseal_vote(data: bytes | memoryview, file: str) -> Vote:
    """The vote in a file's bytes; raises :class:`Fault`."""
    body, _ = _unseal(data, file, _KINDS[Vote])
    try:
        return _vote(body)
    except Malformed as error:
        raise Fault(CorruptCheckpoint, file, f"is not a vote: {error}") from error


def unseal_placed(data: bytes | memoryview, file: str) -> SlotIndex:
    """The index in a file's bytes; raises :class:`Fault`."""
    body, _ = _unseal(data, file, _KINDS[SlotIndex])
    try:
        only(body, "vote", "places")
        vote = _vote(as_mapping(member(body, "vote"), "vote"))
        places = as_mapping(member(body, "places"), "places")
        return SlotIndex(vote, {entry.path: as_count(member(places, entry.path), "a place") for entry in vote.files})
    except Malformed as error:
        raise Fault(CorruptCheckpoint, file, f"is not the index of a slot: {error}") from error


def unseal_commit(data: bytes | memoryview) -> Commit:
    """The commit record in a file's bytes; raises :class:`Fault`."""
    body, version = _unseal(data, COMMIT, _KINDS[Commit])
    try:
        only(body, "step", "world_size", "epoch", "serial", "saved_at", "size_bytes", "votes")
        votes = as_list(member(body, "votes"), "votes")
        return Commit(
            step=as_count(member(body, "step"), "step"),
            world_size=as_count(member(body, "world_size"), "world_size", len(votes), len(votes)),
            attempt_id=as_text(member(body, "epoch"), "epoch"),
            save_id=as_count(member(body, "serial"), "serial"),
            saved_at=as_time(member(body, "saved_at"), "saved_at"),
            size_bytes=as_count(member(body, "size_bytes"), "size_bytes"),
            votes=tuple(_entry_of_vote(entry, rank) for rank, entry in enumerate(votes)),
            format_version=version,
        )
    except Malformed as error:
        raise Fault(CorruptCheckpoint, COMMIT, f"is not a commit record: {error}") from error


def _keyed(record: Vote | Commit) -> dict[str, Any]:
    fields = {_KEYS.get(name, name): value for name, value in asdict(record).items()}
    fields.pop("format_version", None)  # comes first, in every record
    if not fields.get("replicas", True):
        del fields["replicas"]  # as in votes of one rank, and of versions without
    return fields


def _vote(body: dict[str, Any]) -> Vote:
    only(body, "step", "rank", "world_size", "epoch", "serial", "layout", "files", "replicas")
    world_size = as_count(member(body, "world_size"), "world_size", 1)
    rank = as_count(member(body, "rank"), "rank", 0, world_size - 1)
    files = tuple(_entry(entry) for entry in as_list(member(body, "files"), "files"))
    for entry in files:
        check_path(entry.path, chunk=entry.chunk, rank=rank)
    if len({entry.path for entry in files}) != len(files):
        raise Malformed("it lists a file twice")
    return Vote(
        step=as_count(member(body, "step"), "step"),
        rank=rank,
        world_size=world_size,
        attempt_id=as_text(member(body, "epoch"), "epoch"),
        save_id=as_count(member(body, "serial"), "serial"),
        layout=as_text(member(body, "layout"), "layout"),
        files=files,
        replicas={
            as_text(name, "a replica"): as_text(digest, "a digest")
            for name, digest in as_mapping(body.get("replicas", {}), "replicas").items()
        },
    )


def _entry(value: Any) -> FileEntry:
    fields = as_mapping(value, "a file")
    only(fields, "path", "size_bytes", "crc32c", "chunk")
    path, checksum = as_text(member(fields, "path"), "path"), as_text(member(fields, "crc32c"), "crc32c")
    if not _CRC.fullmatch(checksum):
        raise Malformed(f"crc32c must be 8 hex digits, and is {checksum[:20]!r}")
    chunk = as_flag(member(fields, "chunk"), "chunk")
    size_bytes = as_count(
        member(fields, "size_bytes"),
        "size_bytes",
        CRC_BYTES if chunk else 1,
        MAX_INTEGER if chunk else MAX_DOCUMENT_BYTES,
    )
    return FileEntry(path, size_bytes, checksum, chunk)


def _entry_of_vote(value: Any, rank: int) -> FileEntry:
    entry = _entry(value)
    expected = f"{VOTES}/{rank_name(rank)}.json"
    if entry.path != expected or entry.chunk:
        raise Malformed(f"the vote of rank {rank} must be {expected}, and is {entry.path[:80]!r}")
    return entry


def _unseal(data: bytes | memoryview, file: str, kind: str) -> tuple[dict[str, Any], int]:
    """A record's fields, and its format version."""
    match = _SEAL.search(data[-_SEAL_BYTES - 1 :])
    if match is None:
        raise Fault(CorruptCheckpoint, file, f"its {len(data)} bytes do not end in a checksum")
    computed = crc_hex(memoryview(data)[: len(data) - _SEAL_BYTES])
    if computed.encode() != match[1]:
        raise Fault(CorruptCheckpoint, file, f"expected CRC32C {match[1].decode()}, found {computed}")
    try:
        body = parse(bytes(data))
    except Malformed as error:
        raise Fault(CorruptCheckpoint, file, f"is not a {kind} record: {error}") from error
    version = body.pop("format_version", None)
    if type(version) is not int or not 0 < version <= _MAX_VERSION:
        raise Fault(CorruptCheckpoint, file, "has no format version")
    if version not in READABLE_VERSIONS:
        readable = ", ".join(map(str, READABLE_VERSIONS))
        raise Fault(
            UnknownFormatVersion, file, f"has format version {version}; this version of outlast reads {readable}"
        )
    if body.pop("kind", None) != kind:
        raise Fault(CorruptCheckpoint, file, f"is not a {kind} record")
    body.pop("crc32c", None)
    return body, version
