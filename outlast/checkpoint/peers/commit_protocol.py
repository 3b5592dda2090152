"""How ranks commit a save in memory: votes go to rank 0 over dedicated connections, and its decision comes back.

No collective is issued, so a commit neither waits for the training's communication nor delays it. A connection that
breaks is dialled again at once, and both ends repeat their last message. If a rank has died, it is not dialled again,
and the save is given up; if a rank stalls, the save is given up after a timeout.
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
from outlast.checkpoint.shortage import start
from outlast.errors import CheckpointError

_log = logging.getLogger("outlast.checkpoint")
_POLL_S = 0.1
_RECONNECT_S = 1.0
"""How long rank 0 waits for a connection that broke to be dialled again."""


class CommitProtocol:
    """One rank's end of the protocol. Votes and decisions are headers; a save has the same number on all ranks.

    Args:
        rank: of this process; rank 0 decides.
        world_size: number of ranks.
        timeout_s: how long a vote or a decision may take.
    """

    def __init__(self, rank: int, world_size: int, timeout_s: float) -> None:
        self._rank = rank
        self._world_size = world_size
        self._meeting: Meeting | None = None
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._votes: dict[int, dict[int, Header]] = {}
        self._decisions: dict[int, Header] = {}
        self._peers: dict[int, Channel] = {}
        self._lost: dict[int, tuple[str, float]] = {}
        """By rank: why its connection broke, and when."""
        self._last_sent: Header | None = None
        """The last vote (on rank 0: decision), which may not have arrived before the connection broke."""
        self._closed = False

    def read_votes(self, rank: int, channel: Channel) -> None:
        """Rank 0: read another rank's votes until the connection ends, which raises ``OSError``."""
        with self._changed:
            if self._closed:
                raise ConnectionError("closed")
            self._peers[rank] = channel
            self._lost.pop(rank, None)
            last_sent = self._last_sent
        try:
            channel.send({"last": last_sent})
            while True:
                header = channel.receive(idle=True)
                with self._changed:
                    self._votes.setdefault(int(header["serial"]), {})[rank] = header
                    self._changed.notify_all()
        except OSError as error:
            with self._changed:
                if self._peers.get(rank) is channel:
                    self._lost[rank] = str(error), time.monotonic()
                    self._changed.notify_all()
            raise

    def collect_votes(self, save_id: int, check_cancelled: Callable[[], None]) -> dict[int, Header]:
        """Rank 0: wait for the votes of all other ranks for a save.

        Args:
            save_id: of the save.
            check_cancelled: called repeatedly; raises if the save was given up.

        Returns:
            By rank.

        Raises:
            CheckpointError: a rank has failed, is lost, or does not vote within the timeout.
        """
        began = time.monotonic()
        deadline = began + self._timeout_s
        with self._changed:
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
                    if time.monotonic() - max(began, lost_at) > _RECONNECT_S:
                        raise CheckpointError(f"the connection to rank {rank} is lost: {why}")
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    names = ", ".join(map(str, absent))
                    raise CheckpointError(
                        f"no vote within {self._timeout_s:g} s from rank {names}: it has not called save() for this "
                        "step, which every rank must, or its copy takes longer"
                    )
                check_cancelled()
                self._changed.wait(min(left_s, _POLL_S))

    def announce(self, decision: Header) -> None:
        """Rank 0: send a decision to all ranks. A rank that cannot be reached notices that its connection broke."""
        with self._changed:
            self._last_sent = decision
            peers = dict(self._peers)
        for channel in peers.values():
            with suppress(OSError):  # the thread that reads from it notices
                channel.send(decision)

    def connect(self, meeting: Meeting) -> None:
        """Other ranks: connect to rank 0, for which the end of the connection means that this rank is lost.

        Args:
            meeting: rank 0's address.

        Raises:
            OSError: rank 0 cannot be reached.
        """
        self._meeting = meeting
        if self._rank != 0:
            self._dial()

    def _dial(self) -> None:
        """Connect to rank 0, and repeat the last message."""
        assert self._meeting is not None
        channel = Channel.dial(self._meeting.nodes.addresses[0], self._meeting.secret, self._timeout_s)
        channel.send({"for": "control", "rank": self._rank})
        last = channel.receive()["last"]
        with self._changed:
            if last is not None:
                self._decisions[int(last["serial"])] = last
                self._changed.notify_all()
            self._peers[0] = channel
            self._lost.pop(0, None)
            last_sent = self._last_sent
        try:
            start(threading.Thread(target=self._listen, args=(channel,), name="outlast-control", daemon=True))
        except OSError:  # to whom nobody listens is lost
            with self._changed:
                self._lost[0] = "there is no thread to listen to it", time.monotonic()
            channel.close()
            raise
        if last_sent is not None:
            with suppress(OSError):  # the listening thread connects again, and repeats it
                channel.send(last_sent)

    def announce_failure(self, save_id: int, reason: str) -> None:
        """Tell the other ranks that this one gives a save up. Unreachable ranks notice that the connection broke."""
        header: Header = {"serial": save_id, "failed": reason}
        if self._rank == 0:
            self.announce(header)
            return
        self._send(header)

    def vote(self, header: Header) -> None:
        """Other ranks: send a vote to rank 0.

        Raises:
            OSError: rank 0 cannot be reached.
        """
        if not self._send(header):
            self._dial()

    def _send(self, header: Header) -> bool:
        """Send it now, or when the connection is made again; False if the connection is lost."""
        with self._changed:
            self._last_sent = header
            lost, channel = 0 in self._lost, self._peers[0]
        if not lost:
            with suppress(OSError):  # the listening thread connects again, and repeats it
                channel.send(header)
        return not lost

    def wait_decision(self, save_id: int, check_cancelled: Callable[[], None]) -> Header:
        """Other ranks: wait for rank 0's decision on a save.

        Args:
            save_id: of the save.
            check_cancelled: called repeatedly; raises if the save was given up.

        Raises:
            CheckpointError: rank 0 is lost, or does not decide within twice the timeout.
        """
        # Rank 0 may wait for the last vote as long as the timeout.
        limit_s = 2 * self._timeout_s
        deadline = time.monotonic() + limit_s
        with self._changed:
            while save_id not in self._decisions:
                if 0 in self._lost:
                    raise CheckpointError(f"the connection to rank 0 is lost: {self._lost[0][0]}")
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise CheckpointError(
                        f"no decision within {limit_s:g} s from rank 0: it has not called save() for this step, which "
                        "every rank must, or waits for another rank's vote"
                    )
                check_cancelled()
                self._changed.wait(min(left_s, _POLL_S))
            decision = self._decisions[save_id]
            self._forget(save_id)
            return decision

    def close(self) -> None:
        """Close the connections."""
        with self._changed:
            self._closed = True
            peers = list(self._peers.values())
        for channel in peers:
            channel.close()

    def _listen(self, channel: Channel) -> None:
        try:
            while True:
                header = channel.receive(idle=True)
                with self._changed:
                    self._decisions[int(header["serial"])] = header
                    self._changed.notify_all()
        except OSError as error:
            broken = str(error)
        try:
            if self._closed:
                raise ConnectionError("closed")
            self._dial()
            _log.warning("the connection to rank 0 broke (%s) and was restored", broken)
        except OSError as error:
            with self._changed:
                self._lost[0] = f"{broken}; reconnecting failed: {error}", time.monotonic()
                self._changed.notify_all()

    def _forget(self, save_id: int) -> None:
        """Forget saves up to this one: they are over."""
        for kept in (self._votes, self._decisions):
            for old in [number for number in kept if number <= save_id]:
                del kept[old]
