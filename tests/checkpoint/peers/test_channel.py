"""Connections between ranks: only with the secret, only what the peer sent, and never for longer than said."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from outlast.checkpoint.peers.channel import Channel, Header, Listener
from outlast.errors import CheckpointError

SECRET = b"s" * 32


class Echo:
    """Sends each frame back, payload included."""

    def __init__(self) -> None:
        self.served = threading.Event()
        self.errors: queue.Queue[OSError] = queue.Queue()
        """The peer sees the connection's end before its reason is here, so wait for it."""

    def __call__(self, channel: Channel) -> None:
        self.served.set()
        while True:
            room = np.empty(1 << 20, np.uint8).data
            sizes: list[int] = []

            def sink(header: Header, nbytes: int, sizes: list[int] = sizes, room: memoryview = room) -> memoryview:
                sizes.append(nbytes)
                return room

            try:
                header = channel.receive(sink, idle=True)
            except OSError as error:
                self.errors.put(error)
                raise
            channel.send(header, [room[: sizes[0]]] if sizes else [])


@contextmanager
def echo(timeout_s: float = 5.0) -> Iterator[tuple[Listener, Echo]]:
    served = Echo()
    listener = Listener("127.0.0.1", SECRET, served, timeout_s)
    try:
        yield listener, served
    finally:
        listener.close()


def test_frames_arrive_as_they_were_sent() -> None:
    with echo() as (listener, _):
        channel = Channel.dial(listener.address, SECRET, 5.0)
        for number in range(3):
            payload = np.random.default_rng(number).integers(0, 256, 300_000, np.uint8)
            channel.send({"number": number, "text": "ü"}, [payload.data[:1000], payload.data[1000:]])
            back = np.empty(300_000, np.uint8)
            assert channel.receive(lambda _, nbytes, back=back: back.data[:nbytes]) == {"number": number, "text": "ü"}
            assert (back == payload).all()
        channel.close()
        channel.close()


def test_another_secret_is_refused_by_either_side() -> None:
    with echo() as (listener, served):
        with pytest.raises(OSError, match=r"secret|closed|reset"):
            Channel.dial(listener.address, b"x" * 32, 5.0)
        assert not served.served.wait(0.2)


def test_a_listener_without_the_secret_is_refused() -> None:
    """It learns nothing that helps it with another: the proof is over numbers of both sides."""
    liar = Listener("127.0.0.1", b"x" * 32, Echo(), 5.0)
    with pytest.raises(OSError, match=r"secret|closed|reset"):
        Channel.dial(liar.address, SECRET, 5.0)
    liar.close()


def test_a_stranger_gets_no_word_in() -> None:
    with echo(timeout_s=0.5) as (listener, served):
        with socket.create_connection(listener.address, timeout=5) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\nHost: a-name-long-enough-to-fill-it\r\n\r\n")
            answer = b""
            while part := _read(stranger):
                answer += part
        assert len(answer) <= 41, "a greeting, which tells nothing, and the end"
        assert not served.served.is_set()


def _read(sock: socket.socket) -> bytes:
    try:
        return sock.recv(4096)
    except ConnectionError:
        return b""


def test_a_silent_stranger_is_hung_up_on() -> None:
    with echo(timeout_s=0.2) as (listener, served), socket.create_connection(listener.address, timeout=5) as stranger:
        while _read(stranger):
            pass
        assert not served.served.is_set()


def test_a_frame_of_somebody_else_ends_the_connection() -> None:
    with echo() as (listener, served):
        channel = Channel.dial(listener.address, SECRET, 5.0)
        channel.send({"a": 1})
        assert channel.receive() == {"a": 1}
        sock = channel._socket
        body = b'{"a":2}'
        sock.sendall(len(body).to_bytes(4, "big") + bytes(8) + body + b"m" * 32)
        with pytest.raises(OSError, match=r"closed|reset"):
            channel.receive()
    assert "a frame whose MAC is wrong" in str(served.errors.get(timeout=60))


def test_a_frame_that_is_repeated_ends_the_connection() -> None:
    with echo() as (listener, served):
        channel = Channel.dial(listener.address, SECRET, 5.0)
        sent: list[bytes] = []
        real = channel._socket

        class Spy:
            def sendall(self, data: bytes) -> None:
                sent.append(bytes(data))
                real.sendall(data)

            def __getattr__(self, name: str) -> object:
                return getattr(real, name)

        channel._socket = Spy()  # type: ignore[assignment]
        channel.send({"a": 1})
        channel.receive()
        real.sendall(sent[0])
        with pytest.raises(OSError, match=r"closed|reset"):
            channel.receive()
    assert "a frame whose MAC is wrong" in str(served.errors.get(timeout=60))


def test_a_peer_that_falls_silent_is_an_error_in_time() -> None:
    with echo() as (listener, _):
        channel = Channel.dial(listener.address, SECRET, 0.2)
        with pytest.raises(TimeoutError):
            channel.receive()
        with pytest.raises(OSError, match=r"closed|descriptor"):
            channel.send({})


def test_an_unexpected_payload_ends_the_connection() -> None:
    with echo() as (listener, _):
        channel = Channel.dial(listener.address, SECRET, 5.0)
        channel.send({"a": 1}, [memoryview(b"abc")])
        with pytest.raises(ConnectionError, match="unexpected payload of 3 bytes"):
            channel.receive()


def test_what_cannot_listen() -> None:
    with pytest.raises(CheckpointError, match="secret"):
        Listener("127.0.0.1", b"", Echo(), 1.0)
    with pytest.raises(CheckpointError, match=r"cannot listen on 203\.0\.113\.1"):
        Listener("203.0.113.1", SECRET, Echo(), 1.0)
