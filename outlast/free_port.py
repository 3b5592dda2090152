"""A TCP port that nobody uses, and that nobody is given by chance either."""

from __future__ import annotations

import errno
import random
import socket
from pathlib import Path

_FROM_PORT = 10_000
"""Below are those of well-known services."""
_TRIES = 100


def free_port() -> int:
    """A TCP port that is free on all interfaces now. It is not reserved: use it soon.

    It lies outside of the range from which the kernel takes the ports of outgoing connections, so that only a server
    can take it meanwhile.

    Raises:
        OSError: no port is free.
    """
    first, last = _ephemeral()
    ports: list[int] = [*range(_FROM_PORT, first), *range(last + 1, 1 << 16)]
    draw = random.SystemRandom()  # two processes with one seed must not draw the same
    for port in draw.sample(ports, min(_TRIES, len(ports))):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind(("", port))
            except OSError as error:
                if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                    raise
            else:
                return port
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _ephemeral() -> tuple[int, int]:
    try:
        first, last = (int(word) for word in Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    except (OSError, ValueError):  # not Linux's /proc: what IANA says
        return 49152, 65535
    return first, last
