"""A node's events, followed while they are written."""

from __future__ import annotations

import os
from pathlib import Path

from outlast.diagnostics.export import follow
from outlast.diagnostics.export.follow import NodeEvents
from tests.diagnostics.export.node import Node


def seen(told: list[follow.Told]) -> list[tuple[float, int, str]]:
    return [(record.t, record.rank, record.kind) for _, record in told]


def test_events_come_once_in_the_order_of_time(tmp_path: Path) -> None:
    node = Node(tmp_path)
    events = NodeEvents(tmp_path, node.agent, since_t=50.0)
    assert events.poll() == ([], False)
    node.started(100.0)
    node.step(103.0, 1)
    told, more = events.poll()
    assert not more
    assert [kind for _, _, kind in seen(told)] == ["workers_started", "run_started", "run_started", "step", "step"]
    assert [attempt for attempt, _ in told] == [0, 1, 1, 1, 1]
    assert events.poll() == ([], False)
    with node.rank_file(0).open("a") as file:
        file.write('{"v":1,"t":104.0,"rank":0,"generation":0,"ki')
    assert events.poll() == ([], False), "half a line is none"
    with node.rank_file(0).open("a") as file:
        file.write('nd":"eval","loss":1.0}\nnot an event\n')
    assert seen(events.poll()[0]) == [(104.0, 0, "eval")]
    assert events.unreadable == 1


def test_earlier_launches_and_other_nodes_ranks_are_left_out(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.started(100.0)
    node.step(101.0, 1)
    os.utime(node.rank_file(0), (101.0, 101.0))
    node.attempt = 2
    node.started(200.0, ranks=(1, 2))
    node.step(203.0, 2, ranks=(0, 1, 2))
    events = NodeEvents(tmp_path, node.agent, since_t=150.0)
    told = [one for one in seen(events.drain()) if one[2] == "step"]
    assert told == [(203.0, 1, "step"), (203.0, 2, "step")]


def test_a_rank_that_moved_to_another_node_is_left_out_from_then_on(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.started(100.0, ranks=(0, 1))
    node.generation = 1
    node.started(200.0, ranks=(0,))
    node.step(201.0, 5)
    told = NodeEvents(tmp_path, node.agent, since_t=1.0).drain()
    assert [one for one in seen(told) if one[2] == "step"] == [(201.0, 0, "step")]


def test_long_files_are_read_in_pieces_in_order(tmp_path: Path, monkeypatch: object) -> None:
    node = Node(tmp_path)
    node.started(100.0)
    for step in range(1, 200):
        node.step(101.0 + step, step, ranks=(0,))
        if step % 10 == 0:
            node.step(101.0 + step, step, ranks=(1,))
    events = NodeEvents(tmp_path, node.agent, since_t=1.0)
    before, follow.READ_BYTES = follow.READ_BYTES, 4096
    try:
        found, more, polls = [], True, 0
        while more:
            told, more = events.poll()
            found += told
            polls += 1
    finally:
        follow.READ_BYTES = before
    times = [record.t for _, record in found]
    assert polls > 5
    assert times == sorted(times)
    assert len(times) == 3 + 199 + 19
