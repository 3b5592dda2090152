"""Free ports, taken ports, and who has taken them."""

from __future__ import annotations

import socket
import threading
from datetime import timedelta

import psutil

from outlast.errors import LaunchError, PortInUse

PROBE_S = 3.0


def free_port() -> int:
    """A TCP port that is free on all interfaces now. It is not held: use it soon."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def is_free(port: int) -> bool:
    """Whether a server could listen at ``port`` on all interfaces of this host.

    Raises:
        LaunchError: this user may not listen at such a port.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen(1)
        except PermissionError as error:
            raise LaunchError(f"this user may not listen at port {port}", "choose one above 1023") from error
        except OSError:
            return False
    return True


def who_listens(port: int) -> str:
    """The process listening at ``port``, as ``'nginx' (pid 12)``; empty where it is not known (another user's)."""
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
    """Whether a torch TCPStore answers at ``host:port``, within 3 s.

    torch's own client waits for ever for the greeting of a server that says nothing, so it is asked in a thread of its
    own, which is left behind where it does not return.
    """
    import torch.distributed as dist

    answered: list[bool] = []

    def ask() -> None:
        try:
            dist.TCPStore(  # type: ignore[attr-defined]
                host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=PROBE_S)
            )
        except (RuntimeError, ValueError, TimeoutError):
            return
        answered.append(True)

    thread = threading.Thread(target=ask, daemon=True, name="outlast-port-probe")
    thread.start()
    thread.join(PROBE_S + 0.5)
    return bool(answered)


def check_port(host: str, port: int, *, may_join: bool) -> None:
    """Make sure that the rendezvous can be held at a port of this host.

    Args:
        host: the name by which the port will be reached.
        port: the port; 0 is always fine.
        may_join: whether a store that listens there already will do (another launcher of the same job on this host).

    Raises:
        PortInUse: something else listens there.
    """
    if port == 0 or is_free(port) or (may_join and is_store(host, port)):
        return
    if may_join and is_free(port):  # what was there was another launcher's look at the port
        return
    who = who_listens(port) or "a process that cannot be told (another user's, or a connection that still ends)"
    raise PortInUse(
        f"port {port} of {host} is taken by {who}, which is no rendezvous this run could use",
        f"end that process, or choose another port (--rdzv-endpoint {host}:PORT, or --master-port PORT); "
        f"port {free_port()} is free now",
    )
