"""The tiers of one rank: host memory, and those fed from it: storage, the partner's memory, and the node's own disk.

Every save goes to memory first, which takes no longer than a copy, and from there to the tiers for which it is due.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from outlast.checkpoint.format.names import MEMORY, PARTNER
from outlast.checkpoint.peers.channel import Channel
from outlast.checkpoint.peers.collectives import Agreement
from outlast.checkpoint.peers.commit_protocol import CommitProtocol
from outlast.checkpoint.peers.topology import CHOOSE, Meeting, meet
from outlast.checkpoint.save.request import SaveContext, SaveRequest
from outlast.checkpoint.tiers import slots
from outlast.checkpoint.tiers.folders import OWN, SHM_ROOT, agree_on_names, local_folder
from outlast.checkpoint.tiers.local_disk import DiskTier, LocalDisk
from outlast.checkpoint.tiers.memory_save import Memory, MemorySave, slot_bytes
from outlast.checkpoint.tiers.partner import PartnerReceiver, PartnerTier
from outlast.checkpoint.tiers.run_lock import RunLock
from outlast.checkpoint.tiers.slots import Slots
from outlast.checkpoint.tiers.storage import StorageTier
from outlast.checkpoint.tiers.tier import Tier
from outlast.errors import CheckpointError
from outlast.events import CheckpointFailed

_log = logging.getLogger("outlast.checkpoint")


class Tiers:
    """Memory and the tiers it feeds. Methods are for the training thread.

    Construction is collective over ``agreement``. A rank that cannot listen makes all ranks raise; what else fails (no
    shared memory, no disk, rank 0 out of reach) is raised on that rank alone.

    Args:
        context: who saves; its store is the tier of storage.
        agreement: over the training's ranks; used while constructing, never for saves.
        host: address to listen on; None: that of ``checkpoint.interface``, or the one that leads to the others.

    Raises:
        CheckpointError: no shared memory, no room for the local disk's folder, or the ranks cannot reach one another.
    """

    def __init__(self, context: SaveContext, agreement: Agreement, host: str | None) -> None:
        config, rank = context.config, context.rank
        self._context = context
        roots = [SHM_ROOT]
        if config.local_every_steps:
            assert config.local_dir is not None
            roots.append(Path(config.local_dir))
        names = agree_on_names(agreement, context.store.url, roots)
        self._lock = RunLock(context.store.url, name=names[0])
        self.folder = self._lock.folder
        # Both must be there before anybody can dial.
        self._received = PartnerReceiver(self.folder, context.attempt_id, max(2, config.memory_keep_last))
        self._protocol = CommitProtocol(rank, context.world_size, config.commit_timeout_s)
        self.meeting = meet(
            agreement, rank, context.world_size, host, config.interface, self._answer, config.commit_timeout_s
        )
        self._connect_protocol()
        is_node_leader = self.meeting.nodes.ranks_with(rank)[0] == rank
        self._storage = StorageTier(context)
        self._partner = _partner_tier(context, self.meeting)
        self._disk: DiskTier | None = None
        disk: LocalDisk | None = None
        if config.local_every_steps:
            folder = local_folder(context.store.url, roots[1], names[1])
            disk = LocalDisk(folder, context, is_node_leader)
            self._disk = DiskTier(context, disk)
        self._memory = Memory(
            context=context,
            folder=self.folder,
            slots=Slots(self.folder / OWN, context.attempt_id, rank, config.memory_keep_last),
            is_node_leader=is_node_leader,
            protocol=self._protocol,
            disk=disk,
        )
        fed: list[Tier | None] = [self._storage, self._partner, self._disk]
        self._fed = [tier for tier in fed if tier is not None]
        self._durable: MemorySave | None = None
        """The newest save that is to reach storage, while it is on its way to memory."""

    def begin(self, request: SaveRequest) -> MemorySave | None:
        """Begin to save into memory, and from there into the tiers for which the save is due.

        Waits for the copy before to arrive in each of those tiers.

        Returns:
            The save, not started yet. None: there is no shared memory for it, which is reported.

        Raises:
            Exception: a bug that ended a copy before, or an error of ``on_event``.
        """
        due = []
        for tier in [tier for tier in self._fed if tier.due(request)]:
            tier.wait(request.step)
            if not tier.refuses(request.step):
                due.append(tier)
        try:
            slot = self._memory.slots.take(slot_bytes(self._context, request))
        except OSError as error:
            reason = f"no shared memory for it: {error}"
            _log.warning("checkpoint of step %d failed in memory: %s", request.step, reason)
            self._context.on_event(CheckpointFailed(step=request.step, reason=reason, tier=MEMORY))
            self._protocol.announce_failure(request.save_id, reason)
            return None
        save = MemorySave(self._memory, request, slot, due)
        if request.durable:
            self._durable = save
        return save

    def announce_failure(self, save_id: int, reason: str) -> None:
        """Tell the other ranks that this one cannot even begin a save."""
        self._protocol.announce_failure(save_id, reason)

    @property
    def storing(self) -> bool:
        """Whether a save is on its way to storage."""
        return self._storage.running or (self._durable is not None and not self._durable.done.is_set())

    @property
    def copies_in_memory(self) -> int:
        """In how many nodes' memory each rank's part should be."""
        return 2 if self._partner is not None else 1

    @property
    def disk_folder(self) -> Path | None:
        """Where the tier on this node's own disk keeps its copies; None: there is no such tier."""
        return self._memory.disk.folder if self._memory.disk is not None else None

    @property
    def is_node_leader(self) -> bool:
        """Whether this rank sees to what earlier attempts left on its node."""
        return self._memory.is_node_leader

    def steps_of_earlier_attempts(self) -> list[int]:
        """The committed steps of earlier attempts in this node's memory and on its disk."""
        records = [commit for folder in self._folders for commit in slots.commits(folder).values()]
        return sorted({commit.step for commit in records if commit.attempt_id != self._context.attempt_id})

    def start_anew(self) -> None:
        """Remove what earlier attempts left in memory and on disk: this run does not go on from it."""
        if self._memory.is_node_leader:
            for folder in self._folders:
                slots.clear(folder, 0, self._context.attempt_id)

    @property
    def _folders(self) -> list[Path]:
        return [self.folder, *([self.disk_folder] if self.disk_folder is not None else [])]

    def finish(self, save_id: int, check: Callable[[], None] = lambda: None) -> None:
        """Wait until all tiers have what is on its way to them.

        Memory, and the room on the disk, is given back if storage has all that is in memory. If not, it stays for the
        next attempt, which is logged. The ranks wait for one another, so that none is gone while another still sends to
        it; a rank that is lost is not waited for.

        Args:
            save_id: of no save.
            check: called while the others are waited for; raises CheckpointError to end that.

        Raises:
            Exception: a bug that ended a copy, or an error of ``on_event``.
        """
        self.wait()
        newest = self._memory.slots.newest
        try:
            stored = self._part(save_id, self._storage.has(newest), check)
        except (OSError, CheckpointError) as error:
            _log.warning("this rank ends without waiting for the others: %s", error)
            stored = False
        if stored:
            self._give_back()
        elif newest is not None and self._memory.is_node_leader:
            _log.warning(
                "step %d is in shared memory alone, in %s, and stays there; `outlast ckpt memory` can give it back",
                newest,
                self.folder,
            )

    def _part(self, save_id: int, stored: bool, check: Callable[[], None]) -> bool:
        """Wait until all ranks are here; whether all of them see the newest step stored."""
        if self._context.world_size == 1:
            return stored
        if self._context.rank == 0:
            votes = self._protocol.collect_votes(save_id, check)
            stored = stored and all(vote["stored"] for vote in votes.values())
            self._protocol.announce({"serial": save_id, "stored": stored})
            return stored
        self._protocol.vote({"serial": save_id, "stored": stored})
        return bool(self._protocol.wait_decision(save_id, check)["stored"])

    def _give_back(self) -> None:
        self._memory.slots.remove()
        self._received.remove()
        if self._memory.disk is not None:
            self._memory.disk.remove()
        self.start_anew()  # earlier attempts' steps are of no more use than this one's
        if self._memory.is_node_leader:
            for folder in self._folders:
                slots.remove_records(folder, self._context.attempt_id)

    def wait(self) -> None:
        """Wait until what is on its way has arrived, or has failed; raises as :meth:`finish` does."""
        for tier in self._fed:
            tier.finish()

    def wait_partner(self) -> None:
        """Wait until the copy on its way to the partner is there, or has failed; raises as :meth:`finish` does."""
        if self._partner is not None:
            self._partner.finish()

    def raise_errors(self) -> None:
        """Raise what must be raised of copies that have ended, without waiting."""
        for tier in self._fed:
            tier.raise_error()

    def end_within(self, limit_s: float, reason: Exception) -> None:
        """Wait for what is on its way, for so long in all at most, and give up the rest."""
        deadline = time.monotonic() + limit_s
        for tier in self._fed:
            if not tier.ends_within(deadline - time.monotonic()):
                tier.abort(reason)

    def abort(self, reason: Exception) -> None:
        """Give up what is on its way."""
        for tier in self._fed:
            tier.abort(reason)

    def close(self) -> None:
        """Wait for the threads, and close the connections."""
        for tier in self._fed:
            tier.close()
        self._protocol.close()
        self.meeting.close()
        self._lock.close()

    def _answer(self, channel: Channel) -> None:
        """Serve a peer that has dialled this rank."""
        hello = channel.receive()
        serve = self._received.receive if hello["for"] == PARTNER else self._protocol.read_votes
        serve(int(hello["rank"]), channel)

    def _connect_protocol(self) -> None:
        try:
            self._protocol.connect(self.meeting)
        except OSError as error:
            self.meeting.close()
            address, port = self.meeting.nodes.addresses[0]
            raise CheckpointError(
                f"rank {self._context.rank} cannot reach rank 0 at {address}:{port}: {error}",
                f"check the network between the nodes; {CHOOSE}",
            ) from error


def _partner_tier(context: SaveContext, meeting: Meeting) -> PartnerTier | None:
    if not context.config.partner_every_steps:
        return None
    partner = meeting.nodes.partner_of(context.rank)
    if partner is None:
        _log.warning("checkpoint.partner_every_steps: there is one node, so no other can keep copies of its memory")
        context.on_event(CheckpointFailed(step=0, tier=PARTNER, reason="there is one node: no other can keep copies"))
        return None
    return PartnerTier(context, partner, meeting)
