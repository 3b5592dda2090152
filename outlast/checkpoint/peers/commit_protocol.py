"""How ranks commit what lies in their memory: votes go to rank 0 over connections of their own, and its decision back.

No collective is issued, so a commit neither waits for the training's communication nor holds it up. A connection that
breaks is dialled again at once, and both ends say again what they said last. A rank that died does not do so, and the
save is given up; one that stalls ends it after a timeout.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from outlast.checkpoint.peers.channel import Channel, Header
from outlast.checkpoint.peers.topology import Meeting
from outlast.errors import CheckpointError

_log = logging.getLogger("outlast.checkpoint")
_LOOK_S = 0.1
_AGAIN_S = 1.0
"""How long after a connection broke rank 0 still waits for it to be dialled again."""


class Control:
    """One rank's end. Votes and decisions are headers; each save has a number, the same on all ranks.

    Args:
        rank: rank 0 decides.
        world_size: number of ranks.
        timeout_s: how long a vote or a decision may take.
    """

    def __init__(self, rank: int, world_size: int, timeout_s: float) -> None:
        self._rank = rank
        self._world_size = world_size
        self._meeting: Meeting | None = None
        self._timeout_s = timeout_s
        self._news = threading.Condition()
        self._votes: dict[int, dict[int, Header]] = {}
        self._decisions: dict[int, Header] = {}
        self._peers: dict[int, Channel] = {}
        self._lost: dict[int, tuple[str, float]] = {}
        """By rank: how its connection broke, and when."""
        self._said: Header | None = None
        """The last vote, or on rank 0 decision: perhaps it did not arrive before the connection broke."""
        self._closed = False

    def serve(self, rank: int, channel: Channel) -> None:
        """Rank 0: read another rank's votes until the connection ends."""
        with self._news:
            if self._closed:
                raise ConnectionError("closed")
            self._peers[rank] = channel
            self._lost.pop(rank, None)
            said = self._said
        try:
            channel.send({"last": said})
            while True:
                header = channel.receive(idle=True)
                with self._news:
                    self._votes.setdefault(int(header["serial"]), {})[rank] = header
                    self._news.notify_all()
        except OSError as error:
            with self._news:
                if self._peers.get(rank) is channel:
                    self._lost[rank] = str(error), time.monotonic()
                    self._news.notify_all()
            raise

    def collect(self, save_id: int, check_cancelled: Callable[[], None]) -> dict[int, Header]:
        """Rank 0: the votes of all other ranks for a save.

        ``check_cancelled`` is called meanwhile, and raises if the save was given up.

        Raises:
            CheckpointError: a rank has failed, is gone, or does not vote in time.
        """
        began = time.monotonic()
        deadline = began + self._timeout_s
        with self._news:
            while True:
                votes = self._votes.get(save_id, {})
                for rank, vote in votes.items():
                    if "failed" in vote:
                        raise CheckpointError(f"rank {rank} gave up: {vote['failed']}")
                absent = [rank for rank in range(1, self._world_size) if rank not in votes]
                if not absent:
                    self._forget(save_id)
                    return votes
                for rank in absent:
                    why, lost_at = self._lost.get(rank, ("", math.inf))
                    if time.monotonic() - max(began, lost_at) > _AGAIN_S:
                        raise CheckpointError(f"the connection to rank {rank} is lost: {why}")
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    names = ", ".join(map(str, absent))
                    raise CheckpointError(f"no vote within {self._timeout_s:g} s from rank {names}")
                check_cancelled()
                self._news.wait(min(left_s, _LOOK_S))

    def tell(self, decision: Header) -> None:
        """Rank 0: tell all ranks; one that cannot be told finds its connection broken."""
        with self._news:
            self._said = decision
            peers = dict(self._peers)
        for channel in peers.values():
            with suppress(OSError):  # its own thread notices
                channel.send(decision)

    def join(self, meeting: Meeting) -> None:
        """Connect to rank 0, which learns from the connection's end that a rank is gone.

        Raises:
            OSError: it cannot be reached.
        """
        self._meeting = meeting
        if self._rank != 0:
            self._dial()

    def _dial(self) -> None:
        """Connect to rank 0, and say again what was said last."""
        assert self._meeting is not None
        channel = Channel.dial(self._meeting.nodes.addresses[0], self._meeting.secret, self._timeout_s)
        channel.send({"for": "control", "rank": self._rank})
        last = channel.receive()["last"]
        with self._news:
            if last is not None:
                self._decisions[int(last["serial"])] = last
                self._news.notify_all()
            self._peers[0] = channel
            self._lost.pop(0, None)
            said = self._said
        threading.Thread(target=self._listen, args=(channel,), name="outlast-control", daemon=True).start()
        if said is not None:
            with suppress(OSError):  # whoever listens there connects again, and says it again
                channel.send(said)

    def say_failed(self, save_id: int, reason: str) -> None:
        """Tell the others that this rank gives a save up; those who cannot be told find the connection broken."""
        header: Header = {"serial": save_id, "failed": reason}
        if self._rank == 0:
            self.tell(header)
            return
        self._say(header)

    def vote(self, header: Header) -> None:
        """Other ranks: send a vote.

        Raises:
            OSError: rank 0 cannot be reached.
        """
        if not self._say(header):
            self._dial()

    def _say(self, header: Header) -> bool:
        """Say it now, or when the connection is made again; False if it is lost."""
        with self._news:
            self._said = header
            lost, channel = 0 in self._lost, self._peers[0]
        if not lost:
            with suppress(OSError):  # whoever listens there connects again, and says it again
                channel.send(header)
        return not lost

    def decision(self, save_id: int, check_cancelled: Callable[[], None]) -> Header:
        """Other ranks: what rank 0 decided of a save; ``check_cancelled`` as in :meth:`collect`.

        Raises:
            CheckpointError: rank 0 is gone, or does not decide in time.
        """
        # Rank 0 itself waits that long for the last vote.
        limit_s = 2 * self._timeout_s
        deadline = time.monotonic() + limit_s
        with self._news:
            while save_id not in self._decisions:
                if 0 in self._lost:
                    raise CheckpointError(f"the connection to rank 0 is lost: {self._lost[0][0]}")
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise CheckpointError(f"no decision within {limit_s:g} s from rank 0")
                check_cancelled()
                self._news.wait(min(left_s, _LOOK_S))
            decision = self._decisions[save_id]
            self._forget(save_id)
            return decision

    def close(self) -> None:
        """Close the connections."""
        with self._news:
            self._closed = True
            peers = list(self._peers.values())
        for channel in peers:
            channel.close()

    def _listen(self, channel: Channel) -> None:
        try:
            while True:
                header = channel.receive(idle=True)
                with self._news:
                    self._decisions[int(header["serial"])] = header
                    self._news.notify_all()
        except OSError as error:
            broken = str(error)
        try:
            if self._closed:
                raise ConnectionError("closed")
            self._dial()
            _log.warning("the connection to rank 0 broke (%s); connected again", broken)
        except OSError as error:
            with self._news:
                self._lost[0] = f"{broken}; connecting again: {error}", time.monotonic()
                self._news.notify_all()

    def _forget(self, save_id: int) -> None:
        """Saves up to this one are over."""
        for kept in (self._votes, self._decisions):
            for old in [number for number in kept if number <= save_id]:
                del kept[old]
