"""Nodes whose clocks differ train together, and a dead node is found by any clock."""

from __future__ import annotations

import logging
import pickle
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    RendezvousSettings,
    RendezvousTimeout,
    _NodeDesc,
    _RendezvousState,
)

from outlast.free_port import free_port
from outlast.launch.node_clocks import StateHolder
from tests.forked import Job
from tests.helpers import clean_env, events, tiny_config

KEEP_ALIVE_S = 0.05


def holder() -> tuple[StateHolder, Any]:
    """A reader that takes a node for dead after 0.15 s, and the backend that it reads."""
    backend = C10dRendezvousBackend(HashStore(), "run")
    interval = timedelta(seconds=KEEP_ALIVE_S)
    settings = RendezvousSettings("run", 1, 2, RendezvousTimeout(), interval, 3)
    return StateHolder(backend, settings, cache_duration=0), backend


def beat(backend: Any, node: _NodeDesc, at: datetime) -> None:
    """What a node writes that says it is ``at``."""
    found = backend.get_state()
    state = _RendezvousState() if found is None else pickle.loads(found[0])
    state.participants[node] = 0
    state.last_heartbeats[node] = at
    assert backend.set_state(pickle.dumps(state), None if found is None else found[1])[2]


@pytest.mark.parametrize("shift_s", [-3600.0, -60.0, 60.0, 3600.0])
def test_a_node_lives_while_it_writes_and_is_dead_when_it_no_longer_does(
    shift_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    reader, backend = holder()
    node = _NodeDesc("other", 7, 0)
    with caplog.at_level(logging.WARNING, "outlast.launch"):
        for _ in range(6):
            beat(backend, node, datetime.now(UTC) + timedelta(seconds=shift_s))
            reader.sync()
            assert node in reader.state.participants
            time.sleep(0.02)
    (told,) = [record.getMessage() for record in caplog.records]
    assert f"node other is about {abs(shift_s):.0f} s {'behind' if shift_s < 0 else 'ahead of'} this node's" in told
    time.sleep(4 * KEEP_ALIVE_S)
    reader.sync()
    assert node not in reader.state.participants


def test_what_is_written_back_is_what_was_read() -> None:
    reader, backend = holder()
    node, at = _NodeDesc("other", 7, 0), datetime(2020, 1, 1, tzinfo=UTC)
    beat(backend, node, at)
    reader.sync()
    reader.state.round = 3
    reader.mark_dirty()
    assert reader.sync()
    assert pickle.loads(backend.get_state()[0]).last_heartbeats == {node: at}


def test_clocks_that_agree_are_not_told(caplog: pytest.LogCaptureFixture) -> None:
    reader, backend = holder()
    with caplog.at_level(logging.WARNING, "outlast.launch"):
        for _ in range(4):
            beat(backend, _NodeDesc("other", 7, 0), datetime.now(UTC))
            reader.sync()
    assert not caplog.records


@pytest.mark.parametrize("shift_s", ["-60", pytest.param("3600", marks=pytest.mark.soak)])
def test_two_nodes_train_together_whatever_their_clocks_say(tmp_path: Path, shift_s: str) -> None:
    config, run = tiny_config(tmp_path)
    words = ["launch", str(config), "--nproc-per-node", "1", "--nnodes", "2", "--local-addr", "127.0.0.1"]
    words += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--trainer.steps", "100"]
    jobs = [
        Job(
            "tests.launch.shifted_clock",
            words,
            env=clean_env(CLOCK_SHIFT_S=shift),
            stdout=tmp_path / f"log{node}",
            stderr=tmp_path / f"log{node}",
        )
        for node, shift in enumerate(("0", shift_s))
    ]
    logs = [tmp_path / f"log{node}" for node in (0, 1)]
    try:
        assert [job.wait(120) for job in jobs] == [0, 0], [log.read_text()[-3000:] for log in logs]
    finally:
        for job in jobs:
            job.kill()
    assert {record["world_size"] for record in events(run, "run_started")} == {2}
    assert len(events(run, "run_started")) == 2
    assert any("the clock of node" in log.read_text() for log in logs)
