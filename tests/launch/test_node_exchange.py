"""Launchers hear of one another through a real store, believe nobody without the secret, and come back."""

from __future__ import annotations

import gc
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]

from outlast.diagnostics.live import StallRules
from outlast.events import EventLog
from outlast.free_port import free_port
from outlast.launch.node_exchange import NodeExchange
from outlast.launch.other_nodes import OtherNodes
from outlast.launch.sealed import Seal
from tests.helpers import events, wait_for

SECRET = b"k" * 32


def server(port: int) -> TCPStore:
    return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))


def client(port: int) -> TCPStore:
    return TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))


class Nodes:
    """The exchanges of some nodes, and what each has read last of whom."""

    def __init__(self, stores: list[Any], secrets: list[bytes] | None = None) -> None:
        self.read: list[dict[int, bytes]] = [{} for _ in stores]
        self.alive = set(range(len(stores)))
        secrets = secrets or [SECRET] * len(stores)
        self.exchanges = [
            NodeExchange(
                store,
                secret=secrets[node],
                round_name="job/0",
                node=node,
                nodes=len(stores),
                interval_s=0.02,
                write=lambda number, node=node: f"{node}:{number}".encode(),
                read=self.read[node].__setitem__,
            )
            for node, store in enumerate(stores)
        ]
        for one in self.exchanges:
            one.start()

    def number(self, reader: int, writer: int) -> int:
        return int(self.read[reader].get(writer, b"0:0").split(b":")[1])

    def close(self) -> None:
        for one in self.exchanges:
            one.close()


@pytest.mark.parametrize("make", [HashStore, lambda: server(free_port())], ids=["HashStore", "TCPStore"])
def test_node_0_hears_all_and_all_hear_node_0(make: Callable[[], Any]) -> None:
    store = make()
    nodes = Nodes([store] * 3)
    wait_for(lambda: min(nodes.number(0, 1), nodes.number(0, 2), nodes.number(1, 0), nodes.number(2, 0)) > 3)
    assert set(nodes.read[1]) == {0}, "a node reads one message, however many nodes there are"
    nodes.close()


def test_nothing_without_the_secret_is_read() -> None:
    store = server(free_port())
    nodes = Nodes([store] * 3, [SECRET, SECRET, b"x" * 32])
    wait_for(lambda: nodes.number(0, 1) > 3)
    other = Seal(SECRET, "outlast/nodes/job/0/1").seal(b"1:999999")
    store.set("outlast/nodes/job/0/2", other)  # what one node has sealed is no word of another
    wait_for(lambda: nodes.number(0, 1) > 10)
    assert 2 not in nodes.read[0]
    nodes.close()


def test_a_store_that_is_lost_and_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    held = [server(port)]
    nodes = Nodes([client(port), client(port)])
    for one in nodes.exchanges:
        one.told_after_s = 0.0
    wait_for(lambda: nodes.number(1, 0) > 3)
    held.clear()
    gc.collect()
    before = nodes.number(1, 0)
    time.sleep(0.5)
    held.append(server(port))
    wait_for(lambda: nodes.number(1, 0) > before + 3 and nodes.number(0, 1) > before + 3)
    nodes.close()
    assert "have not been heard" in caplog.text
    assert "are heard again" in caplog.text


def test_a_node_that_hangs_in_the_store_ends_in_time() -> None:
    class Stuck(HashStore):  # type: ignore[misc]
        """As a store behind a link that was cut."""

        def set(self, *_: object) -> None:
            threading.Event().wait(30)

    exchange = Nodes([Stuck()])
    began_s = time.monotonic()
    exchange.close()
    assert time.monotonic() - began_s < 20


SERVER = """
import sys, threading
from torch.distributed import TCPStore
held = TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, wait_for_workers=False)
print("ready", flush=True)
threading.Event().wait(120)
"""


def test_a_store_that_stands_still_holds_up_neither_the_end_nor_the_exit() -> None:
    port = free_port()
    with subprocess.Popen([sys.executable, "-c", SERVER, str(port)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            nodes = Nodes([client(port), client(port)])
            wait_for(lambda: nodes.number(1, 0) > 3 and nodes.number(0, 1) > 3)
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.3)
            nodes.close()
            assert not any(one._thread.is_alive() for one in nodes.exchanges)
        finally:
            process.kill()


def test_a_launcher_that_stands_still_says_nothing_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outlast.launch.other_nodes.CLOCKS_EVERY_S", 0.0)
    store = HashStore()
    (tmp_path / "events").mkdir()

    def other(node: int, log: EventLog) -> OtherNodes:
        return OtherNodes(
            store,
            secret=SECRET,
            round_name="job/0",
            node=node,
            nodes=2,
            world_size=2,
            host=f"h{node}",
            rules=StallRules(floor_s=8.0, factor=4.0, startup_limit_s=600.0),
            interval_s=0.05,
            told_after_s=4.0,
            conditions=list,
            events=log,
        )

    with EventLog(tmp_path / "events" / "agent_a.jsonl", rank=-1) as log:
        first, second = other(0, log), other(1, log)
        first.start()
        second.start()
        first.look([0], [], [])
        wait_for(lambda: second.look([1], [], []) or 1 not in first.collector.silent())
        wait_for(lambda: 1 in first.collector.silent())  # nobody calls its look: its messages repeat what was said
        wait_for(lambda: second.look([1], [], []) or first.look([0], [], []) or events(tmp_path, "node_clock"))
        first.close()
        second.close()
    clock = events(tmp_path, "node_clock")[0]
    assert (clock["host"], clock["node"]) == ("h1", 1)
    assert abs(clock["ahead_s"]) <= clock["error_s"] + 1e-3
    assert json.loads((tmp_path / "events" / "agent_a.jsonl").read_text().splitlines()[0])["kind"] == "node_clock"
