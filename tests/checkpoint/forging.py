"""Forged steps: one thing in a real step is changed, and all checksums up to the commit record are made right again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from outlast.checkpoint.format.records import CRC_BYTES, Fault, crc_hex, seal, unseal_placed

Record = dict[str, Any]
REMOVED = object()


def unsealed(path: Path) -> Record:
    """The fields of a record's file, without its checksum."""
    record: Record = json.loads(path.read_bytes())
    del record["crc32c"]
    return record


def sealed(record: Record) -> bytes:
    """The bytes of a record's file, with the right checksum."""
    text = json.dumps(record, indent=1).encode()[:-1].rstrip(b"\n")
    return text + b',"crc32c":"' + crc_hex(text).encode() + b'"}\n'


def forge(
    step: Path,
    *,
    files: dict[str, bytes | Callable[[Record], object]] | None = None,
    vote: Callable[[Record], object] | None = None,
    commit: Callable[[Record], object] | None = None,
    rank: int = 0,
) -> None:
    """Change a committed step, and make its checksums right.

    Args:
        step: its folder.
        files: new bytes of files that a vote lists, or changes of Zarr documents, by path.
        vote: a change of one vote; sizes and checksums of ``files`` in it are right already.
        commit: a change of the commit record; sizes and checksums in it are right already.
        rank: whose vote.
    """
    changed: dict[str, bytes] = {}
    for path, content in (files or {}).items():
        if callable(content):
            document = json.loads((step / path).read_bytes())
            content(document)
            content = json.dumps(document).encode()
        (step / path).write_bytes(content)
        changed[path] = content
    record = unsealed(step / "commit.json")
    for number, listed in enumerate(record["votes"]):
        file = step / "votes" / f"rank_{number:05d}.json"
        body = unsealed(file)
        for entry in body["files"]:
            if entry["path"] in changed:
                data = changed[entry["path"]]
                entry["size_bytes"] = len(data)
                entry["crc32c"] = crc_hex(data[: -CRC_BYTES if entry["chunk"] else None])
        if vote is not None and number == rank:
            before = _total(body)
            vote(body)
            record["size_bytes"] += _total(body) - before
        data = sealed(body)
        file.write_bytes(data)
        listed["size_bytes"], listed["crc32c"] = len(data), crc_hex(data)
    if vote is None:
        bodies = [unsealed(step / "votes" / f"rank_{number:05d}.json") for number in range(len(record["votes"]))]
        record["size_bytes"] = sum(map(_total, bodies))
    if commit is not None:
        commit(record)
    (step / "commit.json").write_bytes(sealed(record))


def forge_slot(
    own: Path,
    step: int,
    *,
    files: dict[str, bytes | Callable[[Record], object]] | None = None,
    vote: Callable[[Record], object] | None = None,
    index: Callable[[Record], object] | None = None,
    commit: Callable[[Record], object] | None = None,
    rank: int = 0,
) -> None:
    """As :func:`forge`, for a rank's part of a step in a node's memory or on its disk.

    Args:
        own: the folder of the slots.
        step: which.
        files: see :func:`forge`; new ones are put behind the others.
        vote, commit: see :func:`forge`.
        index: a change of the slot's index, which has the vote and ``places``.
        rank: whose part.
    """
    file = next(
        path
        for path in own.glob("*.json")
        if (found := unsealed(path)["vote"])["step"] == step and found["rank"] == rank
    )
    body = unsealed(file)
    data = bytearray(file.with_suffix(".data").read_bytes())
    for entry in body["vote"]["files"]:
        path = entry["path"]
        if path not in (files or {}):
            continue
        content = (files or {})[path]
        at = body["places"][path]
        if callable(content):
            document = json.loads(data[at : at + entry["size_bytes"]])
            content(document)
            content = json.dumps(document).encode()
        body["places"][path] = len(data)
        entry["size_bytes"], entry["crc32c"] = len(content), crc_hex(content[: -CRC_BYTES if entry["chunk"] else None])
        data += content
    file.with_suffix(".data").write_bytes(data)
    if vote is not None:
        vote(body["vote"])
    if index is not None:
        index(body)
    file.write_bytes(sealed(body))
    try:
        counted = seal(unseal_placed(file.read_bytes(), file.name).vote)
    except Fault:
        counted = b""  # it is refused before it is counted
    path = next(path for path in own.glob("*.commit") if unsealed(path)["step"] == step)
    record = unsealed(path)
    record["votes"][rank]["size_bytes"], record["votes"][rank]["crc32c"] = max(1, len(counted)), crc_hex(counted)
    if commit is not None:
        commit(record)
    path.write_bytes(sealed(record))


def _total(body: Record) -> int:
    try:
        return sum(int(entry["size_bytes"]) for entry in body["files"])
    except (KeyError, TypeError, ValueError):
        return 0  # forged beyond counting


def places_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON document, but for the document itself."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places_in(item, (*path, key))


def put_at(value: Any, path: tuple[Any, ...], new: Any) -> None:
    """Replace, or with REMOVED remove, what is at a path."""
    for key in path[:-1]:
        value = value[key]
    if new is REMOVED:
        del value[path[-1]]
    else:
        value[path[-1]] = new
