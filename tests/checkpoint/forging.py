"""Forged steps: one thing in a real step is changed, and all checksums up to the commit record are made right again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from outlast.checkpoint.format.records import CRC_BYTES, crc_hex

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
