"""Which ranks share a node's memory, which node keeps whose copies, and where each rank listens."""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from outlast.checkpoint._agreement import Agreement
from outlast.checkpoint._channel import Channel, Listener
from outlast.errors import CheckpointError


@dataclass(frozen=True)
class Nodes:
    """All ranks, by node; equal on all ranks."""

    names: tuple[str, ...]
    """The node of each rank: ranks with the same name see the same shared memory."""
    addresses: tuple[tuple[str, int], ...]
    """Where each rank listens."""

    def ranks_with(self, rank: int) -> list[int]:
        """The ranks on ``rank``'s node, in order."""
        return [other for other, name in enumerate(self.names) if name == self.names[rank]]

    def partner_of(self, rank: int) -> int | None:
        """The rank on the next node that keeps ``rank``'s copies; None where there is one node.

        Nodes stand in a ring, in the order of their first ranks, and a node's ranks are spread over those of the next.
        """
        ring = list(dict.fromkeys(self.names))
        if len(ring) == 1:
            return None
        after = ring[(ring.index(self.names[rank]) + 1) % len(ring)]
        there = [other for other, name in enumerate(self.names) if name == after]
        return there[self.ranks_with(rank).index(rank) % len(there)]


@dataclass(frozen=True)
class Meeting:
    """What ranks know of one another once they have met."""

    nodes: Nodes
    secret: bytes
    listener: Listener | None
    """None where there is one rank."""

    def close(self) -> None:
        """Listen no more."""
        if self.listener is not None:
            self.listener.close()


def meet(
    agreement: Agreement,
    rank: int,
    world_size: int,
    host: str | None,
    serve: Callable[[Channel], None],
    timeout_s: float,
) -> Meeting:
    """Have all ranks listen, and tell one another where; collective.

    The secret is rank 0's, made anew for each attempt, and reaches the others through the training's process group.

    Raises:
        CheckpointError: some rank cannot listen; all ranks raise it.
    """
    if world_size == 1:
        return Meeting(Nodes((node_name(),), (("", 0),)), b"", None)
    secret = bytes.fromhex(agreement.texts(secrets.token_hex(32) if rank == 0 else "")[0])
    listener, told = None, ""
    try:
        listener = Listener(host if host is not None else _own_address(), secret, serve, timeout_s)
        told = json.dumps(["", node_name(), *listener.address])
    except (CheckpointError, OSError) as error:
        told = json.dumps([f"rank {rank}: {error.what if isinstance(error, CheckpointError) else error}", "", "", 0])
    every = [json.loads(text) for text in agreement.texts(told)]
    problems = [problem for problem, *_ in every if problem]
    if problems:
        if listener is not None:
            listener.close()
        raise CheckpointError("; ".join(problems), "pass host=, an address of this node's own")
    nodes = Nodes(tuple(name for _, name, _, _ in every), tuple((host, port) for _, _, host, port in every))
    return Meeting(nodes, secret, listener)


def node_name() -> str:
    """The same for processes that see the same ``/dev/shm``: this boot of the machine, and the file system's number."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{os.stat('/dev/shm').st_dev}"
    except FileNotFoundError:  # not Linux: there is no shared memory to tell apart
        return socket.gethostname()


def _own_address() -> str:
    """The address by which this node reaches rank 0, and so by which the others reach it."""
    master = os.environ.get("MASTER_ADDR")
    if master is None:
        return socket.gethostbyname(socket.gethostname())
    family, kind, protocol, _, address = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # a datagram socket sends nothing here; the kernel chooses the route
        return str(probe.getsockname()[0])
