"""One save of one rank into host memory that outlives the process; the other tiers are fed from there.

1. The rank's part is copied into a slot of shared memory, and checksummed both as it is read and in the slot.
2. Once the training thread has confirmed that nothing changed, the rank publishes the slot's index, and sends its vote
   to rank 0, over a dedicated connection.
3. Rank 0 collects all votes, makes the commit record and sends it to all; each node keeps it beside its slots. A step
   in memory counts if some node has its commit record, and every rank's part is in some node's memory.

Then the copies to the tiers for which one is due begin, from the slot.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from outlast.checkpoint.format.names import MEMORY
from outlast.checkpoint.format.records import (
    CRC_BYTES,
    Commit,
    Fault,
    FileEntry,
    SlotIndex,
    Vote,
    crc_hex,
    seal,
    unseal_commit,
)
from outlast.checkpoint.format.zarr import node_path
from outlast.checkpoint.memory.arena import room
from outlast.checkpoint.peers.commit_protocol import CommitProtocol
from outlast.checkpoint.save.background import failure_text, must_be_raised
from outlast.checkpoint.save.commit import ReceivedVote, build_commit, make_vote, read_vote
from outlast.checkpoint.save.job import SaveJob
from outlast.checkpoint.save.request import SaveContext, SaveRequest
from outlast.checkpoint.save.source import Copied, TensorSource
from outlast.checkpoint.tiers import slots
from outlast.checkpoint.tiers.local_disk import LocalDisk
from outlast.checkpoint.tiers.slots import Slot, Slots
from outlast.checkpoint.tiers.tier import StagedSave, Tier
from outlast.errors import CheckpointError
from outlast.events import CheckpointSaved

_log = logging.getLogger("outlast.checkpoint")


@dataclass(frozen=True)
class Memory:
    """Who saves, and into whose memory."""

    context: SaveContext
    folder: Path
    slots: Slots
    is_node_leader: bool
    """Whether this rank removes on its node what is no longer needed."""
    protocol: CommitProtocol
    disk: LocalDisk | None
    """This node's own; None: there is no such tier."""
    committed: deque[int] = field(default_factory=deque)
    """The newest committed saves, on the node's leader."""


