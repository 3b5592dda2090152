"""The tiers of one rank: host memory, the partner's memory, the node's disk, and storage, each with its own interval.

Every save goes to memory first, which takes a copy's time and no more, and from there to the others when they are due.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from outlast.checkpoint.format.names import LOCAL_DISK, MEMORY, PARTNER, STORAGE
from outlast.checkpoint.peers.channel import Channel
from outlast.checkpoint.peers.collectives import Agreement
from outlast.checkpoint.peers.commit_protocol import Control
from outlast.checkpoint.peers.topology import CHOOSE, meet
from outlast.checkpoint.save.job import raise_error
from outlast.checkpoint.save.plan import RankPlan
from outlast.checkpoint.save.request import SaveContext
from outlast.checkpoint.save.snapshot import Snapshot
from outlast.checkpoint.save.source import HeldSource
from outlast.checkpoint.save.storage_save import StorageSave
from outlast.checkpoint.tiers import slots
from outlast.checkpoint.tiers.local_disk import DiskReplication, LocalDisk
from outlast.checkpoint.tiers.memory_save import Held, Memory, MemorySave, all_documents, slot_bytes
from outlast.checkpoint.tiers.partner import Partner, PartnerReceiver, PartnerReplication
from outlast.checkpoint.tiers.replication import Replication
from outlast.checkpoint.tiers.run_lock import Use
from outlast.checkpoint.tiers.slots import OWN, Slots
from outlast.errors import CheckpointError
from outlast.events import CheckpointFailed

_log = logging.getLogger("outlast.checkpoint")
_BEHIND_S = 0.1


class Tiers:
    """Memory and what is fed from it; construction is collective. Methods are for the training thread.

    Args:
        context: who saves; its store is the tier of storage.
        agreement: over the training's ranks; used while constructing, never for saves.
        host: address to listen on; None: that of ``checkpoint.interface``, or the one that leads to the others.

    Raises:
        CheckpointError: no shared memory, or the ranks cannot listen.
    """

    def __init__(self, context: SaveContext, agreement: Agreement, host: str | None) -> None:
        config, rank = context.config, context.rank
        self._use = Use(context.store.url)
        self.folder = self._use.folder
        self._context = context
        self._keeper = PartnerReceiver(self.folder, context.attempt_id, max(2, config.memory_keep_last))
        # There before anybody can dial.
        self._control = Control(rank, context.world_size, config.commit_timeout_s)
        self.meeting = meet(
            agreement, rank, context.world_size, host, config.interface, self._serve, config.commit_timeout_s
        )
        nodes = self.meeting.nodes
        try:
            self._control.join(self.meeting)
        except OSError as error:
            self.meeting.close()
            address, port = nodes.addresses[0]
            raise CheckpointError(
                f"rank {rank} cannot reach rank 0 at {address}:{port}: {error}",
                f"see to the network between the nodes; {CHOOSE}",
            ) from error
        self._slots = Slots(self.folder / OWN, context.attempt_id, rank, config.memory_keep_last)
        is_node_leader = nodes.ranks_with(rank)[0] == rank
        self._disk: LocalDisk | None = None
        if config.local_every_steps:
            assert config.local_dir is not None
            there = slots.local_folder(context.store.url, Path(config.local_dir))
            self._disk = LocalDisk(there, context.attempt_id, rank, config.local_keep_last, is_node_leader)
        self._memory = Memory(
            folder=self.folder,
            rank=rank,
            world_size=context.world_size,
            attempt_id=context.attempt_id,
            keep=config.memory_keep_last,
            slots=self._slots,
            is_node_leader=is_node_leader,
            control=self._control,
            disk=self._disk,
            on_event=context.on_event,
        )
        partner = nodes.partner_of(rank)
        self._partner = None
        if config.partner_every_steps and partner is None:
            _log.warning("checkpoint.partner_every_steps: there is one node, so nobody keeps copies of its memory")
            context.on_event(CheckpointFailed(step=0, tier=PARTNER, reason="there is one node: nobody to keep copies"))
        elif config.partner_every_steps and partner is not None:
            self._partner = Partner(rank, partner, self.meeting, config.commit_timeout_s)
        self._storage: StorageSave | None = None
        self._before_storage: MemorySave | None = None
        """The newest save that is to reach storage, while it is on its way to memory."""
        self._sending: PartnerReplication | None = None
        self._to_disk: DiskReplication | None = None

    @property
    def _under_way(self) -> list[StorageSave | Replication]:
        """The newest copy to each tier that memory feeds."""
        return [copy for copy in (self._storage, self._sending, self._to_disk) if copy is not None]

    def begin(
        self,
        step: int,
        save_id: int,
        root: dict[str, Any],
        share: RankPlan,
        snapshot: Snapshot,
        began: float,
        durable: bool,
        partner_too: bool,
    ) -> MemorySave | None:
        """Begin to save into memory, and from there into what else is due.

        Waits for the copy before to arrive in each tier that is due again, and says so.

        Args:
            step, save_id, share, snapshot, began: see :class:`MemorySave`.
            root: attributes of the root group.
            durable: to storage too.
            partner_too: to the partner, whether it is due or not.

        Returns:
            None: there is no shared memory for it, which is reported.
        """
        behind_s = self._wait(self._storage, STORAGE, step) if durable else 0.0
        partner = self._partner if partner_too or self._partner_due(step) else None
        if partner is not None:
            self._wait(self._sending, PARTNER, step)
        every = self._context.config.local_every_steps
        disk = self._disk if every and step % every == 0 else None
        if disk is not None:
            self._wait(self._to_disk, LOCAL_DISK, step)
        documents = all_documents(share, self._memory, step, save_id, root)
        try:
            slot = self._slots.take(slot_bytes(share, documents), pinned=snapshot.pinned)
        except OSError as error:
            reason = f"no shared memory for it: {error}"
            _log.warning("checkpoint of step %d failed in memory: %s", step, reason)
            self._context.on_event(CheckpointFailed(step=step, reason=reason, tier=MEMORY))
            self._control.say_failed(save_id, reason)
            return None
        # Without the tensors, which must be let go of once they are copied.
        light = replace(share, parts=tuple(replace(part, contents=()) for part in share.parts))

        def then(held: Held | Exception) -> None:
            if durable:
                self._store(step, save_id, root, light, held, began, behind_s)
            if not isinstance(held, Held) or held.commit is None:
                return
            copies: list[Replication] = []
            if partner is not None:
                self._sending = PartnerReplication(
                    partner.channel, slot, held.placed, held.commit, self._context.on_event
                )
                slot.sent = True
                copies.append(self._sending)
            if disk is not None:
                self._to_disk = DiskReplication(disk, slot, held.placed, held.commit, self._context.on_event)
                copies.append(self._to_disk)
            for copy in copies:
                slot.readers.append(copy.done)
                copy.start()

        saving = MemorySave(self._memory, step, save_id, documents, share, snapshot, slot, began, then)
        if durable:
            self._before_storage = saving
        return saving

    @property
    def storing(self) -> bool:
        """Whether a save is on its way to storage."""
        return any(one is not None and not one.done.is_set() for one in (self._before_storage, self._storage))

    @property
    def copies_in_memory(self) -> int:
        """In how many nodes' memory each rank's part should be."""
        return 2 if self._partner is not None else 1

    @property
    def disk_folder(self) -> Path | None:
        """Where the tier on this node's own disk keeps its copies; None: there is no such tier."""
        return self._disk.folder if self._disk is not None else None

    def start_anew(self) -> None:
        """This run goes on from nothing that memory or disk holds: remove it on this node."""
        if self._memory.is_node_leader:
            for folder in self._folders:
                slots.clear(folder, 0, self._context.attempt_id)

    @property
    def _folders(self) -> list[Path]:
        return [self.folder] if self._disk is None else [self.folder, self._disk.folder]

    def finish(self, save_id: int) -> None:
        """Wait until all tiers have what is on its way to them, and raise what must be raised.

        Memory, and the room on the disk, is given back if storage has all that it holds; else it stays for the next
        attempt, which is logged.

        Args:
            save_id: of no save; the ranks part with it, so that none is gone while another still sends to it.
        """
        for copy in self._under_way:
            copy.done.wait()
            raise_error(copy)
        newest = self._slots.newest
        stored = self._storage is not None and self._storage.committed and self._storage.step == newest
        try:
            stored = self._part(save_id, stored)
        except (OSError, CheckpointError) as error:
            _log.warning("the other ranks were not waited for: %s", error)
            stored = False
        if stored:
            self._slots.remove()
            self._keeper.remove()
            if self._disk is not None:
                self._disk.remove()
            self.start_anew()  # what attempts before left is of no more use than what this one did
            if self._memory.is_node_leader:
                for folder in self._folders:
                    slots.remove_records(folder, self._context.attempt_id)
        elif newest is not None and self._memory.is_node_leader:
            _log.warning(
                "step %d lies in shared memory alone, in %s; it stays there; `outlast ckpt memory` can give it back",
                newest,
                self.folder,
            )

    def _part(self, save_id: int, stored: bool) -> bool:
        """Wait for all ranks to come here; whether the newest step is stored, as all of them see it."""
        if self._context.world_size == 1:
            return stored
        if self._context.rank == 0:
            votes = self._control.collect(save_id, _never)
            stored = stored and all(vote["stored"] for vote in votes.values())
            self._control.tell({"serial": save_id, "stored": stored})
            return stored
        self._control.vote({"serial": save_id, "stored": stored})
        return bool(self._control.decision(save_id, _never)["stored"])

    def wait_partner(self) -> None:
        """Wait until the copy that is on its way to the partner is there, or has failed."""
        if self._sending is not None:
            self._sending.done.wait()
            raise_error(self._sending)

    def raise_errors(self) -> None:
        """Raise what must be raised, without waiting."""
        for copy in self._under_way:
            if copy.done.is_set():
                raise_error(copy)

    def abort(self, reason: Exception) -> None:
        """Give up what is on its way."""
        if self._storage is not None:
            self._storage.give_up(reason)
        if self._partner is not None:
            self._partner.close()

    def close(self) -> None:
        """Wait for the threads, and close the connections."""
        for copy in self._under_way:
            copy.join()
        if self._partner is not None:
            self._partner.close()
        self._control.close()
        self.meeting.close()
        self._use.close()

    def _partner_due(self, step: int) -> bool:
        return self._partner is not None and step % self._context.config.partner_every_steps == 0

    def _store(
        self,
        step: int,
        save_id: int,
        root: dict[str, Any],
        share: RankPlan,
        held: Held | Exception,
        began: float,
        behind_s: float,
    ) -> None:
        parts = held.parts if isinstance(held, Held) else ()
        storage = StorageSave(self._context, step, save_id, root, share, HeldSource(parts), None, began)
        storage.blocked_s = behind_s
        self._storage = storage
        if isinstance(held, Held):
            held.slot.readers.append(storage.done)
        else:
            storage.give_up(held)  # it tells the other ranks, which wait for this one
        storage.start()

    def _wait(self, copy: StorageSave | Replication | None, tier: str, step: int) -> float:
        if copy is None:
            return 0.0
        began = time.monotonic()
        copy.done.wait()
        raise_error(copy)
        waited_s = time.monotonic() - began
        if waited_s > _BEHIND_S:
            _log.warning(
                "step %d: %s is behind, training waited %.1f s for the copy before; lengthen that tier's interval",
                step,
                tier,
                waited_s,
            )
        return waited_s

    def _serve(self, channel: Channel) -> None:
        """What a peer that has dialled wants."""
        hello = channel.receive()
        serve: Callable[[int, Channel], None] = self._keeper.serve if hello["for"] == PARTNER else self._control.serve
        serve(int(hello["rank"]), channel)


def _never() -> None:
    """Parting cannot be given up."""
