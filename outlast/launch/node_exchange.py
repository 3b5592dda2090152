"""How the launchers of a job's nodes hear of one another's ranks: one message a node and interval, through the store.

Each node writes its newest message under a key of its own, and reads that of node 0; node 0 reads them all. Nothing
waits for anybody: a message that is missed is replaced by the next one, which says all that holds. A node whose store
is slow, cut off or gone goes on by itself, and comes back with its next message.

Messages carry the run's MAC, and a number that grows, so that nobody who merely reaches the store has a word in it.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from outlast.launch.failures import first_line
from outlast.launch.ports import fail_when_silent, sockets_of
from outlast.launch.sealed import Seal

PREFIX = "outlast/nodes"
STORE_LIMIT_S = 10.0
"""How long the store may take to answer."""
RETRY_S = 2.0
"""After it did not."""
TOLD_AFTER_S = 20.0
"""A store that is lost for longer is told of."""
REACH_S = 2.0
"""How long a new connection may take."""
NODES_PER_S = 500
"""Messages that node 0 reads a second; a larger job has longer intervals."""

log = logging.getLogger("outlast.launch")


class NodeExchange:
    """One node's part, in one round of the rendezvous, in a thread of its own.

    Args:
        store: of all launchers; a connection of its own is made to it where it has any.
        secret: of the run, the same on all nodes.
        round_name: differs between rounds and between jobs.
        node: this node's number in the round.
        nodes: how many there are.
        interval_s: between two messages.
        write: makes this node's next message; given the number that it must carry.
        read: is given what was read, by node: on node 0 of all other nodes, on the others of node 0.
    """

    def __init__(
        self,
        store: dist.Store,  # type: ignore[name-defined]
        *,
        secret: bytes,
        round_name: str,
        node: int,
        nodes: int,
        interval_s: float,
        write: Callable[[int], bytes],
        read: Callable[[int, bytes], None],
    ) -> None:
        self._shared = store
        self._port = store.port if isinstance(store, dist.TCPStore) else None  # type: ignore[attr-defined]
        self._before = sockets_of(self._port) if self._port is not None else set()
        self._store: dist.Store | None = None  # type: ignore[name-defined]
        self._round = round_name
        self.node, self.nodes = node, nodes
        self.interval_s = max(interval_s, nodes / NODES_PER_S)
        self._write, self._read = write, read
        self._seals = [Seal(secret, self._key(one)) for one in range(nodes)]
        self._seen: set[int] = set()
        self._newest: dict[int, bytes] = {}
        self._number = 0
        self._told = False
        self._lost_s: float | None = None
        self.told_after_s = TOLD_AFTER_S
        self._refused = False
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="outlast-nodes", daemon=True)

    def start(self) -> None:
        """Begin to write and read."""
        self._thread.start()

    def hurry(self) -> None:
        """Write and read now, and not at the end of the interval."""
        self._wake.set()

    def close(self, wait_s: float = 1.0) -> None:
        """Write and read once more, if the store answers within ``wait_s``, and end."""
        self._closing.set()
        self._wake.set()
        if not self._thread.is_alive():
            return
        self._thread.join(wait_s)
        if self._thread.is_alive() and self._port is not None:
            # A thread inside the store's client would abort this process when it ends.
            for fd in sockets_of(self._port) - self._before:
                with suppress(OSError), socket.socket(fileno=os.dup(fd)) as one:
                    one.shutdown(socket.SHUT_RDWR)
            self._thread.join(wait_s)

    def _key(self, node: int) -> str:
        return f"{PREFIX}/{self._round}/{node}"

    def _run(self) -> None:
        while True:
            last = self._closing.is_set()
            if last and self._store is None:
                return  # a new connection may take longer than there is time
            pause_s = self.interval_s * random.uniform(0.9, 1.1)  # so that nodes do not keep step: see node_times
            try:
                self._exchange()
                if self._told:
                    log.warning("outlast: the other nodes' launchers are heard again")
                self._lost_s, self._told = None, False
            except (dist.DistError, OSError) as error:
                self._store = None
                last = self._closing.is_set()
                pause_s = RETRY_S
                now_s = time.monotonic()
                self._lost_s = self._lost_s or now_s  # the store of a job that ends is lost, too
                if not self._told and now_s - self._lost_s >= self.told_after_s:
                    self._told = True
                    log.warning(
                        "outlast: the other nodes' launchers have not been heard for %.0f s (%s); each judges its own "
                        "ranks alone, with longer limits",
                        now_s - self._lost_s,
                        first_line(error),
                    )
            except Exception as error:
                log.warning("outlast: what nodes tell one another failed: %s: %s", type(error).__name__, error)
                return
            if last:
                return  # the message stays: others may be about to read it
            self._wake.wait(pause_s)
            self._wake.clear()

    def _connect(self) -> dist.Store:  # type: ignore[name-defined]
        """A connection of its own: a store's client serves one call at a time, and the launcher must not wait."""
        if self._store is None:
            if self._port is not None:  # the store's own client waits for minutes, and cannot be stopped
                socket.create_connection((self._shared.host, self._port), REACH_S).close()
            try:
                self._store = self._shared.clone()
            except dist.DistError:
                raise
            except (RuntimeError, NotImplementedError):  # this kind of store cannot
                self._store = self._shared
            else:
                self._store.set_timeout(timedelta(seconds=STORE_LIMIT_S))
                for fd in (sockets_of(self._port) if self._port is not None else set()) - self._before:
                    fail_when_silent(fd, STORE_LIMIT_S)
        return self._store

    def _exchange(self) -> None:
        store = self._connect()
        self._number += 1
        store.set(self._key(self.node), self._seals[self.node].seal(self._write(self._number)))
        others = [one for one in range(self.nodes) if one != self.node] if self.node == 0 else [0]
        for one in others:
            if one not in self._seen and store.check([self._key(one)]):
                self._seen.add(one)
        there = [one for one in others if one in self._seen]
        sealed = store.multi_get([self._key(one) for one in there]) if there else []
        for one, found in zip(there, sealed, strict=True):
            if self._newest.get(one) == found:
                continue  # nothing new
            self._newest[one] = found
            message = self._seals[one].open(found)
            if message is not None:
                self._read(one, message)
            elif not self._refused:
                self._refused = True
                log.error("outlast: a message of node %d does not carry this run's MAC; it is not read", one)
