"""When all stand still, the nodes try out one another once, whatever the store or the others do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from outlast.events import EventLog, read_events
from outlast.launch.standstill_probe import StandstillProbe
from tests.helpers import wait_for

SECRET = b"s" * 32


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20), wait_for_workers=False)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EventLog]:
    with EventLog(tmp_path / "agent.jsonl", rank=-1) as log:
        yield log


def part(store: dist.Store, log: EventLog, folder: Path, node: int, nodes: int = 2) -> StandstillProbe:
    return StandstillProbe(
        store,
        secret=SECRET,
        round_name="job/0",
        node=node,
        nodes=nodes,
        address="127.0.0.1",
        folder=folder,
        events=log,
    )


def test_once_when_they_begin_to_stand_still(tmp_path: Path, store: dist.TCPStore, log: EventLog) -> None:
    first, second = (part(store, log, tmp_path, node) for node in (0, 1))
    assert first.look(stands_still=False) == 0
    assert first.look(stands_still=True) == 1
    second.take_part(0)
    assert second.number == 0
    second.take_part(1)
    second.take_part(1)
    (told,) = wait_for(lambda: list(read_events(log.path)), timeout_s=60)
    assert (told.kind, told["nodes"], told["heard"]) == ("nodes_probed", 2, 2)
    assert not [one for one in told["findings"] if " from " in one], told["findings"]
    assert first.look(stands_still=True) == 1, "they still do"
    assert first.look(stands_still=False) == 1
    assert first.look(stands_still=True) == 1, "again, a short while after"
    first.close()
    second.close()


def test_a_job_of_one_node_has_no_links(tmp_path: Path, store: dist.TCPStore, log: EventLog) -> None:
    assert part(store, log, tmp_path, 0, nodes=1).look(stands_still=True) == 0


def test_the_end_of_the_ranks_does_not_wait_for_it(tmp_path: Path, store: dist.TCPStore, log: EventLog) -> None:
    alone = part(store, log, tmp_path, 0)
    alone.look(stands_still=True)
    time.sleep(0.2)
    alone.close(wait_s=30.0)
    assert alone._thread is not None
    assert not alone._thread.is_alive()
    assert not list(read_events(log.path))
    alone.take_part(9)
    assert alone.number == 1, "closed"


def test_a_store_that_is_gone_is_told_of(tmp_path: Path, log: EventLog, caplog: pytest.LogCaptureFixture) -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5), wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=5))
    del server
    one = part(client, log, tmp_path, 0)
    one.look(stands_still=True)
    wait_for(lambda: caplog.records, timeout_s=20)
    assert "outlast: the nodes could not be tried out: ConnectionRefusedError" in caplog.text
    one.close()
