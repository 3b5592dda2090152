"""Strangers at a rank's listener: they take neither its descriptors nor its log, and an honest peer gets through."""

from __future__ import annotations

import logging
import queue
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from outlast.checkpoint.peers import channel as channels
from outlast.checkpoint.peers.channel import Channel, Listener

SECRET = b"secret"


@pytest.fixture
def listener() -> Iterator[tuple[Listener, queue.SimpleQueue[object]]]:
    seen: queue.SimpleQueue[object] = queue.SimpleQueue()

    def serve(channel: Channel) -> None:
        seen.put(channel.receive())
        channel.send({"ok": True})

    made = Listener("127.0.0.1", SECRET, serve, 30.0)
    yield made, seen
    made.close()


def honest(listener: Listener) -> None:
    peer = Channel.dial(listener.address, SECRET, 30.0)
    peer.send({"hello": 1})
    assert peer.receive() == {"ok": True}
    peer.close()


def unproven(listener: Listener) -> int:
    return len(listener._unproven)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def silent(listener: Listener, count: int) -> list[socket.socket]:
    return [socket.create_connection(listener.address, timeout=30) for _ in range(count)]


def test_400_silent_strangers(
    listener: tuple[Listener, queue.SimpleQueue[object]], caplog: pytest.LogCaptureFixture
) -> None:
    made, seen = listener
    with caplog.at_level(logging.WARNING, "outlast.checkpoint"):
        strangers = silent(made, 400)
        honest(made)
        until(lambda: unproven(made) <= channels._MAX_UNPROVEN)
        until(lambda: sum(each.name == "outlast-peer" for each in threading.enumerate()) <= channels._MAX_UNPROVEN + 1)
    assert seen.get() == {"hello": 1}
    assert len(caplog.records) <= 3
    for stranger in strangers:
        stranger.close()


def test_a_byte_now_and_then_does_not_prolong_a_handshake(
    listener: tuple[Listener, queue.SimpleQueue[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = listener
    monkeypatch.setattr(channels, "_HANDSHAKE_S", 0.5)
    stranger = socket.create_connection(made.address, timeout=30)
    until(lambda: unproven(made) == 1)
    for byte in channels._MAGIC + bytes(100):
        try:
            stranger.send(bytes([byte]))
        except OSError:
            break
        if unproven(made) == 0:
            break
        time.sleep(0.05)
    until(lambda: unproven(made) == 0)
    stranger.close()


def test_wrong_secrets_by_the_hundred_fill_no_log(
    listener: tuple[Listener, queue.SimpleQueue[object]], caplog: pytest.LogCaptureFixture
) -> None:
    made, _ = listener
    with caplog.at_level(logging.WARNING, "outlast.checkpoint"):
        for _ in range(100):
            with pytest.raises(OSError, match=r"closed|reset|pipe"):
                Channel.dial(made.address, b"another", 30.0)
        honest(made)
    assert len(caplog.records) <= 3


def test_without_descriptors_it_waits_and_then_serves(
    listener: tuple[Listener, queue.SimpleQueue[object]], caplog: pytest.LogCaptureFixture
) -> None:
    made, _ = listener
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    stranger = socket.socket()
    with caplog.at_level(logging.WARNING, "outlast.checkpoint"):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (stranger.fileno() + 1, before[1]))
            stranger.connect(made.address)
            until(lambda: any("could not be accepted" in record.message for record in caplog.records))
            time.sleep(0.5)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        honest(made)
    assert len(caplog.records) <= 3
    stranger.close()
