"""When all stand still and nobody is to blame yet, the nodes try out themselves and their links, once; when what
ranks exchange takes longer, their links alone.

Node 0 asks for it, in its message to the others. It runs in a thread of the launcher, beside the ranks and their
groups, and changes nothing: what it finds is told, on node 0, and written as an event.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

import torch.distributed as dist

from outlast.events import Event, EventLog
from outlast.launch.failures import first_line
from outlast.launch.node_probe import Probed, probe_nodes

AGAIN_S = 600.0
"""Between two probes of a round, however often it stands still."""
STORE_LIMIT_S = 10.0
REACH_S = 2.0
MOST_FINDINGS = 8
STOOD_STILL, SLOW_EXCHANGE = "all stood still", "what ranks exchange took longer"

log = logging.getLogger("outlast.launch")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodesProbed(Event):
    """The nodes tried out themselves and the links between them, because the ranks stood still, or exchanged slowly."""

    kind: ClassVar[str] = "nodes_probed"
    why: str = STOOD_STILL
    """... or :data:`SLOW_EXCHANGE`."""
    nodes: int
    heard: int
    """How many took part."""
    seconds: float
    findings: tuple[str, ...]
    """What is wrong, each with whom and the values; empty if no node and no link stands out."""


class StandstillProbe:
    """One node's part, in one round of the rendezvous.

    Args:
        store: of all launchers; a connection of its own is made to it.
        secret: of the run.
        round_name: differs between rounds and between jobs.
        node: this node's number.
        nodes: how many there are.
        address: of this node; empty if the one from which it reaches the store will do.
        folder: the disk that is tried out.
        events: where node 0 writes what was found.
        probe: what is done.
    """

    def __init__(
        self,
        store: dist.Store,  # type: ignore[name-defined]
        *,
        secret: bytes,
        round_name: str,
        node: int,
        nodes: int,
        address: str,
        folder: Path,
        events: EventLog,
        probe: Callable[..., Probed] = probe_nodes,
    ) -> None:
        self._store, self._secret, self._round = store, secret, round_name
        self._node, self._nodes = node, nodes
        self._address, self._folder, self._events, self._probe = address, folder, events, probe
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._asked_s: float | None = None
        self._still = False
        self._found: tuple[float, Probed] | None = None
        self.number = 0
        """Of the newest probe."""

    def look(self, *, stands_still: bool) -> int:
        """On node 0: whether all stand still and nobody is to blame; returns the number of the newest probe.

        It begins one when they begin to stand still, unless the last one was a short while ago.
        """
        begins, self._still = stands_still and not self._still, stands_still
        now_s = time.monotonic()
        if begins and self._nodes > 1 and (self._asked_s is None or now_s - self._asked_s >= AGAIN_S):
            self._asked_s = now_s
            self.take_part(self.number + 1)
        return self.number

    def links(self) -> Probed | None:
        """On node 0: what the nodes' links are like while ranks train; None until it is known, if ever.

        They are tried out if that was not done a short while ago, for whichever reason.
        """
        now_s = time.monotonic()
        found = self._found
        if found is not None and now_s - found[0] < AGAIN_S:
            return found[1]
        if self._nodes > 1 and (self._asked_s is None or now_s - self._asked_s >= AGAIN_S):
            self._asked_s = now_s
            self.take_part(self.number + 1, beside_ranks=True)
        return None

    def take_part(self, number: int, *, beside_ranks: bool = False) -> None:
        """In the probe with this number, unless this node has done so, or is at it still."""
        if number <= self.number or self._closing.is_set() or (self._thread is not None and self._thread.is_alive()):
            return
        self.number = number
        self._thread = threading.Thread(
            target=self._run, args=(number, beside_ranks), name="outlast-probe-nodes", daemon=True
        )
        self._thread.start()

    def close(self, wait_s: float = 2.0) -> None:
        """What runs ends soon; it is waited for so long."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(wait_s)

    def _run(self, number: int, beside_ranks: bool) -> None:
        began_s = time.monotonic()
        try:
            if isinstance(self._store, dist.TCPStore):  # type: ignore[attr-defined]
                # the store's own client would wait for minutes, and cannot be stopped
                socket.create_connection((self._store.host, self._store.port), REACH_S).close()
            store = self._store.clone()
            store.set_timeout(timedelta(seconds=STORE_LIMIT_S))
            probed = self._probe(
                store,
                secret=self._secret,
                occasion=f"{self._round}/{number}",
                node=self._node,
                nodes=self._nodes,
                folder=self._folder,
                address=self._address,
                beside_ranks=beside_ranks,
                ends=self._closing.is_set,
            )
        except Exception as error:  # of a store that cannot be cloned, or is gone: a probe ends nothing
            log.warning("outlast: the nodes could not be tried out: %s: %s", type(error).__name__, first_line(error))
            return
        if self._node != 0 or self._closing.is_set():
            return
        if beside_ranks:
            self._found = time.monotonic(), probed
        found = probed.findings[:MOST_FINDINGS]
        log.warning("outlast: nodes and links were tried out: %s", "; ".join(found) or "none stands out")
        self._events.write(
            NodesProbed(
                why=SLOW_EXCHANGE if beside_ranks else STOOD_STILL,
                nodes=self._nodes,
                heard=probed.heard,
                seconds=round(time.monotonic() - began_s, 3),
                findings=found,
            )
        )
