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
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from outlast.errors import CheckpointError

_log = logging.getLogger("outlast.checkpoint")
_MAGIC = b"outlast-1"
_NONCE_BYTES = 32
_MAC_BYTES = 32
_HEAD = struct.Struct(">IQ")
_MAX_HEADER_BYTES = 64 << 20
_BACKLOG = 128

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
            channel = cls(sock, _shake_hands(sock, secret, dialled=True))
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

    Raises:
        CheckpointError: the address cannot be listened on.
    """

    def __init__(self, host: str, secret: bytes, on_channel: Callable[[Channel], None], timeout_s: float) -> None:
        if not secret:
            raise CheckpointError("a listener needs a secret that is not empty")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, 0), family=family, backlog=_BACKLOG)
        except OSError as error:
            raise CheckpointError(
                f"cannot listen on {host}: {error}", "pass host=, one of this node's own addresses"
            ) from error
        self._secret = secret
        self._on_channel = on_channel
        self._timeout_s = timeout_s
        self._closed = False
        self._open: set[Channel] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, name="outlast-listen", daemon=True).start()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that peers dial."""
        host, port = self._socket.getsockname()[:2]
        return str(host), int(port)

    def close(self) -> None:
        """Stop accepting, and close all connections."""
        self._closed = True
        with suppress(OSError):  # accept was not blocked
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._socket.close()
        with self._lock:
            for channel in self._open:
                channel.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                sock, peer = self._socket.accept()
            except OSError as error:
                if self._closed:
                    return
                _log.warning("a connection could not be accepted: %s", error)
                continue
            threading.Thread(target=self._admit, args=(sock, peer), name="outlast-peer", daemon=True).start()

    def _admit(self, sock: socket.socket, peer: tuple[Any, ...]) -> None:
        sock.settimeout(self._timeout_s)
        try:
            channel = Channel(sock, _shake_hands(sock, self._secret, dialled=False))
        except OSError as error:
            sock.close()
            _log.warning("a connection from %s was refused: %s", peer[0], error)
            return
        with self._lock:
            self._open.add(channel)
        try:
            if not self._closed:
                self._on_channel(channel)
        except OSError as error:
            _log.info("the connection from %s ended: %s", peer[0], error)
        finally:
            channel.close()
            with self._lock:
                self._open.discard(channel)


def _shake_hands(sock: socket.socket, secret: bytes, *, dialled: bool) -> bytes:
    """Prove the secret to each other, and derive a key for this connection.

    The dialler proves first, so a listener reveals nothing to strangers.
    """
    ours = secrets.token_bytes(_NONCE_BYTES)
    sock.sendall(_MAGIC + ours)
    greeting = bytearray(len(_MAGIC) + _NONCE_BYTES)
    _receive_into(sock, memoryview(greeting))
    if greeting[: len(_MAGIC)] != _MAGIC:
        raise ConnectionError("the peer does not speak this protocol")
    theirs = bytes(greeting[len(_MAGIC) :])
    both = ours + theirs if dialled else theirs + ours
    proofs = {who: hmac.digest(secret, word + both, "sha256") for who, word in ((True, b"dial"), (False, b"answer"))}
    if dialled:
        sock.sendall(proofs[True])
    proof = bytearray(_MAC_BYTES)
    _receive_into(sock, memoryview(proof))
    if not hmac.compare_digest(bytes(proof), proofs[not dialled]):
        raise ConnectionError("the peer does not have this run's secret")
    if not dialled:
        sock.sendall(proofs[False])
    return hmac.digest(secret, b"key" + both, hashlib.sha256)


def _receive_into(sock: socket.socket, target: memoryview) -> None:
    done = 0
    while done < len(target):
        count = sock.recv_into(target[done:])
        if count == 0:
            raise ConnectionError("the peer closed the connection")
        done += count
