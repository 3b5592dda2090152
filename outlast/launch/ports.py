"""This host's addresses, TCP ports in use, and the process that uses them."""

from __future__ import annotations

import os
import socket
import threading
from datetime import timedelta

import psutil

from outlast.errors import LaunchError, PortInUse
from outlast.free_port import free_port

PROBE_S = 3.0
LOOPBACKS = {"127.0.0.1": socket.AF_INET, "::1": socket.AF_INET6}
"""The addresses of this host that no other host reaches, as far as it has them."""


def loopback() -> str:
    """This host's loopback address: ``127.0.0.1``, or ``::1`` where there is only IPv6.

    Raises:
        LaunchError: it has neither.
    """
    problems = []
    for address, family in LOOPBACKS.items():
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.bind((address, 0))
        except OSError as error:
            problems.append(f"{address}: {error.strerror}")
        else:
            return address
    raise LaunchError(
        f"this host has no loopback address ({'; '.join(problems)})", "set the interface lo up: ip link set lo up"
    )


def is_own_address(host: str) -> bool:
    """Whether a server on this host can listen at ``host``, a name or an address, whatever this host's own name is."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
        except OSError:
            continue
        return True
    return False


def sockets_of(port: int) -> set[int]:
    """This process's file descriptors that are connected to ``port`` of some host."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as one:
                if one.family in LOOPBACKS.values() and one.getpeername()[1] == port:
                    found.add(int(name))
        except OSError:  # closed meanwhile, or not connected
            continue
    return found


def fail_when_silent(fd: int, after_s: float) -> None:
    """Have the kernel fail a TCP connection whose other end has not answered for about ``after_s``.

    Without this it takes the kernel a quarter of an hour to give up on a link that was cut, and torch's stores wait for
    as long, whatever their own time limit.
    """
    with socket.socket(fileno=os.dup(fd)) as one:
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * after_s))
        one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(after_s / 3)))
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, int(after_s / 6)))
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)


def is_free(port: int) -> bool:
    """Whether a server can listen on ``port`` on all interfaces of this host.

    Raises:
        LaunchError: this user may not listen on such a port.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen(1)
        except PermissionError as error:
            raise LaunchError(f"this user may not listen on port {port}", "choose a port above 1023") from error
        except OSError:
            return False
    return True


def listening_process(port: int) -> str:
    """The process that listens on ``port``, as ``'nginx' (pid 12)``; empty if it is unknown, as for other users'."""
    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.AccessDenied:
        return ""
    for one in connections:
        if one.status == psutil.CONN_LISTEN and one.laddr and one.laddr.port == port and one.pid:
            try:
                return f"{psutil.Process(one.pid).name()!r} (pid {one.pid})"
            except psutil.Error:
                return f"pid {one.pid}"
    return ""


def is_store(host: str, port: int) -> bool:
    """Whether a torch TCPStore answers at ``host:port`` within 3 s.

    torch's client waits for ever if a server accepts and stays silent, so it connects in a thread, which is abandoned
    if it does not return.
    """
    import torch.distributed as dist

    answered: list[bool] = []

    def connect() -> None:
        try:
            dist.TCPStore(  # type: ignore[attr-defined]
                host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=PROBE_S)
            )
        except (RuntimeError, ValueError, TimeoutError):
            return
        answered.append(True)

    thread = threading.Thread(target=connect, daemon=True, name="outlast-port-probe")
    thread.start()
    thread.join(PROBE_S + 0.5)
    return bool(answered)


def check_port(host: str, port: int, *, may_join: bool) -> None:
    """Make sure the rendezvous can use a port of this host.

    Args:
        host: the name under which other nodes reach the port.
        port: the port; 0 is always free.
        may_join: whether a store that already listens there is acceptable: another launcher of the same job.

    Raises:
        PortInUse: something else listens there.
    """
    if port == 0 or is_free(port) or (may_join and is_store(host, port)):
        return
    if may_join and is_free(port):  # another launcher was checking the port
        return
    user = listening_process(port) or "an unknown process (another user's, or a connection that is closing)"
    raise PortInUse(
        f"port {port} of {host} is in use by {user}, which is not a rendezvous for this run",
        f"end that process, or choose another port (--rdzv-endpoint {host}:PORT, or --master-port PORT); "
        f"port {free_port()} is free now",
    )
