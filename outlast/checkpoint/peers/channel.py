"""Connections between ranks for what must not go over the training's process groups.

Both ends prove that they hold the run's secret (HMAC-SHA256 over fresh random numbers of both, so that a recorded
handshake is worth nothing) before anything else is read; every frame's header carries a MAC under a key of this
connection and a counter. Payloads are not encrypted, and are protected by the CRC32C their reader compares, against
faults and not against an attacker on the wire.
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
"""Where a payload of some bytes is to go, by its header; None refuses the connection."""


class Channel:
    """One authenticated connection. One thread may send while another receives.

    Failure contract: whatever goes wrong (the peer is gone, silent for longer than the timeout, or not who it should
    be) raises ``OSError``, and the channel is closed.
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
            OSError: it cannot be reached, or does not hold the secret.
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
        """Send one frame; on return the buffers may be reused."""
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
        """The next frame's header; its payload, if it has one, is where ``sink`` said.

        Args:
            sink: None: a payload is an error.
            idle: wait for the frame's begin as long as it takes, and not for the timeout.
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
                raise ConnectionError(f"a header of {length} bytes")
            text = self._exactly(length)
            mac = self._exactly(_MAC_BYTES)
            if not hmac.compare_digest(mac, self._mac(not self._dialled, "received", head + text)):
                raise ConnectionError("a frame that the peer did not make")
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
        """Close; a thread that waits in :meth:`receive` or :meth:`send` gets an ``OSError``. Twice is harmless."""
        with suppress(OSError):  # not connected any more
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
    """Accepts connections of those who hold the secret, each served in a thread of its own.

    Args:
        host: the address to listen on, and on no other.
        secret: of the run.
        serve: called with each channel; the channel is closed when it returns.
        timeout_s: within which a peer must go on with what it began.

    Raises:
        CheckpointError: the address cannot be listened on.
    """

    def __init__(self, host: str, secret: bytes, serve: Callable[[Channel], None], timeout_s: float) -> None:
        if not secret:
            raise CheckpointError("a listener needs a secret")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, 0), family=family, backlog=_BACKLOG)
        except OSError as error:
            raise CheckpointError(
                f"cannot listen on {host}: {error}", "pass host=, an address of this node's own"
            ) from error
        self._secret = secret
        self._serve = serve
        self._timeout_s = timeout_s
        self._closed = False
        self._open: set[Channel] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, name="outlast-listen", daemon=True).start()

    @property
    def address(self) -> tuple[str, int]:
        """Where peers dial."""
        host, port = self._socket.getsockname()[:2]
        return str(host), int(port)

    def close(self) -> None:
        """Accept no more, and close what is open."""
        self._closed = True
        with suppress(OSError):  # it was not waiting
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
                self._serve(channel)
        except OSError as error:
            _log.info("the connection from %s ended: %s", peer[0], error)
        finally:
            channel.close()
            with self._lock:
                self._open.discard(channel)


def _shake_hands(sock: socket.socket, secret: bytes, *, dialled: bool) -> bytes:
    """Prove the secret to each other; a key for this connection alone.

    The dialler proves first: one that listens tells nothing to strangers.
    """
    mine = secrets.token_bytes(_NONCE_BYTES)
    sock.sendall(_MAGIC + mine)
    greeting = bytearray(len(_MAGIC) + _NONCE_BYTES)
    _receive_into(sock, memoryview(greeting))
    if greeting[: len(_MAGIC)] != _MAGIC:
        raise ConnectionError("the peer does not speak this protocol")
    theirs = bytes(greeting[len(_MAGIC) :])
    both = mine + theirs if dialled else theirs + mine
    proofs = {who: hmac.digest(secret, word + both, "sha256") for who, word in ((True, b"dial"), (False, b"answer"))}
    if dialled:
        sock.sendall(proofs[True])
    proof = bytearray(_MAC_BYTES)
    _receive_into(sock, memoryview(proof))
    if not hmac.compare_digest(bytes(proof), proofs[not dialled]):
        raise ConnectionError("the peer does not hold this run's secret")
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
