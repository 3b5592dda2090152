"""How fast and how quick the link between two nodes is: a few messages to and fro, and a stream each way.

The connection is the probe's own, never one of the training's. Both ends show that they know the run's secret before a
byte is measured, with random numbers of each other's, so that nobody can repeat what was said before. Each measurement
is bounded in time and in bytes.
"""

from __future__ import annotations

import secrets
import socket
import statistics
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

NONCE_BYTES = 16
NUMBER_BYTES = 4
MAC_BYTES = 32
BLOCK_BYTES = 256 * 1024
SEND_BUFFER_BYTES = 1 << 20
"""What the sender has on its way is soon through, also over a slow link."""
HANDSHAKE_S = 2.0
GO, PING = b"g", b"p"


class Sealer(Protocol):
    """Puts a MAC of :data:`MAC_BYTES` before a message, and takes it off again; see ``outlast.launch.sealed``."""

    def seal(self, message: bytes) -> bytes:
        """The message with its MAC."""

    def open(self, sealed: bytes) -> bytes | None:
        """The message; None if its MAC is not right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkLimits:
    """Of one pair."""

    stream_s: float = 0.6
    """Seconds of stream in each direction; what takes longer is only waited for,"""
    warmup_s: float = 0.2
    """and this, at its begin, is not counted: buffers and token buckets fill, TCP speeds up."""
    stream_bytes: int = 256 << 20
    """Bytes that each direction sends at most; a quarter of them is not counted."""
    pings: int = 10
    connect_s: float = 2.0
    pair_s: float = 5.0
    """For all of it, once both are there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSeen:
    """What one end has seen."""

    received_bytes_s: float | None = None
    """Bytes a second that came in; None if that could not be measured."""
    latency_s: float | None = None
    """Half of the median time to and fro; None on the end that answered."""
    reason: str = ""
    """Why nothing was measured."""