class MemorySave(SaveJob):
    """See the module.

    Args:
        memory: who saves, and where to.
        request: what to save.
        slot: with room for :func:`slot_bytes`.
        feeds: the tiers for which this save is due.
    """

    def __init__(self, memory: Memory, request: SaveRequest, slot: Slot, feeds: Sequence[Tier]) -> None:
        assert request.snapshot is not None
        pin = slot.pin if request.snapshot.pinned else lambda: None
        replicas = request.replicas

        def prepare() -> None:
            replicas.digests()
            pin()

        source = TensorSource(request.plan, request.snapshot, slot, prepare=prepare, verify=True)
        # The other ranks' votes, and rank 0's decision, have limits of their own, which end first.
        super().__init__(memory.context, request, source, MEMORY, 3 * memory.context.config.commit_timeout_s)
        self._memory = memory
        self._slot = slot
        self._feeds = feeds

    def _where(self) -> str:
        return f"{self._memory.folder}, or in a copy from a device"

    # The save's own thread from here on.

    def _run(self) -> None:
        try:
            self._save()
        except Exception as error:  # a bug, or an error of on_event: raised in the training thread
            self.error = error
        finally:
            self._end()

    def _save(self) -> None:
        memory, context = self._memory, self._memory.context
        parts: tuple[Copied, ...] = ()
        index = commit = None
        counts = False
        try:
            self._check_cancelled()
            parts = tuple(copied for copied in self._source.copies(self._check_cancelled) if copied is not None)
            self._confirmed.wait()
            self._check_cancelled()
            index = self._publish(parts)
            commit = self._agree(index.vote)
            slots.put_commit(memory.folder, commit, seal(commit))
            self._ends()
            self._slot.step, self._slot.save_id = self.step, self._request.save_id
            counts = True
            context.on_event(
                CheckpointSaved(
                    step=self.step,
                    committed=context.rank == 0,
                    tier=MEMORY,
                    size_bytes=sum(entry.size_bytes for entry in index.vote.files),
                    blocked_s=self.blocked_s,
                    predicted_stall_s=self.predicted_stall_s,
                    durable_s=time.monotonic() - self._request.began,
                )
            )
            self._clear_up()
        except Exception as error:
            if counts:
                raise
            reason = self._stop or error
            if commit is None:
                memory.protocol.announce_failure(self._request.save_id, failure_text(reason))
            self._report(reason)
            commit = None
            if index is None:
                for tier in self._feeds:
                    tier.cancel(self._request, reason)
                return
        for tier in self._feeds:
            tier.start(StagedSave(self._request, self._slot, parts, index, commit))
        with suppress(OSError, MemoryError):  # no memory for it: reported when the slot is needed
            memory.slots.prepare(self._slot.memory.numel(), pinned=self._slot.pinned)

    def _clear_up(self) -> None:
        """Remove what is no longer needed; the next save tries again."""
        try:
            self._remove_old()
        except Exception as error:
            if must_be_raised(error):
                raise
            _log.warning("step %d is in memory, but old ones are not removed yet: %s", self.step, error)

    def _remove_old(self) -> None:
        """Remove old commit records; with this attempt's first commits, also what attempts before left."""
        memory, attempt_id, save_id = self._memory, self._memory.context.attempt_id, self._request.save_id
        if not memory.is_node_leader:
            return
        keep = memory.context.config.memory_keep_last
        memory.committed.append(save_id)
        if save_id <= keep + 1:
            slots.clear(memory.folder, keep, attempt_id)
        for old in [old for old in memory.committed if old not in memory.slots.save_ids]:
            slots.drop_commit(memory.folder, attempt_id, old)
            memory.committed.remove(old)

    def _publish(self, parts: Sequence[Copied]) -> SlotIndex:
        """Write the documents and the index of the slot."""
        entries, places = [], {}
        base = self._slot.memory.data_ptr()
        for part in parts:
            entries.append(FileEntry(part.path, part.nbytes + CRC_BYTES, f"{part.crc:08x}", True))
            places[part.path] = part.memory.data_ptr() - base
        context = self._memory.context
        for path, data in documents_of(context, self._request).items():
            region = self._slot.take(len(data))
            region.memory.numpy().data[: len(data)] = data
            entries.append(FileEntry(path, len(data), crc_hex(data), False))
            places[path] = region.offset
        index = SlotIndex(make_vote(context, self._request, entries), places)
        self._slot.publish(index)
        return index

    def _agree(self, vote: Vote) -> Commit:
        """Vote, and have rank 0's commit record; or, on rank 0, have all votes, and make it."""
        if self._memory.context.rank == 0:
            return self._commit(seal(vote))
        memory, save_id = self._memory, self._request.save_id
        memory.protocol.vote({"serial": save_id, "vote": seal(vote).decode(), "local": _on_disk(memory)})
        decision = memory.protocol.wait_decision(save_id, self._check_cancelled)
        if "failed" in decision:
            raise CheckpointError(f"rank 0 gave up: {decision['failed']}")
        if memory.disk is not None:
            memory.disk.complete_id = decision["local"]
        return unseal_commit(decision["commit"].encode())

    def _commit(self, own: bytes) -> Commit:
        memory, save_id = self._memory, self._request.save_id
        headers = memory.protocol.collect_votes(save_id, self._check_cancelled)
        votes = [self._read(own, 0)]
        votes += [self._read(headers[rank]["vote"].encode(), rank) for rank in range(1, memory.context.world_size)]
        commit = build_commit(votes, self._request.plan.digest)
        on_disks = [_on_disk(memory), *(header["local"] for header in headers.values())]
        complete_id = max(set.intersection(*map(set, on_disks)), default=0)
        memory.protocol.announce({"serial": save_id, "commit": seal(commit).decode(), "local": complete_id})
        if memory.disk is not None:
            memory.disk.complete_id = complete_id
        return commit

    def _read(self, data: bytes, rank: int) -> ReceivedVote:
        try:
            return read_vote(data, rank, self._memory.context, self._request)
        except Fault as fault:
            raise CheckpointError(f"the vote of rank {rank} does not count: {fault}") from fault


def _on_disk(memory: Memory) -> list[int]:
    """The saves that this rank has on its node's disk; with each commit, rank 0 finds those that all ranks have."""
    return list(memory.disk.save_ids) if memory.disk is not None else []


def documents_of(context: SaveContext, request: SaveRequest) -> dict[str, bytes]:
    """What a rank saves besides chunks; rank 0 also the root group's document."""
    if context.rank != 0:
        return request.plan.documents
    return {node_path(""): request.root_document(context), **request.plan.documents}


def slot_bytes(context: SaveContext, request: SaveRequest) -> int:
    """Memory that a rank's part takes."""
    sizes = [part.nbytes + CRC_BYTES for part in request.plan.parts]
    sizes += [len(data) for data in documents_of(context, request).values()]
    return sum(map(room, sizes))
