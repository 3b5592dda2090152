"""How far the nodes' clocks are apart, from messages that say when they were written.

A message that is read ``a`` seconds after the time it carries was under way for at least 0 s, so the reader's clock is
at most ``a`` ahead of the writer's. The least of several such differences comes close, in each direction; half of their
sum bounds the error, whatever the way of a message took. Nodes write and read at times that drift against one another,
so that some message is read right after it was written.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import ClassVar

from outlast.events import Event

WINDOW = 128
"""Messages of which the least difference counts: clocks drift, by some parts in a million."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeClock(Event):
    """How far a node's clock is ahead of node 0's; told when it is known, and when it has changed."""

    kind: ClassVar[str] = "node_clock"
    host: str
    node: int
    """Its number in the round."""
    ahead_s: float
    error_s: float
    """By how much that may be wrong, at most."""


@dataclass(frozen=True, slots=True)
class ClockOffset:
    """One node's clock against another's."""

    ahead_s: float
    error_s: float
    """By how much that may be wrong, at most."""


class LeastDelay:
    """The least difference between when messages of one writer were read and the times they carry."""

    def __init__(self) -> None:
        self._newest: deque[float] = deque(maxlen=WINDOW)

    def read(self, written_t: float, read_t: float) -> None:
        """A message that carries ``written_t`` was read at ``read_t``, each by its own clock."""
        self._newest.append(read_t - written_t)

    @property
    def least_s(self) -> float | None:
        """None before the first message."""
        return min(self._newest, default=None)


def offset(there_s: float | None, here_s: float | None) -> ClockOffset | None:
    """How far the other node's clock is ahead of this one's; None until messages went both ways.

    Args:
        there_s: the least difference of messages from here, as the other node found it.
        here_s: the least difference of messages from there.
    """
    if there_s is None or here_s is None:
        return None
    return ClockOffset((there_s - here_s) / 2, max(0.0, (there_s + here_s) / 2))
