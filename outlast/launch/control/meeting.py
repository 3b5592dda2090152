"""Where the launchers of a job meet, and by which means."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from outlast.checkpoint.peers.channel import Channel, Header, Listener
from outlast.launch.control.board import SealedBoard


class Line(Protocol):
    """A connection: of a :class:`~outlast.checkpoint.peers.channel.Channel`, what is used here. Raises OSError."""

    def send(self, header: Header) -> None: ...
    def receive(self) -> Header: ...
    def close(self) -> None: ...


class Ear(Protocol):
    """Of a :class:`~outlast.checkpoint.peers.channel.Listener`, what is used here."""

    @property
    def address(self) -> tuple[str, int]: ...
    def close(self) -> None: ...


class Means(Protocol):
    """Clock, threads and connections."""

    def now_s(self) -> float:
        """By a clock that does not jump."""

    def spawn(self, work: Callable[[], None], name: str) -> Callable[[float], None]:
        """Run in a thread of its own; returns what waits for its end, for at most so many seconds."""

    def dial(self, address: tuple[str, int], secret: bytes, timeout_s: float) -> Line:
        """Connect; raises OSError."""

    def listen(self, address: tuple[str, int], secret: bytes, serve: Callable[[Any], None], timeout_s: float) -> Ear:
        """Listen; raises CheckpointError."""


class RealMeans:
    """Those of this process."""

    def now_s(self) -> float:
        return time.monotonic()

    def spawn(self, work: Callable[[], None], name: str) -> Callable[[float], None]:
        thread = threading.Thread(target=work, name=name, daemon=True)
        thread.start()
        return lambda within_s: None if thread is threading.current_thread() else thread.join(within_s)

    def dial(self, address: tuple[str, int], secret: bytes, timeout_s: float) -> Line:
        return Channel.dial(address, secret, timeout_s)

    def listen(self, address: tuple[str, int], secret: bytes, serve: Callable[[Any], None], timeout_s: float) -> Ear:
        return Listener(address[0], secret, serve, timeout_s, port=address[1])


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """Where launchers of a job meet."""

    secret: bytes
    board: SealedBoard | None
    """Where the journal is; None: only the launcher at ``fixed`` has it."""
    fixed: tuple[str, int] | None = None
    """The only launcher that may lead listens there."""
    leads: bool = True
    """Whether this one may lead."""
    means: Means = field(default_factory=RealMeans)

    @property
    def place(self) -> str:
        """For people."""
        if self.fixed is not None:
            return f"{self.fixed[0]}:{self.fixed[1]}"
        assert self.board is not None
        return self.board.place
