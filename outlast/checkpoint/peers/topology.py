"""Which ranks share a node's memory, which node keeps whose copies, and where each rank listens."""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from outlast.checkpoint.peers.addresses import from_elsewhere, own_address
from outlast.checkpoint.peers.channel import Channel, Listener
from outlast.checkpoint.peers.collectives import Agreement
from outlast.errors import CheckpointError

CHOOSE = "set checkpoint.interface to the interface between the nodes, or pass host=, an address of this node's own"


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
    interface: str | None,
    serve: Callable[[Channel], None],
    timeout_s: float,
) -> Meeting:
    """Have all ranks listen, and tell one another where; collective.

    The secret is rank 0's, made anew for each attempt, and reaches the others through the training's process group.

    Args:
        agreement: over all ranks.
        rank: of this process.
        world_size: number of ranks.
        host: this rank's address; None takes that of the interface.
        interface: by name; None takes the one on the way to rank 0, or to other nodes.
        serve: called with each channel.
        timeout_s: of each channel.

    Raises:
        CheckpointError: some rank cannot listen; all ranks raise it.
    """
    if world_size == 1:
        return Meeting(Nodes((node_name(),), (("", 0),)), b"", None)
    secret = bytes.fromhex(agreement.all_gather_text(secrets.token_hex(32) if rank == 0 else "")[0])
    chosen = host is not None or interface is not None
    found, problem = "", ""
    try:
        found = host if host is not None else own_address(interface)
    except (CheckpointError, OSError) as error:
        problem = _reason(rank, error)
    names, addresses = _told(agreement, problem, [node_name(), found])
    listener = None
    try:
        listener = Listener(found if chosen else from_elsewhere(rank, names, addresses), secret, serve, timeout_s)
        host, port = listener.address
    except (CheckpointError, OSError) as error:
        host, port, problem = "", 0, _reason(rank, error)
    try:
        hosts, ports = _told(agreement, problem, [host, str(port)])
    except CheckpointError:
        if listener is not None:
            listener.close()
        raise
    return Meeting(Nodes(names, tuple(zip(hosts, map(int, ports), strict=True))), secret, listener)


def _told(agreement: Agreement, problem: str, words: list[str]) -> tuple[tuple[str, ...], ...]:
    """What each rank says, by word; raises what problems there are on all ranks."""
    every = [json.loads(text) for text in agreement.all_gather_text(json.dumps([problem, *words]))]
    problems, *rest = zip(*every, strict=True)
    if any(problems):
        raise CheckpointError("; ".join(filter(None, problems)), CHOOSE)
    return tuple(rest)


def _reason(rank: int, error: CheckpointError | OSError) -> str:
    return f"rank {rank}: {error.what if isinstance(error, CheckpointError) else error}"


def node_name() -> str:
    """The same for processes that see the same ``/dev/shm``: this boot of the machine, and the file system's number."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{os.stat('/dev/shm').st_dev}"
    except FileNotFoundError:  # not Linux: there is no shared memory to tell apart
        return socket.gethostname()
