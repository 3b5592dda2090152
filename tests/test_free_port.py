"""Ports for servers that start a little later."""

from __future__ import annotations

import random
import socket
from contextlib import suppress
from pathlib import Path

import pytest

from outlast.free_port import free_port


def test_no_outgoing_connection_takes_it() -> None:
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    for _ in range(50):
        assert not first <= free_port() <= last


def test_one_seed_in_two_processes_is_no_collision() -> None:
    drawn = []
    for _ in range(2):
        random.seed(0)
        drawn.append([free_port() for _ in range(3)])
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("kernels", ["10000 65534", "1 65535"])
def test_what_is_in_use_is_not_drawn(monkeypatch: pytest.MonkeyPatch, kernels: str) -> None:
    """Where the kernel's range leaves one other port, which is taken, or none, it is asked for one."""
    monkeypatch.setattr(Path, "read_text", lambda self: kernels)
    with socket.socket() as taken:
        with suppress(OSError):  # somebody else has it
            taken.bind(("", 65535))
        with socket.socket() as server:
            server.bind(("", port := free_port()))
    assert port != 65535
