"""A small HTTP server on a socket that listens already; it says nothing of requests, and no client keeps another."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from outlast.errors import PortInUse

TIMEOUT_S = 10.0
"""A client that is silent for so long is left."""
LISTENING = 64
"""Connections that may wait."""

Wsgi = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def listen(host: str, port: int, setting: str) -> socket.socket:
    """A TCP socket that listens at ``host:port``.

    Args:
        host: a name or address of this host; empty for all of its IPv4 addresses.
        port: 0 for a free one.
        setting: names the port in messages, e.g. ``export.prometheus_port``.

    Raises:
        PortInUse: something else listens there, or it is no address of this host.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(LISTENING)
    except OSError as error:
        listening.close()
        where = f" at {host}" if host not in ("", "127.0.0.1") else ""
        raise PortInUse(
            f"{setting} = {port} cannot be used{where}: {error.strerror or os.strerror(error.errno or 0)}",
            "choose another, or 0 for a free one; each launcher on a machine needs its own",
        ) from error
    return listening


class WsgiServer(ThreadingMixIn, WSGIServer):
    """Serves an application on a socket, a thread for each request.

    Args:
        listening: a bound TCP socket, which listens; it is closed with the server.
        app: what answers.
    """

    daemon_threads = True

    def __init__(self, listening: socket.socket, app: Wsgi) -> None:
        address = listening.getsockname()
        super().__init__(address[:2], _Quiet, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.server_name, self.server_port = str(address[0]), int(address[1])
        self.setup_environ()
        self.set_app(app)


class _Quiet(WSGIRequestHandler):
    timeout = TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of requests."""
