"""Which nodes of a rendezvous are alive, whatever their clocks say.

torchelastic compares the time of day that a node wrote with its own, and takes a node whose clock is 15 s behind for
dead: its peer would then go on alone. Here a node is dead if what it writes has not
changed for that long, measured by the reader's own clock.
"""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime, timedelta
from typing import Any

from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _BackendRendezvousStateHolder

BEHIND_S = 5.0
"""A clock that lags by more is told. What a node wrote is read a second or two later, so less cannot be told apart."""
AHEAD_S = 1.0
"""A clock that leads by more is told."""

log = logging.getLogger("outlast.launch")


class StateHolder(_BackendRendezvousStateHolder):
    """torchelastic's, in which a heartbeat ages by this node's monotonic clock from when it was first seen."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._seen: dict[Any, tuple[datetime, float]] = {}
        self._told: set[Any] = set()
        self.writing: set[Any] = set()
        """Nodes that were seen to write, so that they are alive or were so a moment ago."""

    def last_sign_s(self, node: Any) -> float:
        """When the newest that a node has written was first seen, CLOCK_MONOTONIC seconds; now if nothing was."""
        seen = self._seen.get(node)
        return seen[1] if seen is not None else time.monotonic()

    def _sanitize(self) -> None:
        written = dict(self._state.last_heartbeats)
        now, now_s = datetime.now(UTC), time.monotonic()
        for node, beat in written.items():
            seen = self._seen.get(node)
            if seen is None or seen[0] != beat:
                if seen is not None:  # written just now; the first that is seen may be old
                    self.writing.add(node)
                    self._compare(node, (now - beat).total_seconds())
                seen = self._seen[node] = (beat, now_s)
            self._state.last_heartbeats[node] = now - timedelta(seconds=now_s - seen[1])
        super()._sanitize()
        for node in self._state.last_heartbeats:  # what is written back is what was read
            self._state.last_heartbeats[node] = written[node]
        self._seen = {node: seen for node, seen in self._seen.items() if node in written}

    def _compare(self, node: Any, behind_s: float) -> None:
        if node in self._told or -AHEAD_S <= behind_s <= BEHIND_S:
            return
        self._told.add(node)
        log.warning(
            "outlast: the clock of node %s is about %.0f s %s this node's; times in reports will not agree. "
            "Nodes are told apart from dead ones without it, but set the clocks (chrony, ntpd)",
            node.addr,
            abs(behind_s),
            "behind" if behind_s > 0 else "ahead of",
        )