class LinkProbe:
    """One node's end of its links: listens from the begin to :meth:`close`, or the end of the ``with`` block.

    Args:
        seal: of the run's secret, for this occasion alone.
        node: this node's number.
        limits: of each pair.

    Raises:
        OSError: no port is free.
    """

    def __init__(self, seal: Sealer, node: int, limits: LinkLimits | None = None) -> None:
        self._seal, self._node = seal, node
        self.limits = limits or LinkLimits()
        self._server = _listen()
        self.port = int(self._server.getsockname()[1])
        """Where others connect to."""
        self.refused = 0
        """Connections of somebody who did not know the secret, or said nothing."""
        self._there: dict[int, socket.socket] = {}
        self._came = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._accept, name="outlast-probe", daemon=True)
        self._thread.start()

    def call(self, peer: int, address: str, port: int, wait_s: float) -> LinkSeen:
        """Measure the link to a node that will :meth:`answer`.

        Args:
            peer: its number.
            address: its address.
            port: where it listens.
            wait_s: how long it may be busy with others.
        """
        try:
            with socket.create_connection((address, port), self.limits.connect_s) as connection:
                self._greet(connection, peer)
                if _receive(connection, 1, time.monotonic() + wait_s) != GO:
                    return LinkSeen(reason="it did not begin")
                until_s = time.monotonic() + self.limits.pair_s
                latency_s = self._ping(connection, until_s)
                self._send(connection, until_s)
                return LinkSeen(received_bytes_s=self._measure(connection, until_s), latency_s=latency_s)
        except (OSError, _Refused) as error:
            return LinkSeen(reason=_words(error))

    def answer(self, peer: int, wait_s: float) -> LinkSeen:
        """Measure the link to a node that will :meth:`call`, or has done so already.

        Args:
            peer: its number.
            wait_s: how long it may be busy with others.
        """
        with self._came:
            self._came.wait_for(lambda: peer in self._there, wait_s)
            connection = self._there.pop(peer, None)
        if connection is None:
            return LinkSeen(reason=f"it did not connect within {wait_s:.0f} s")
        try:
            with connection:
                until_s = time.monotonic() + self.limits.pair_s
                _give(connection, GO, until_s)
                for _ in range(self.limits.pings):
                    _give(connection, _receive(connection, 1, until_s), until_s)
                received = self._measure(connection, until_s)
                self._send(connection, until_s)
                return LinkSeen(received_bytes_s=received)
        except (OSError, _Refused) as error:
            return LinkSeen(reason=_words(error))

    def close(self) -> None:
        """Do not listen any more."""
        self._closed = True
        with suppress(OSError):  # a thread that waits in accept() is woken by this
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(HANDSHAKE_S + 1.0)
        with self._came:
            for connection in self._there.values():
                connection.close()
            self._there.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._server.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(0.1)  # too many open files, or the peer has gone already
                continue
            try:
                peer = self._welcome(connection)
            except (OSError, _Refused):
                self.refused += 1
                connection.close()
                continue
            with self._came:
                before = self._there.pop(peer, None)
                if before is not None:
                    before.close()
                self._there[peer] = connection
                self._came.notify_all()

    def _welcome(self, connection: socket.socket) -> int:
        """Let a caller show that it knows the secret, and show the same; returns its number."""
        until_s = time.monotonic() + HANDSHAKE_S
        mine = secrets.token_bytes(NONCE_BYTES)
        _give(connection, mine, until_s)
        length = MAC_BYTES + 1 + 2 * NONCE_BYTES + 2 * NUMBER_BYTES
        said = self._seal.open(_receive(connection, length, until_s))
        numbers = said[1 + 2 * NONCE_BYTES :] if said is not None else b""
        caller, called = (int.from_bytes(one, "big") for one in (numbers[:NUMBER_BYTES], numbers[NUMBER_BYTES:]))
        if said is None or said[:1] != b"c" or said[1 : 1 + NONCE_BYTES] != mine or called != self._node:
            raise _Refused("it does not know the run's secret")
        _give(connection, self._seal.seal(b"a" + said[1:]), until_s)
        _prepare(connection)
        return caller

    def _greet(self, connection: socket.socket, peer: int) -> None:
        until_s = time.monotonic() + self.limits.pair_s
        theirs = _receive(connection, NONCE_BYTES, until_s)
        numbers = self._node.to_bytes(NUMBER_BYTES, "big") + peer.to_bytes(NUMBER_BYTES, "big")
        said = theirs + secrets.token_bytes(NONCE_BYTES) + numbers
        _give(connection, self._seal.seal(b"c" + said), until_s)
        if self._seal.open(_receive(connection, MAC_BYTES + 1 + len(said), until_s)) != b"a" + said:
            raise _Refused("it does not know the run's secret")
        _prepare(connection)

    def _ping(self, connection: socket.socket, until_s: float) -> float:
        took_s = []
        for _ in range(self.limits.pings):
            began_s = time.perf_counter()
            _give(connection, PING, until_s)
            _receive(connection, 1, until_s)
            took_s.append(time.perf_counter() - began_s)
        return statistics.median(took_s) / 2

    def _send(self, connection: socket.socket, until_s: float) -> None:
        block, sent = memoryview(bytes(BLOCK_BYTES)), 0
        end_s = time.monotonic() + self.limits.stream_s
        while sent < self.limits.stream_bytes and time.monotonic() < end_s:
            connection.settimeout(_left(until_s))
            sent += connection.send(block[: self.limits.stream_bytes - sent])
        connection.shutdown(socket.SHUT_WR)

    def _measure(self, connection: socket.socket, until_s: float) -> float | None:
        """Bytes a second of what comes in until its end; None if hardly anything came."""
        limits, buffer = self.limits, memoryview(bytearray(BLOCK_BYTES))
        received, first_s = 0, 0.0
        begin: tuple[float, int] | None = None
        end = (0.0, 0)
        while True:
            connection.settimeout(_left(until_s))
            count = connection.recv_into(buffer)
            now_s = time.monotonic()
            if count == 0:
                break
            first_s = first_s or now_s
            received += count
            if received > 2 * limits.stream_bytes:
                raise _Refused("it sent more than was asked for")
            if begin is None and (now_s - first_s >= limits.warmup_s or received >= limits.stream_bytes // 4):
                begin = now_s, received
            if now_s - first_s <= limits.stream_s or end[1] == 0:
                end = now_s, received
        begin = begin or (first_s, 0)
        return (end[1] - begin[1]) / (end[0] - begin[0]) if end[0] > begin[0] else None


class _Refused(Exception):
    """The other end is not what it should be."""


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _prepare(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)


def _left(until_s: float) -> float:
    left_s = until_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("timed out")
    return left_s


def _give(connection: socket.socket, data: bytes, until_s: float) -> None:
    connection.settimeout(_left(until_s))
    connection.sendall(data)


def _receive(connection: socket.socket, count: int, until_s: float) -> bytes:
    found = bytearray()
    while len(found) < count:
        connection.settimeout(_left(until_s))
        part = connection.recv(count - len(found))
        if not part:
            raise _Refused("it closed the connection")
        found += part
    return bytes(found)


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__
