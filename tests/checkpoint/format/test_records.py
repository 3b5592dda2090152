"""Records keep their bytes: what the versions before wrote is read, and what is written is the same."""

from __future__ import annotations

from dataclasses import replace

import pytest

from outlast.checkpoint.format.records import (
    Commit,
    Fault,
    FileEntry,
    SlotIndex,
    Vote,
    crc_hex,
    seal,
    unseal_commit,
    unseal_placed,
    unseal_vote,
)

VOTE = Vote(
    step=40,
    rank=1,
    world_size=2,
    attempt_id="00c0ffee",
    save_id=7,
    layout="5eed5eed",
    files=(FileEntry("model/w/c.0", 12, "0123abcd", True), FileEntry("model/zarr.json", 30, "89abcdef", False)),
)
VOTE_BYTES = b"""{
 "format_version": 2,
 "kind": "vote",
 "step": 40,
 "rank": 1,
 "world_size": 2,
 "epoch": "00c0ffee",
 "serial": 7,
 "layout": "5eed5eed",
 "files": [
  {
   "path": "model/w/c.0",
   "size_bytes": 12,
   "crc32c": "0123abcd",
   "chunk": true
  },
  {
   "path": "model/zarr.json",
   "size_bytes": 30,
   "crc32c": "89abcdef",
   "chunk": false
  }
 ],"crc32c":"253cc786"}
"""

COMMIT = Commit(
    step=40,
    world_size=1,
    attempt_id="00c0ffee",
    save_id=7,
    saved_at=1700000000.5,
    size_bytes=84,
    votes=(FileEntry("votes/rank_00000.json", 100, "11111111", False),),
)
COMMIT_BYTES = b"""{
 "format_version": 2,
 "kind": "commit",
 "step": 40,
 "world_size": 1,
 "epoch": "00c0ffee",
 "serial": 7,
 "saved_at": 1700000000.5,
 "size_bytes": 84,
 "votes": [
  {
   "path": "votes/rank_00000.json",
   "size_bytes": 100,
   "crc32c": "11111111",
   "chunk": false
  }
 ],"crc32c":"2a14ddac"}
"""

INDEX = SlotIndex(VOTE, {"model/w/c.0": 0, "model/zarr.json": 4096})
INDEX_BYTES = b"""{
 "format_version": 2,
 "kind": "placed",
 "vote": {
  "step": 40,
  "rank": 1,
  "world_size": 2,
  "epoch": "00c0ffee",
  "serial": 7,
  "layout": "5eed5eed",
  "files": [
   {
    "path": "model/w/c.0",
    "size_bytes": 12,
    "crc32c": "0123abcd",
    "chunk": true
   },
   {
    "path": "model/zarr.json",
    "size_bytes": 30,
    "crc32c": "89abcdef",
    "chunk": false
   }
  ]
 },
 "places": {
  "model/w/c.0": 0,
  "model/zarr.json": 4096
 },"crc32c":"3bd9ab87"}
"""


def version_3(data: bytes) -> bytes:
    """What this version writes: the same but for the number of the version."""
    body = data.replace(b'"format_version": 2', b'"format_version": 3').rpartition(b',"crc32c":')[0]
    return body + b',"crc32c":"' + crc_hex(body).encode() + b'"}\n'


def test_the_bytes_of_a_record_do_not_change() -> None:
    assert seal(VOTE) == version_3(VOTE_BYTES)
    assert seal(COMMIT) == version_3(COMMIT_BYTES)
    assert seal(INDEX) == version_3(INDEX_BYTES)


def test_records_of_the_version_before_are_read() -> None:
    assert unseal_vote(VOTE_BYTES, "a vote") == VOTE
    assert unseal_commit(COMMIT_BYTES) == replace(COMMIT, format_version=2)
    assert unseal_placed(INDEX_BYTES, "an index") == INDEX


@pytest.mark.parametrize("key", [b'"epoch"', b'"serial"'])
def test_only_the_keys_of_the_format_are_taken(key: bytes) -> None:
    renamed = {b'"epoch"': b'"attempt_id"', b'"serial"': b'"save_id"'}[key]
    body = COMMIT_BYTES.replace(key, renamed).rpartition(b',"crc32c"')[0]
    with pytest.raises(Fault, match="is not a commit record"):
        unseal_commit(body + b',"crc32c":"' + crc_hex(body).encode() + b'"}\n')
