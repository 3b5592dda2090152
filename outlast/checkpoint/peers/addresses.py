"""The address on which a rank listens: that of a named interface, or the one on the route to another node."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Sequence

import psutil

from outlast.errors import CheckpointError


def own_address(interface: str | None) -> str:
    """The address of an interface, or (None) this node's address on the route to ``MASTER_ADDR``.

    Raises:
        CheckpointError: no such interface, or it has no address.
        OSError: ``MASTER_ADDR``, or this host's name, cannot be resolved.
    """
    if interface is not None:
        return _address_of(interface)
    master = os.environ.get("MASTER_ADDR")
    return routed_to(master) if master is not None else socket.gethostbyname(socket.gethostname())


def routed_to(host: str) -> str:
    """This node's address on the route to another host."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # a datagram socket sends nothing here; the kernel chooses the route
        return str(probe.getsockname()[0])


def is_loopback(address: str) -> bool:
    """Whether it is an address that no other host can reach; a host name is assumed to be none."""
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def reachable_address(rank: int, names: Sequence[str], addresses: Sequence[str]) -> str:
    """A rank's address; if that is a loopback address, the one on the route to another node.

    On Debian a host's own name resolves to 127.0.1.1, so the ranks on the host of ``MASTER_ADDR`` get a loopback
    address, while all other nodes get good ones. If all addresses are loopback addresses, they are taken as they are:
    what looks like several nodes may be containers that share a network.

    Args:
        rank: of this process.
        names: by rank, its node.
        addresses: by rank, its own choice of an address.

    Raises:
        CheckpointError: other nodes have addresses that can be reached, but there is no route to any of them.
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
            address = routed_to(other)
        except OSError as error:
            tried.append(f"{other}: {error}")
            continue
        if not is_loopback(address):
            return address
        tried.append(f"{other}: the route leads through {address}")
    if tried:
        raise CheckpointError(
            f"other nodes cannot reach {addresses[rank]}, and there is no route to them ({'; '.join(tried)})"
        )
    return addresses[rank]


def _address_of(interface: str) -> str:
    """IPv4 before IPv6; no link-local address, which means nothing without its interface."""
    interfaces = psutil.net_if_addrs()
    if interface not in interfaces:
        raise CheckpointError(
            f"{socket.gethostname()} has no interface {interface!r}; it has {', '.join(sorted(interfaces))}"
        )
    for family in (socket.AF_INET, socket.AF_INET6):
        for one in interfaces[interface]:
            if one.family == family:
                address = str(one.address)
                if not ipaddress.ip_address(address.partition("%")[0]).is_link_local:
                    return address
    have = ", ".join(str(one.address) for one in interfaces[interface])
    raise CheckpointError(
        f"interface {interface!r} of {socket.gethostname()} has no IP address to listen on, only {have}"
    )
