"""Copies of this rank's slots in another node's memory, sent over connections of their own.

The receiver verifies each file as it arrives, and publishes the copy's index only once the copy is whole. From then on
a restore finds it as it finds what the node's own ranks saved.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from outlast.checkpoint.format.names import PARTNER
from outlast.checkpoint.format.records import Commit, Fault, SlotIndex, check_file, seal, unseal_commit, unseal_placed
from outlast.checkpoint.peers.channel import Channel, Header
from outlast.checkpoint.peers.topology import Meeting
from outlast.checkpoint.save.request import SaveContext, SaveRequest
from outlast.checkpoint.tiers.replication import Replication
from outlast.checkpoint.tiers.slots import Slot, Slots, put_commit
from outlast.checkpoint.tiers.tier import StagedSave, Tier
from outlast.errors import CheckpointError
from outlast.events import Event

_log = logging.getLogger("outlast.checkpoint")


class PartnerTier(Tier):
    """See :class:`Tier`. The copies of this rank's slots that a rank on another node keeps.

    Args:
        context: who saves.
        partner: the rank that keeps the copies.
        meeting: its address.
    """

    name = PARTNER

    def __init__(self, context: SaveContext, partner: int, meeting: Meeting) -> None:
        super().__init__(context)
        self._partner = partner
        self._meeting = meeting
        self._channel: Channel | None = None

    def due(self, request: SaveRequest) -> bool:
        """See :class:`Tier`."""
        return request.replicate_now or request.step % self._context.config.partner_every_steps == 0

    def start(self, staged: StagedSave) -> None:
        """See :class:`Tier`; a save that does not count in memory is not sent."""
        if staged.commit is None:
            return
        on_event, silent_s = self._context.on_event, self._context.config.commit_timeout_s
        copy = PartnerReplication(self._connect, staged.slot, staged.index, staged.commit, on_event, silent_s)
        staged.slot.sent = True
        self._begin(copy, staged.slot)

    def abort(self, reason: Exception) -> None:
        """See :class:`Tier`: what is being sent is broken off."""
        self._disconnect()

    def close(self) -> None:
        """See :class:`Tier`."""
        super().close()
        self._disconnect()

    def _connect(self) -> Channel:
        """A connection for one copy alone, so that what goes wrong with one does not reach the next."""
        self._disconnect()
        self._channel = Channel.dial(
            self._meeting.nodes.addresses[self._partner],
            self._meeting.secret,
            self._context.config.commit_timeout_s,
        )
        self._channel.send({"for": PARTNER, "rank": self._context.rank})
        return self._channel

    def _disconnect(self) -> None:
        if self._channel is not None:
            self._channel.close()


class PartnerReplication(Replication):
    """See :class:`Replication`.

    Args:
        connect: opens a connection to the partner.
        slot, index, commit, on_event, silent_s: see :class:`Replication`.
    """

    tier = PARTNER
    target = "the partner's memory"

    def __init__(
        self,
        connect: Callable[[], Channel],
        slot: Slot,
        index: SlotIndex,
        commit: Commit,
        on_event: Callable[[Event], None],
        silent_s: float,
    ) -> None:
        super().__init__(slot, index, commit, on_event, silent_s)
        self._connect = connect

    def _copy(self) -> None:
        channel = self._connect()
        vote = self._index.vote
        channel.send({"begin": vote.save_id, "nbytes": self._slot.used})
        _expect_ok(channel.receive())
        memory = self._slot.memory.numpy().data
        for entry in vote.files:
            at = self._index.places[entry.path]
            channel.send({"at": at}, [memory[at : at + entry.size_bytes]])
        channel.send({"index": seal(self._index).decode(), "commit": seal(self._commit).decode()})
        _expect_ok(channel.receive())


def _expect_ok(answer: Header) -> None:
    if not answer.get("ok"):
        raise CheckpointError(f"the partner refused the copy: {answer.get('problem', answer)}")


class PartnerReceiver:
    """Keeps the copies that ranks on other nodes send to this one. Called from the connections' threads.

    Args:
        folder: of this node's memory.
        attempt_id: copies of other attempts are refused.
        keep: newest copies of each rank that are not overwritten.
    """

    def __init__(self, folder: Path, attempt_id: str, keep: int) -> None:
        self._folder = folder
        self._attempt_id = attempt_id
        self._keep = keep
        self._slots: dict[int, Slots] = {}

    def receive(self, rank: int, channel: Channel) -> None:
        """Receive one copy from ``rank``, and answer whether it counts.

        Raises:
            OSError: the connection broke.
        """
        begin = channel.receive()
        slots = self._slots.setdefault(rank, Slots(self._folder / PARTNER, self._attempt_id, rank, self._keep))
        problem = ""
        try:
            slot = slots.take(int(begin["nbytes"]))
            channel.send({"ok": True})
            self._fill(rank, channel, slot)
        except Fault as fault:
            problem = f"damaged in transit: {fault}"
        except CheckpointError as error:
            problem = error.what
        except ConnectionError:
            raise
        except (OSError, MemoryError) as error:
            problem = f"{self._folder}: {error}"
        if problem:
            _log.warning("refused a copy from rank %d: %s", rank, problem)
        channel.send({"problem": problem, "ok": not problem})

    def remove(self) -> None:
        """Give the memory back."""
        for slots in self._slots.values():
            slots.remove()

    def _fill(self, rank: int, channel: Channel, slot: Slot) -> None:
        memory = slot.memory.numpy().data

        def target(header: Header, size_bytes: int) -> memoryview | None:
            at = int(header["at"])
            return memory[at : at + size_bytes] if 0 <= at <= len(memory) - size_bytes else None

        while "index" not in (header := channel.receive(target)):
            continue
        index = unseal_placed(header["index"].encode(), "index")
        if index.vote.rank != rank or index.vote.attempt_id != self._attempt_id:
            raise CheckpointError(
                f"a copy of rank {index.vote.rank}, attempt {index.vote.attempt_id}, from rank {rank}"
            )
        for entry in index.vote.files:
            at = index.places[entry.path]
            check_file(entry, memory[at : at + entry.size_bytes])
        record = header["commit"].encode()
        commit = unseal_commit(record)
        put_commit(self._folder, commit, record)
        slot.publish(index)
        slot.step = commit.step
