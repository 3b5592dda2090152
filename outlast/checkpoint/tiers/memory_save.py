"""One save of one rank into host memory that outlives the process; the other tiers are fed from there.

1. The rank's part is copied into a slot of shared memory, checksummed as it is read and again as it lies there.
2. Once the training thread has confirmed that nothing changed, the rank writes down what is in the slot, and votes:
   to rank 0, over a connection of its own.
3. Rank 0 has all votes, makes the commit record, and sends it to all; each node keeps it beside its slots. A step in
   memory counts where a node has its commit record, and all ranks' parts are in some node's memory.

Then the copies to the partner and to storage begin, from the slot, for those saves for which they are due.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outlast.checkpoint.format.names import MEMORY, vote_path
from outlast.checkpoint.format.records import (
    CRC_BYTES,
    Commit,
    FileEntry,
    SlotIndex,
    Vote,
    crc_hex,
    seal,
    unseal_commit,
    unseal_vote,
)
from outlast.checkpoint.format.zarr import node_path, root_document
from outlast.checkpoint.memory.arena import room
from outlast.checkpoint.peers.commit_protocol import Control
from outlast.checkpoint.save.job import SaveJob, in_words
from outlast.checkpoint.save.plan import RankPlan
from outlast.checkpoint.save.snapshot import Snapshot
from outlast.checkpoint.save.source import Copied, TensorSource
from outlast.checkpoint.tiers import slots
from outlast.checkpoint.tiers.local_disk import LocalDisk
from outlast.checkpoint.tiers.slots import Slot, Slots
from outlast.errors import CheckpointError, StateMismatch
from outlast.events import CheckpointSaved, Event


@dataclass(frozen=True)
class Memory:
    """Who saves, and into whose memory."""

    folder: Path
    rank: int
    world_size: int
    attempt_id: str
    keep: int
    slots: Slots
    is_node_leader: bool
    """Whether this rank clears up on its node."""
    control: Control
    disk: LocalDisk | None
    """This node's own; None: there is no such tier."""
    on_event: Callable[[Event], None]
    committed: deque[int] = field(default_factory=deque)
    """Serials of the newest committed saves, by the rank that leads."""


@dataclass(frozen=True)
class Held:
    """A part that is whole in its slot."""

    slot: Slot
    parts: tuple[Copied, ...]
    placed: SlotIndex
    commit: Commit | None
    """None: it does not count, some rank has failed."""


