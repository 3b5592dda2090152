"""Which ranks share a node's memory, which node keeps whose copies, and on which address each rank listens."""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from outlast.checkpoint.peers.addresses import own_address, reachable_address
from outlast.checkpoint.peers.channel import Channel, Listener
from outlast.checkpoint.peers.collectives import Agreement
from outlast.errors import CheckpointError

CHOOSE = "set checkpoint.interface to the interface between the nodes, or pass host=, one of this node's own addresses"


@dataclass(frozen=True)
class Nodes:
    """The node and the address of each rank; equal on all ranks."""

    names: tuple[str, ...]
    """By rank: ranks whose nodes have the same name see the same shared memory."""
    addresses: tuple[tuple[str, int], ...]
    """By rank: host and port on which it listens."""

    def ranks_with(self, rank: int) -> list[int]:
        """The ranks on ``rank``'s node, in order."""
        return [other for other, name in enumerate(self.names) if name == self.names[rank]]

    def partner_of(self, rank: int) -> int | None:
        """The rank on the next node that keeps ``rank``'s copies; None if there is only one node.

        Nodes form a ring, in the order of their first ranks, and a node's ranks are spread over those of the next.
        """
        ring = list(dict.fromkeys(self.names))
        if len(ring) == 1:
            return None
        next_node = ring[(ring.index(self.names[rank]) + 1) % len(ring)]
        keepers = [other for other, name in enumerate(self.names) if name == next_node]
        return keepers[self.ranks_with(rank).index(rank) % len(keepers)]


@dataclass(frozen=True)
class Meeting:
    """What ranks know of one another once they have met."""

    nodes: Nodes
    secret: bytes
    listener: Listener | None
    """None if there is only one rank."""

    def close(self) -> None:
        """Stop listening, and close the connections."""
        if self.listener is not None:
            self.listener.close()


def meet(
    agreement: Agreement,
    rank: int,
    world_size: int,
    host: str | None,
    interface: str | None,
    on_channel: Callable[[Channel], None],
    timeout_s: float,
) -> Meeting:
    """Have all ranks listen, and exchange their addresses.

    Collective over ``agreement``. A rank that cannot listen makes all ranks raise. Rank 0 makes the secret anew for
    each attempt; it reaches the others through the training's process group.

    Args:
        agreement: over all ranks.
        rank: of this process.
        world_size: number of ranks.
        host: this rank's address; None takes that of the interface.
        interface: its name; None takes the one on the route to rank 0, or to other nodes.
        on_channel: called with each channel, in the channel's thread.
        timeout_s: of each channel.

    Raises:
        CheckpointError: a rank cannot listen; the message has the reasons of all such ranks.
    """
    if world_size == 1:
        return Meeting(Nodes((node_name(),), (("", 0),)), b"", None)
    secret = bytes.fromhex(agreement.all_gather_text(secrets.token_hex(32) if rank == 0 else "")[0])
    chosen = host is not None or interface is not None
    address, problem = "", ""
    try:
        address = host if host is not None else own_address(interface)
    except (CheckpointError, OSError) as error:
        problem = _reason(rank, error)
    names, addresses = _exchange(agreement, problem, [node_name(), address])
    listener = None
    try:
        if not chosen:
            address = reachable_address(rank, names, addresses)
        listener = Listener(address, secret, on_channel, timeout_s)
        host, port = listener.address
    except (CheckpointError, OSError) as error:
        host, port, problem = "", 0, _reason(rank, error)
    try:
        hosts, ports = _exchange(agreement, problem, [host, str(port)])
    except CheckpointError:
        if listener is not None:
            listener.close()
        raise
    return Meeting(Nodes(names, tuple(zip(hosts, map(int, ports), strict=True))), secret, listener)


def _exchange(agreement: Agreement, problem: str, values: list[str]) -> tuple[tuple[str, ...], ...]:
    """All-gather some values; for each the tuple of all ranks'. If a rank has a problem, all ranks raise it."""
    gathered = [json.loads(text) for text in agreement.all_gather_text(json.dumps([problem, *values]))]
    problems, *columns = zip(*gathered, strict=True)
    if any(problems):
        raise CheckpointError("; ".join(filter(None, problems)), CHOOSE)
    return tuple(columns)


def _reason(rank: int, error: CheckpointError | OSError) -> str:
    return f"rank {rank}: {error.what if isinstance(error, CheckpointError) else error}"


def node_name() -> str:
    """Equal for processes that see the same ``/dev/shm``: the machine's boot id and the file system's number."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{os.stat('/dev/shm').st_dev}"
    except FileNotFoundError:  # not Linux: there is no shared memory to tell apart
        return socket.gethostname()
