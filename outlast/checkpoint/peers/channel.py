"""Connections between ranks for what must not go over the training's process groups.

Both ends prove that they have the run's secret before anything else is read (HMAC-SHA256 over fresh random numbers of
both, so that a recorded handshake is useless). Every frame's header carries a MAC under a key of this connection, with
a counter. Payloads are not encrypted; the CRC32C that their reader compares protects them against faults, not against
an attacker on the wire.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from outlast.checkpoint.shortage import start
from outlast.errors import CheckpointError

_log = logging.getLogger("outlast.checkpoint")
_MAGIC = b"outlast-1"
_NONCE_BYTES = 32
_MAC_BYTES = 32
_HEAD = struct.Struct(">IQ")
_MAX_HEADER_BYTES = 64 << 20
_BACKLOG = 128
_HANDSHAKE_S = 10.0
"""How long a handshake may take as a whole, however its bytes trickle in."""
_MAX_UNPROVEN = 64
"""Connections that have not proven yet that they have the secret; one more, and the oldest is closed."""
_PAUSE_S = (0.05, 1.0)
"""How long the listener waits after a connection could not be accepted, and at most after several in a row."""
_LOG_EVERY_S = 10.0

Header = dict[str, Any]
Sink = Callable[[Header, int], memoryview | None]
"""Gives the memory for a payload, from its header and its size in bytes; None refuses the connection."""


class Channel:
    """One authenticated connection. One thread may send while another receives.

    Failure contract: whatever goes wrong (the peer is gone, silent for longer than the timeout, or cannot prove who it
    is) raises ``OSError``, and the channel is closed.

    Args:
        sock: connected, with a timeout; owned by the channel.
        key: of this connection, from the handshake.
    """

    def __init__(self, sock: socket.socket, key: bytes) -> None:
        self._socket = sock
        self._keys = {True: hmac.digest(key, b"dialled", "sha256"), False: hmac.digest(key, b"answered", "sha256")}
        self._dialled = False
        self._counts = {"sent": 0, "received": 0}
        self._sending = threading.Lock()

    @classmethod
    def dial(cls, address: tuple[str, int], secret: bytes, timeout_s: float) -> Channel:
        """Connect to a :class:`Listener`.

        Raises:
            OSError: it cannot be reached, or does not have the secret.
        """
        sock = socket.create_connection(address, timeout=timeout_s)
        try:
            channel = cls(sock, _shake_hands(sock, secret, timeout_s, dialled=True))
            channel._dialled = True
            return channel
        except OSError:
            sock.close()
            raise

    def send(self, header: Header, payload: Sequence[memoryview] = ()) -> None:
        """Send one frame, blocking. On return the payload's buffers may be reused.

        Raises:
            OSError: see the class.
        """
        text = json.dumps(header, separators=(",", ":")).encode()
        try:
            with self._sending:
                nbytes = sum(len(part) for part in payload)
                head = _HEAD.pack(len(text), nbytes) + text
                self._socket.sendall(head + self._mac(self._dialled, "sent", head))
                for part in payload:
                    self._socket.sendall(part)
        except OSError:
            self.close()
            raise

    def receive(self, sink: Sink | None = None, *, idle: bool = False) -> Header:
        """Receive one frame. A payload is complete on return, in the memory that ``sink`` gave.

        Args:
            sink: called if the frame has a payload; None: a payload is an error.
            idle: wait for the frame to begin without a timeout.

        Returns:
            The frame's header.

        Raises:
            OSError: see the class.
        """
        try:
            limit_s = self._socket.gettimeout()
            if idle:
                self._socket.settimeout(None)
            first = self._exactly(1)
            self._socket.settimeout(limit_s)
            head = first + self._exactly(_HEAD.size - 1)
            length, nbytes = _HEAD.unpack(head)
            if length > _MAX_HEADER_BYTES:
                raise ConnectionError(
                    f"a frame with a header of {length} bytes, at most {_MAX_HEADER_BYTES} are accepted"
                )
            text = self._exactly(length)
            mac = self._exactly(_MAC_BYTES)
            if not hmac.compare_digest(mac, self._mac(not self._dialled, "received", head + text)):
                raise ConnectionError("a frame whose MAC is wrong")
            header: Header = json.loads(text)
            if nbytes:
                target = sink(header, nbytes) if sink is not None else None
                if target is None:
                    raise ConnectionError(f"an unexpected payload of {nbytes} bytes")
                _receive_into(self._socket, target[:nbytes])
            return header
        except OSError:
            self.close()
            raise
        except ValueError as error:
            self.close()
            raise ConnectionError(f"not a frame: {error}") from error

    def close(self) -> None:
        """Close; a thread blocked in :meth:`receive` or :meth:`send` gets an ``OSError``. Idempotent."""
        with suppress(OSError):  # no longer connected
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _mac(self, dialled: bool, count: str, head: bytes) -> bytes:
        self._counts[count] += 1
        return hmac.digest(self._keys[dialled], self._counts[count].to_bytes(8, "big") + head, "sha256")

    def _exactly(self, nbytes: int) -> bytes:
        data = bytearray(nbytes)
        _receive_into(self._socket, memoryview(data))
        return bytes(data)


class Listener:
    """Accepts connections from peers that have the secret, each in a thread of its own.

    Args:
        host: the only address to listen on.
        secret: of the run.
        on_channel: called with each channel, in the channel's thread; the channel is closed when it returns.
        timeout_s: how long a peer may be silent within a frame.
        port: to listen on; 0: a free one.

    Raises:
        CheckpointError: the address cannot be listened on.
    """

    def __init__(
        self, host: str, secret: bytes, on_channel: Callable[[Channel], None], timeout_s: float, *, port: int = 0
    ) -> None:
        if not secret:
            raise CheckpointError("a listener needs a secret that is not empty")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        except OSError as error:
            raise CheckpointError(
                f"cannot listen on {host}: {error}", "pass host=, one of this node's own addresses"
            ) from error
        self._secret = secret
        self._on_channel = on_channel
        self._timeout_s = timeout_s
        self._closed = threading.Event()
        self._open: set[Channel] = set()
        self._unproven: dict[socket.socket, None] = {}
        """In the order in which they came."""
        self._lock = threading.Lock()
        self._log = SparseLog(_LOG_EVERY_S)
        try:
            start(threading.Thread(target=self._accept, name="outlast-listen", daemon=True))
        except OSError as error:
            self._socket.close()
            raise CheckpointError(f"cannot listen on {host}: {error}") from error

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that peers dial."""
        host, port = self._socket.getsockname()[:2]
        return str(host), int(port)

    def close(self) -> None:
        """Stop accepting, and close all connections."""
        self._closed.set()
        with suppress(OSError):  # accept was not blocked
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._socket.close()
        with self._lock:
            for channel in self._open:
                channel.close()
            for sock in self._unproven:
                _break(sock)

    def _accept(self) -> None:
        pause_s = 0.0
        while not self._closed.wait(pause_s):
            try:
                sock, peer = self._socket.accept()
            except OSError as error:
                if self._closed.is_set():
                    return
                self._log.warning("a connection could not be accepted: %s", error)
                # Out of descriptors, usually: those of strangers are the ones to give up.
                self._close_oldest(at_most=0)
                pause_s = min(max(2 * pause_s, _PAUSE_S[0]), _PAUSE_S[1])
                continue
            pause_s = 0.0
            self._close_oldest(at_most=_MAX_UNPROVEN - 1)
            with self._lock:
                self._unproven[sock] = None
            try:
                start(threading.Thread(target=self._admit, args=(sock, peer), name="outlast-peer", daemon=True))
            except OSError as error:  # the limit of threads
                self._log.warning("a connection from %s could not be served: %s", peer[0], error)
                self._forget(sock)
                sock.close()
                pause_s = _PAUSE_S[0]

    def _close_oldest(self, at_most: int) -> None:
        """Break off the connections that have been unproven for longest, until there are so many left.

        Whoever has the secret proves it at once, so these are strangers. Their own threads close them.
        """
        with self._lock:
            while len(self._unproven) > at_most:
                oldest = next(iter(self._unproven))
                del self._unproven[oldest]
                _break(oldest)

    def _forget(self, sock: socket.socket) -> None:
        with self._lock:
            self._unproven.pop(sock, None)

    def _admit(self, sock: socket.socket, peer: tuple[Any, ...]) -> None:
        try:
            key = _shake_hands(sock, self._secret, min(_HANDSHAKE_S, self._timeout_s), dialled=False)
            sock.settimeout(self._timeout_s)
            channel = Channel(sock, key)
        except OSError as error:
            self._forget(sock)
            sock.close()
            self._log.warning("a connection from %s was refused: %s", peer[0], error)
            return
        self._forget(sock)
        with self._lock:
            self._open.add(channel)
        try:
            if not self._closed.is_set():
                self._on_channel(channel)
        except OSError as error:
            _log.info("the connection from %s ended: %s", peer[0], error)
        finally:
            channel.close()
            with self._lock:
                self._open.discard(channel)