class MemorySave(SaveJob):
    """See the module. It runs from :meth:`start` on.

    Args:
        memory: who, and where.
        step: of the state.
        save_id: number of the save.
        share: what this rank saves.
        snapshot: of the share's parts.
        documents: what this rank saves besides chunks.
        slot: with room for :func:`slot_bytes`.
        began: when ``save`` was called, by ``time.monotonic``.
        then: called, in the save's thread, with what is in the slot, or the reason for which it is not whole.
    """

    def __init__(
        self,
        memory: Memory,
        step: int,
        save_id: int,
        documents: dict[str, bytes],
        share: RankPlan,
        snapshot: Snapshot,
        slot: Slot,
        began: float,
        then: Callable[[Held | Exception], None],
    ) -> None:
        source = TensorSource(share, snapshot, slot, verify=True)
        super().__init__(step, source, snapshot)
        self._memory = memory
        self._save_id = save_id
        self._documents = documents
        self._digest = share.digest
        self._source = source
        self._slot = slot
        self._began = began
        self._then = then

    def _run(self) -> None:
        try:
            self._save()
        except Exception as error:  # a bug, or the event sink's: raised in the training thread
            self.error = error
        finally:
            self._end()

    def _save(self) -> None:
        memory = self._memory
        parts: tuple[Copied, ...] = ()
        placed = commit = None
        try:
            parts = self._copy()
            self._confirmed.wait()
            self._check_cancelled()
            placed = self._place(parts)
            commit = self._agree(placed.vote)
            slots.put_commit(memory.folder, commit, seal(commit))
            self._slot.step, self._slot.save_id = self.step, self._save_id
            size_bytes = sum(entry.size_bytes for entry in placed.vote.files)
            memory.on_event(
                CheckpointSaved(
                    step=self.step,
                    committed=memory.rank == 0,
                    tier=MEMORY,
                    size_bytes=size_bytes,
                    blocked_s=self.blocked_s,
                    predicted_stall_s=self.predicted_stall_s,
                    durable_s=time.monotonic() - self._began,
                )
            )
            self._clear_up()
        except Exception as error:
            reason = self._stop or error
            if commit is None:
                memory.control.say_failed(self._save_id, in_words(reason))
                self._report(reason, MEMORY, memory.on_event)
            if placed is None:
                self._then(reason)
                return
            if commit is not None:
                raise
        self._then(Held(self._slot, parts, placed, commit))
        with suppress(OSError):  # no memory for it: said when it is needed
            memory.slots.prepare(self._slot.memory.numel())

    def _clear_up(self) -> None:
        """What attempts before left goes with this attempt's first commits, and old commit records with each."""
        memory = self._memory
        if not memory.is_node_leader:
            return
        memory.committed.append(self._save_id)
        if self._save_id <= memory.keep + 1:
            slots.clear(memory.folder, memory.keep, memory.attempt_id)
        for save_id in [save_id for save_id in memory.committed if save_id not in memory.slots.save_ids]:
            slots.drop_commit(memory.folder, memory.attempt_id, save_id)
            memory.committed.remove(save_id)

    def _copy(self) -> tuple[Copied, ...]:
        return tuple(copied for copied in self._source.copies(self._check_cancelled) if copied is not None)

    def _place(self, parts: tuple[Copied, ...]) -> SlotIndex:
        entries, places = [], {}
        base = self._slot.memory.data_ptr()
        for part in parts:
            entries.append(FileEntry(part.path, part.nbytes + CRC_BYTES, f"{part.crc:08x}", True))
            places[part.path] = part.memory.data_ptr() - base
        for path, data in self._documents.items():
            region = self._slot.take(len(data))
            region.memory.numpy().data[: len(data)] = data
            entries.append(FileEntry(path, len(data), crc_hex(data), False))
            places[path] = region.offset
        memory = self._memory
        files = tuple(sorted(entries, key=lambda entry: entry.path))
        vote = Vote(self.step, memory.rank, memory.world_size, memory.attempt_id, self._save_id, self._digest, files)
        placed = SlotIndex(vote, places)
        self._slot.publish(placed)
        return placed

    def _agree(self, vote: Vote) -> Commit:
        memory, text = self._memory, seal(vote)
        if memory.rank != 0:
            memory.control.vote({"serial": self._save_id, "vote": text.decode(), "local": _on_disk(memory)})
            decision = memory.control.decision(self._save_id, self._check_cancelled)
            if "failed" in decision:
                raise CheckpointError(f"rank 0 gave up: {decision['failed']}")
            if memory.disk is not None:
                memory.disk.everywhere = decision["local"]
            return unseal_commit(decision["commit"].encode())
        votes = [text]
        headers = memory.control.collect(self._save_id, self._check_cancelled)
        for rank in range(1, memory.world_size):
            votes.append(headers[rank]["vote"].encode())
            other = unseal_vote(votes[rank], vote_path(self.step, rank))
            if (other.step, other.rank, other.attempt_id) != (self.step, rank, memory.attempt_id):
                raise CheckpointError(f"rank {rank} votes for step {other.step}, not for step {self.step}")
            if other.layout != self._digest:
                raise StateMismatch(
                    f"the replicated state of rank {rank} has other names, shapes or types than rank 0's",
                    "pass the same keys on all ranks; what differs belongs into local",
                )
        commit = commit_of(votes)
        held = [_on_disk(memory), *(header["local"] for header in headers.values())]
        everywhere = max(set.intersection(*map(set, held)), default=0)
        memory.control.tell({"serial": self._save_id, "commit": seal(commit).decode(), "local": everywhere})
        if memory.disk is not None:
            memory.disk.everywhere = everywhere
        return commit


def _on_disk(memory: Memory) -> list[int]:
    """The saves that this rank has on its node's disk; which of them all ranks have is agreed with each commit."""
    return list(memory.disk.held) if memory.disk is not None else []


def all_documents(share: RankPlan, memory: Memory, step: int, save_id: int, root: dict[str, Any]) -> dict[str, bytes]:
    """What a rank saves besides chunks; rank 0 has the root group's document."""
    if memory.rank != 0:
        return share.documents
    top = root_document(root, step, memory.world_size, memory.attempt_id, save_id)
    return {node_path(""): top, **share.documents}


def slot_bytes(share: RankPlan, documents: dict[str, bytes]) -> int:
    """Memory that a rank's part takes."""
    return sum(room(part.nbytes + CRC_BYTES) for part in share.parts) + sum(map(room, map(len, documents.values())))


def commit_of(votes: list[bytes]) -> Commit:
    """The commit record of a save, from all ranks' sealed votes, by rank."""
    parsed = [unseal_vote(data, f"votes of rank {rank}") for rank, data in enumerate(votes)]
    first = parsed[0]
    entries = tuple(
        FileEntry(vote_path(first.step, rank).partition("/")[2], len(data), crc_hex(data), False)
        for rank, data in enumerate(votes)
    )
    size_bytes = sum(entry.size_bytes for vote in parsed for entry in vote.files)
    return Commit(first.step, first.world_size, first.attempt_id, first.save_id, time.time(), size_bytes, entries)
