"""By which address of its own a rank is reached: that of an interface which is named, or that of a route."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Sequence

import psutil

from outlast.errors import CheckpointError


def own_address(interface: str | None) -> str:
    """The address of an interface, or (None) the one by which this node reaches ``MASTER_ADDR``.

    Raises:
        CheckpointError: no such interface, or it has no address.
        OSError: ``MASTER_ADDR``, or this host's name, cannot be resolved.
    """
    if interface is not None:
        return _address_of(interface)
    master = os.environ.get("MASTER_ADDR")
    return routed_to(master) if master is not None else socket.gethostbyname(socket.gethostname())


def routed_to(host: str) -> str:
    """This node's address on the way to another's."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # a datagram socket sends nothing here; the kernel chooses the route
        return str(probe.getsockname()[0])


def is_loopback(address: str) -> bool:
    """Whether no other host can reach it; of a name it is not known, and assumed not."""
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def from_elsewhere(rank: int, names: Sequence[str], addresses: Sequence[str]) -> str:
    """A rank's address, found by a route to another node where the one it has is of no use to that.

    Debian has a host's own name resolve to 127.0.1.1, which is how the ranks beside ``MASTER_ADDR`` find a loopback
    address, while all other nodes find good ones. Where all addresses are loopback there is nothing to ask for, and
    they may be right: what seem to be several nodes may be containers that share a network.

    Args:
        rank: of this process.
        names: each rank's node.
        addresses: what each rank has found.

    Raises:
        CheckpointError: other nodes have addresses that can be reached, and there is no route to any of them.
    """
    if not is_loopback(addresses[rank]):
        return addresses[rank]
    others = [
        address
        for name, address in dict(zip(names, addresses, strict=True)).items()
        if name != names[rank] and not is_loopback(address)
    ]
    tried = []
    for other in others:
        try:
            found = routed_to(other)
        except OSError as error:
            tried.append(f"{other}: {error}")
            continue
        if not is_loopback(found):
            return found
        tried.append(f"{other}: it leads through {found}")
    if tried:
        raise CheckpointError(
            f"{addresses[rank]} is of no use to other nodes, and there is no route to them ({'; '.join(tried)})"
        )
    return addresses[rank]


def _address_of(interface: str) -> str:
    """IPv4 before IPv6; no link-local address, which means nothing without its interface."""
    there = psutil.net_if_addrs()
    if interface not in there:
        raise CheckpointError(
            f"{socket.gethostname()} has no interface {interface!r}; it has {', '.join(sorted(there))}"
        )
    for family in (socket.AF_INET, socket.AF_INET6):
        for one in there[interface]:
            if one.family == family:
                address = str(one.address)
                if not ipaddress.ip_address(address.partition("%")[0]).is_link_local:
                    return address
    have = ", ".join(str(one.address) for one in there[interface])
    raise CheckpointError(
        f"interface {interface!r} of {socket.gethostname()} has no IP address to listen on, only {have}"
    )