class SparseLog:
    """Warnings that strangers can cause, as often as they like: one line in a while, with the number of the others.

    Args:
        every_s: seconds between two lines.
    """

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._lock = threading.Lock()
        self._last_s = -every_s
        self._left_out = 0

    def warning(self, text: str, *values: object) -> None:
        """Log it, or count it."""
        with self._lock:
            now_s = time.monotonic()
            if now_s - self._last_s < self._every_s:
                self._left_out += 1
                return
            self._last_s, left_out, self._left_out = now_s, self._left_out, 0
        more = f" (and {left_out} more like it since the last such line)" if left_out else ""
        _log.warning(text + "%s", *values, more)


def _break(sock: socket.socket) -> None:
    """End a connection that another thread waits for; that thread closes it."""
    with suppress(OSError):  # no longer connected
        sock.shutdown(socket.SHUT_RDWR)


def _shake_hands(sock: socket.socket, secret: bytes, limit_s: float, *, dialled: bool) -> bytes:
    """Prove the secret to each other within a time, and derive a key for this connection.

    The dialler proves first, so a listener reveals nothing to strangers.
    """
    deadline_s = time.monotonic() + limit_s
    ours = secrets.token_bytes(_NONCE_BYTES)
    sock.settimeout(limit_s)
    sock.sendall(_MAGIC + ours)
    greeting = bytearray(len(_MAGIC) + _NONCE_BYTES)
    _receive_by(sock, memoryview(greeting), deadline_s)
    if greeting[: len(_MAGIC)] != _MAGIC:
        raise ConnectionError("the peer does not speak this protocol")
    theirs = bytes(greeting[len(_MAGIC) :])
    both = ours + theirs if dialled else theirs + ours
    proofs = {who: hmac.digest(secret, word + both, "sha256") for who, word in ((True, b"dial"), (False, b"answer"))}
    if dialled:
        sock.sendall(proofs[True])
    proof = bytearray(_MAC_BYTES)
    _receive_by(sock, memoryview(proof), deadline_s)
    if not hmac.compare_digest(bytes(proof), proofs[not dialled]):
        raise ConnectionError("the peer does not have this run's secret")
    if not dialled:
        sock.sendall(proofs[False])
    sock.settimeout(limit_s)
    return hmac.digest(secret, b"key" + both, hashlib.sha256)


def _receive_by(sock: socket.socket, target: memoryview, deadline_s: float) -> None:
    """Receive all of it by a time, not only each piece within a timeout."""
    done = 0
    while done < len(target):
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the handshake took too long")
        sock.settimeout(left_s)
        count = sock.recv_into(target[done:])
        if count == 0:
            raise ConnectionError("the peer closed the connection")
        done += count


def _receive_into(sock: socket.socket, target: memoryview) -> None:
    done = 0
    while done < len(target):
        count = sock.recv_into(target[done:])
        if count == 0:
            raise ConnectionError("the peer closed the connection")
        done += count
