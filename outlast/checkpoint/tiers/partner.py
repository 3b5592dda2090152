"""Copies of this rank's slots in another node's memory, sent over connections of their own.

The receiver verifies each file as it arrives, and says what is in the copy only once it is whole; then a restore finds
it as it finds a node's own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from outlast.checkpoint.format.names import PARTNER
from outlast.checkpoint.format.records import Commit, Fault, SlotIndex, check_file, seal, unseal_commit, unseal_placed
from outlast.checkpoint.peers.channel import Channel, Header
from outlast.checkpoint.peers.topology import Meeting
from outlast.checkpoint.tiers.replication import Replication
from outlast.checkpoint.tiers.slots import Slot, Slots, put_commit
from outlast.errors import CheckpointError
from outlast.events import Event

_log = logging.getLogger("outlast.checkpoint")


class PartnerReplication(Replication):
    """See :class:`Replication`.

    Args:
        channel: opens the connection to the partner, or gives the one that is open.
        slot, placed, commit, on_event: as there.
    """

    tier = PARTNER
    where = "the partner's memory"

    def __init__(
        self,
        channel: Callable[[], Channel],
        slot: Slot,
        placed: SlotIndex,
        commit: Commit,
        on_event: Callable[[Event], None],
    ) -> None:
        super().__init__(slot, placed, commit, on_event)
        self._channel = channel

    def _copy(self) -> None:
        channel = self._channel()
        vote = self._placed.vote
        channel.send({"begin": vote.save_id, "nbytes": self._slot.used})
        _expect_ok(channel.receive())
        memory = self._slot.memory.numpy().data
        for entry in vote.files:
            at = self._placed.places[entry.path]
            channel.send({"at": at}, [memory[at : at + entry.size_bytes]])
        channel.send({"index": seal(self._placed).decode(), "commit": seal(self._commit).decode()})
        _expect_ok(channel.receive())


def _expect_ok(answer: Header) -> None:
    if not answer.get("ok"):
        raise CheckpointError(f"the partner refused the copy: {answer.get('problem', answer)}")


class Partner:
    """Where one rank's copies go.

    Args:
        rank: of this process.
        partner: the rank that keeps them.
        meeting: its address.
        timeout_s: how long the partner may be silent.
    """

    def __init__(self, rank: int, partner: int, meeting: Meeting, timeout_s: float) -> None:
        self._rank = rank
        self._partner = partner
        self._meeting = meeting
        self._timeout_s = timeout_s
        self._channel: Channel | None = None

    def channel(self) -> Channel:
        """The connection; it is made anew for each copy, so that what went wrong with one does not reach the next."""
        self.close()
        self._channel = Channel.dial(
            self._meeting.nodes.addresses[self._partner], self._meeting.secret, self._timeout_s
        )
        self._channel.send({"for": PARTNER, "rank": self._rank})
        return self._channel

    def close(self) -> None:
        """Break off what is being sent."""
        if self._channel is not None:
            self._channel.close()


class PartnerReceiver:
    """Keeps what other nodes' ranks send to this one.

    Args:
        folder: of this node's memory.
        attempt_id: of the attempt.
        keep: newest copies of each rank that are not overwritten.
    """

    def __init__(self, folder: Path, attempt_id: str, keep: int) -> None:
        self._folder = folder
        self._attempt_id = attempt_id
        self._keep = keep
        self._slots: dict[int, Slots] = {}

    def serve(self, rank: int, channel: Channel) -> None:
        """Take one copy from ``rank``."""
        begin = channel.receive()
        slots = self._slots.setdefault(rank, Slots(self._folder / PARTNER, self._attempt_id, rank, self._keep))
        problem = ""
        try:
            slot = slots.take(int(begin["nbytes"]))
            channel.send({"ok": True})
            self._fill(rank, channel, slot)
        except Fault as fault:
            problem = f"damaged on its way: {fault}"
        except CheckpointError as error:
            problem = error.what
        except ConnectionError:
            raise
        except OSError as error:
            problem = f"{self._folder}: {error}"
        if problem:
            _log.warning("a copy of rank %d's part is refused: %s", rank, problem)
        channel.send({"problem": problem, "ok": not problem})

    def remove(self) -> None:
        """Give the memory back."""
        for slots in self._slots.values():
            slots.remove()

    def _fill(self, rank: int, channel: Channel, slot: Slot) -> None:
        memory = slot.memory.numpy().data

        def place(header: Header, size_bytes: int) -> memoryview | None:
            at = int(header["at"])
            return memory[at : at + size_bytes] if 0 <= at <= len(memory) - size_bytes else None

        while "index" not in (header := channel.receive(place)):
            continue
        placed = unseal_placed(header["index"].encode(), "index")
        if placed.vote.rank != rank or placed.vote.attempt_id != self._attempt_id:
            raise CheckpointError(
                f"a copy of rank {placed.vote.rank}, attempt {placed.vote.attempt_id}, from rank {rank}"
            )
        for entry in placed.vote.files:
            at = placed.places[entry.path]
            check_file(entry, memory[at : at + entry.size_bytes])
        record = header["commit"].encode()
        commit = unseal_commit(record)
        put_commit(self._folder, commit, record)
        slot.publish(placed)
        slot.step = commit.step
