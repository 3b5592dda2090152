"""What a launcher says while it waits for other nodes, and when it must not wait."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any

import psutil
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import RendezvousBackend, RendezvousSettings

from outlast.errors import LaunchError
from outlast.launch.node_clocks import StateHolder
from outlast.plain_text import plain_text

FIRST_S = 5.0
"""A wait that is shorter is nothing to write about."""
AGAIN_S = 60.0
"""Between two lines about one wait."""

log = logging.getLogger("outlast.launch")


class JoiningHolder(StateHolder):
    """Holds the rendezvous' state, and tells at each look what this launcher waits for.

    Args:
        backend: holds the state for all nodes.
        settings: of the rendezvous.
        node: this launcher, as the rendezvous knows it.
        endpoint: of the rendezvous, for messages.
    """

    def __init__(self, backend: RendezvousBackend, settings: RendezvousSettings, node: Any, endpoint: str) -> None:
        super().__init__(backend, settings)
        self._node = node
        self._endpoint = endpoint
        self._last_seen_s: dict[Any, float] = {}  # of nodes that took part in a round
        self._since_s = time.monotonic()
        self._next_s = self._since_s + FIRST_S
        self.spare = False
        """Whether the job had all its nodes without this launcher."""
        self._round = -1
        self._in_round: set[Any] = set()
        self.missing = ""
        """Which nodes were here when this launcher last waited for others, and which were not, as text for people."""

    def sync(self) -> bool | None:
        """As torchelastic's.

        Raises:
            LaunchError: another job, of one node, has this endpoint and id.
        """
        written = super().sync()
        state, now_s = self._state, time.monotonic()
        self._last_seen_s |= {node: self.last_sign_s(node) for node in state.participants}
        here = {*state.participants, *state.wait_list}
        if state.complete and state.participants and self._node not in state.participants:
            self._tell_complete(now_s)
        elif state.complete or self._node not in here:
            self._tell_lost(now_s)
            self._since_s, self._next_s = now_s, now_s + FIRST_S
        else:
            self.missing = self._describe(here, now_s)
            if now_s > self._next_s:
                self._next_s = now_s + AGAIN_S
                left_s = self._settings.timeout.join.total_seconds() - (now_s - self._since_s)
                log.warning(
                    "outlast: waiting for nodes at %s (id %s): %s; up to %.0f s more (--rdzv-conf join_timeout)",
                    self._endpoint,
                    self._settings.run_id,
                    self.missing,
                    max(0.0, left_s),
                )
        return written

    def _describe(self, here: set[Any], now_s: float) -> str:
        gone = [
            f"{_name(node)}, last heard of {now_s - seen_s:.0f} s ago"
            for node, seen_s in self._last_seen_s.items()
            if node not in here
        ]
        text = f"{len(here)} of {self._settings.min_nodes} nodes are here: {_names(here)}"
        return f"{text}; missing: {'; '.join(gone)}" if gone else text

    def _tell_lost(self, now_s: float) -> None:
        """A node that took part in this round is heard of no more."""
        present, round_ = self._state.participants, self._state.round
        if self._node not in present or self._state.closed:
            return
        if self._round != round_:
            self._round, self._in_round = round_, set(present)
        for node in self._in_round - set(present):
            self._in_round.discard(node)
            log.warning(
                "outlast: node %s was last heard of %.0f s ago: it has failed, its launcher ended, or the link is cut",
                _name(node),
                now_s - self._last_seen_s.get(node, now_s),
            )

    def _tell_complete(self, now_s: float) -> None:
        """The round has begun without this launcher."""
        state, most = self._state, self._settings.max_nodes
        others = _names(state.participants)
        if len(state.participants) < most:
            if now_s > self._next_s:
                self._next_s = now_s + AGAIN_S
                log.warning("outlast: waiting to join %s at %s in its next round", others, self._endpoint)
            return
        if most == 1 and any(self._lives(node) for node in state.participants):
            raise LaunchError(
                f"another job has the rendezvous at {self._endpoint} with id {self._settings.run_id!r}: {others}",
                "end that job, or give this one another port (--rdzv-endpoint HOST:PORT)",
            )
        if not self.spare:
            self.spare = True
            log.warning(
                "outlast: the job at %s (id %s) has all its %d nodes: %s; this launcher is a spare, and waits until "
                "one of them leaves or the job ends. If that is another job, end this launcher, and give it another "
                "--rdzv-endpoint and --rdzv-id",
                self._endpoint,
                self._settings.run_id,
                most,
                others,
            )

    def _lives(self, node: Any) -> bool:
        """Whether that launcher was seen to write, or is a process of this host."""
        return node in self.writing or (node.addr == self._node.addr and psutil.pid_exists(node.pid))


def _names(nodes: Iterable[Any]) -> str:
    return ", ".join(_name(node) for node in nodes)


def _name(node: Any) -> str:
    return f"{plain_text(str(node.addr))} (launcher {node.pid})"
