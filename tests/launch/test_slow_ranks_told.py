"""When a verdict on slow ranks is told, when it is over, and what of the ranks' events is read."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from outlast.diagnostics.live.step_delays import RankDelay
from outlast.diagnostics.probes.node_test import NodeTest
from outlast.diagnostics.report.told_verdicts import find_told, open_verdicts
from outlast.diagnostics.syndromes.facts import Fact
from outlast.diagnostics.syndromes.told import Story
from outlast.events import EventLog, ProgramStep, Record, read_events
from outlast.launch.node_probe import Probed
from outlast.launch.node_trials import NodeTrials
from outlast.launch.slow_ranks import OWN_CAUSE, SlowRanks
from outlast.launch.standstill_probe import SLOW_EXCHANGE, StandstillProbe
from outlast.launch.step_watch import WARMUP_STEPS, StepWatch
from tests.diagnostics.syndromes.test_step_trace import job
from tests.helpers import wait_for


class Told:
    """A launcher's events, and what it judges."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "agent_a.jsonl"
        self.log = EventLog(self.path, rank=-1)
        self.slow = SlowRanks(self.log)

    def look(
        self,
        steps: int,
        late_s: dict[int, tuple[int, float]],
        ranks: int = 4,
        until: int = 10**6,
        facts: tuple[Fact, ...] = (),
        exchange_s: tuple[int, float] = (10**6, 0.0),
        per_node: int = 4,
        **tries: Any,
    ) -> None:
        """One look at that many steps; it is waited for, however slow this machine is."""
        nodes = job(ranks, steps, late_s, until=until, exchange_s=exchange_s, per_node=per_node)
        self.slow._next_s = 0.0
        self.slow.look(nodes, facts, world_size=ranks, **tries)
        wait_for(lambda: self.slow._look is None or self.slow.look(nodes, facts, world_size=ranks, **tries))

    @property
    def events(self) -> list[Record]:
        return list(read_events(self.path))


@pytest.fixture
def told(tmp_path: Path) -> Iterator[Told]:
    made = Told(tmp_path)
    yield made
    made.log.close()


def test_it_is_told_once_when_it_was_seen_twice_and_once_when_it_is_over(
    told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "outlast.launch")
    late = {2: (20, 0.1)}
    told.look(30, late)
    assert told.events == []
    told.look(30, late)
    assert told.events == [], "no new step, no look"
    for steps in (31, 32, 33):
        told.look(steps, late)
    (began,) = told.events
    assert (began["state"], began["ranks"], began["step"], began["last_step"]) == ("began", [2], 20, 31)
    for steps in (45, 46, 47):
        told.look(steps, late, until=34)
    (_, ended) = told.events
    assert (ended["state"], ended["ranks"], ended["step"]) == ("ended", [2], 20)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2, lines
    assert lines[0].startswith("outlast: slow outside communication: rank 2 on n0 since step 20: rank 2 works 1")
    assert lines[1].startswith("outlast: rank 2 on n0 is as fast as its peers again")


def test_a_cause_that_is_found_later_is_told_once_and_stands_in_the_story(
    told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "outlast.launch")
    late = {2: (20, 0.1)}
    seen = Fact(kind="busy_neighbour", node="n0", rank=2, begin_s=-60.0, end_s=0.0, value=0.9, detail="make (pid 7)")
    measured = replace(seen, lost_s=30.0)
    for steps, facts in ((30, ()), (31, ()), (32, (seen,)), (33, (seen,)), (34, (measured,)), (35, ())):
        told.look(steps, late, facts=facts)
    began, weak, likely = told.events
    assert [one["state"] for one in told.events] == ["began", "lasts", "lasts"]
    assert [one["cause_confidence"] for one in told.events] == ["", "weak", "likely"]
    assert [one["step"] for one in told.events] == [20] * 3
    assert (began["cause"], likely["is_software"]) == ("", True)
    lines = Story.of(weak.fields).lines()
    assert lines[0].startswith("ruled out: a spike: ")
    assert lines[1] == (
        "cause: another process on its cores: 0.9 cores used by other processes (make (pid 7)) "
        "(weak: it was so at the same time, software)"
    )
    assert lines[-1] == "done: nothing: nobody is ended for being slow"
    assert [one.getMessage().partition(" because of ")[0] for one in caplog.records][1:] == [
        "outlast: rank 2 on n0 is slow perhaps",
        "outlast: rank 2 on n0 is slow likely",
    ]
    (incident,) = find_told(told.events, began.t)
    assert "(likely: it was measured, software)" in incident.detail
    assert ", because of another process on its cores" in incident.cause
    assert [one["cause_confidence"] for one in open_verdicts(told.events)] == ["likely"]


def test_it_is_told_once_its_node_has_tried_out_itself_unless_the_cause_is_the_jobs_own(
    told: Told, tmp_path: Path
) -> None:
    may_end = threading.Event()

    def test(folder: Path, limit_s: float) -> NodeTest:
        assert may_end.wait(60)
        return NodeTest(compute_flops=1e9, reasons=("memory: the copy differs",))

    trials, late = NodeTrials(0, 1, tmp_path, test), {2: (20, 0.1)}
    for steps in (30, 31, 32):
        told.look(steps, late, trials=trials)
    assert told.events == []
    may_end.set()
    wait_for(lambda: trials.tested)
    told.look(33, late, trials=trials)
    (began,) = told.events
    assert began["tried"] == "node n0: memory: the copy differs"
    assert "tried out: node n0: memory: the copy differs" in Story.of(began.fields).lines()

    told.slow.begin()
    fact = Fact(kind="cpu_throttled", node="n0", rank=2, begin_s=-60.0, end_s=0.0, value=0.4, lost_s=30.0)
    asked = trials.asked
    for steps in (30, 31):
        told.look(steps, late, facts=(fact,), trials=trials)
    *_, again = told.events
    assert (again["state"], again["tried"], again["cause_confidence"]) == ("began", OWN_CAUSE, "likely")
    assert trials.asked == asked, "nobody was asked"


@pytest.mark.parametrize("hot", ["node", "link", ""])
def test_slow_exchange_is_told_of_what_the_probe_finds_and_of_nobody_else(told: Told, tmp_path: Path, hot: str) -> None:
    numbers = {"node": (2,), "link": (0, 2), "": ()}[hot]
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20), wait_for_workers=False)
    beside: list[bool] = []

    def find(store: dist.Store, *, beside_ranks: bool, **_: Any) -> Probed:
        beside.append(beside_ranks)
        return Probed(heard=4, findings=(), link_place=hot, link_nodes=numbers, link_words="2.4 MB/s" if hot else "")

    words = {"secret": b"s" * 32, "round_name": "job/0", "node": 0, "nodes": 4, "address": "127.0.0.1"}
    probe = StandstillProbe(store, folder=tmp_path, events=told.log, probe=find, **words)
    slow = {"exchange_s": (20, 0.1), "per_node": 1, "probe": probe}
    told.look(30, {}, **slow)
    assert beside == [], "it was seen once"
    for steps in (31, 32, 33):
        told.look(steps, {}, **slow)
    wait_for(lambda: [one for one in told.events if one.kind == "nodes_probed"])
    assert beside == [True]
    assert [one["why"] for one in told.events if one.kind == "nodes_probed"] == [SLOW_EXCHANGE]
    told.look(36, {}, **slow)
    verdicts = [one for one in told.events if one.kind == "verdict"]
    if not hot:
        assert verdicts == []
        return
    (began,) = verdicts
    assert (began["syndrome"], began["place"], began["confidence"]) == ("communication_slow", hot, "likely")
    assert began["nodes"] == [f"n{one}" for one in numbers]
    assert began["ranks"] == ([2] if hot == "node" else [])
    assert (began["step"], began["tried"]) == (20, "2.4 MB/s")
    for steps in (50, 51, 52, 53):
        told.look(steps, {}, until=38, **slow)
    assert [one["state"] for one in told.events if one.kind == "verdict"] == ["began", "ended"]


def test_a_restart_ends_what_was_said(told: Told) -> None:
    for steps in (30, 31):
        told.look(steps, {2: (20, 0.1)})
    told.slow.begin()
    assert [one["state"] for one in told.events] == ["began", "ended"]
    told.look(12, {2: (1, 0.1)})
    assert len(told.events) == 2, "one look says nothing"


def test_one_rank_alone_and_clean_ranks_say_nothing(told: Told) -> None:
    for steps in range(20, 40):
        told.look(steps, {}, ranks=2)
    told.look(30, {0: (10, 0.1)}, ranks=1)
    told.slow.look([], (), world_size=4)
    assert told.events == []


def test_what_fails_in_it_is_told_once_and_ends_nothing(told: Told, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "outlast.launch")
    nodes = job(4, 30, {})
    broken = [
        type(nodes[0])(
            node="a",
            now_s=0.0,
            ranks=[type(one)(rank=one.rank, steps=one.steps, done_s=(), inside_s=()) for one in nodes[0].ranks],
        )
    ]
    for _ in range(3):
        told.slow.look(broken, (), world_size=4)
        wait_for(lambda: told.slow._look is None or told.slow.look(broken, (), world_size=4))
    assert [one.getMessage().startswith("outlast: slow ranks are not told any more: ") for one in caplog.records] == [
        True
    ]


def write(run: Path, attempt: int, rank: int, generation: int, steps: range) -> None:
    folder = run / "attempts" / f"{attempt:04d}" / "events"
    folder.mkdir(parents=True, exist_ok=True)
    with EventLog(folder / f"rank_{rank:05d}.jsonl", rank=rank, generation=generation) as log:
        for step in steps:
            if step % 10 == 0:
                log.write(RankDelay(step=step, what="data_wait", seconds=0.5, count=1))
                log.write(RankDelay(step=step, what="something to come", seconds=0.5, count=1))
            log.write(ProgramStep(step=step, step_s=0.1, collective_s=0.01 * step))


def test_the_newest_steps_of_this_nodes_ranks_in_this_start(tmp_path: Path) -> None:
    watch = StepWatch(tmp_path, 0.01)
    watch.begin((2, 3), 1)
    write(tmp_path, 1, 2, 0, range(1, 9))  # of the start before
    write(tmp_path, 2, 2, 1, range(5, 105))
    write(tmp_path, 2, 1, 1, range(5, 105))  # of another node
    time.sleep(0.002)
    watch.look()
    (two,) = watch.newest(time.time())
    assert two.rank == 2
    assert two.steps == tuple(range(57, 105))
    assert two.inside_s[-1] == pytest.approx(1.04)
    assert [(step, lost) for step, lost in zip(two.steps, two.delays_s, strict=True) if any(lost)] == [
        (step, (0.0, 0.5, 0.0, 0.0)) for step in (60, 70, 80, 90, 100)
    ]
    assert -60 < two.done_s[0] <= two.done_s[-1] <= 0
    write(tmp_path, 2, 3, 1, range(5, 11))
    time.sleep(0.002)
    watch.look()
    assert [one.steps for one in watch.newest(time.time())][1] == tuple(range(5 + WARMUP_STEPS, 11))
    watch.begin((2, 3), 2)
    watch.look()
    assert watch.newest(time.time()) == ()


def test_it_looks_in_a_thread_of_its_own_until_it_is_closed(tmp_path: Path) -> None:
    watch = StepWatch(tmp_path, 0.01)
    watch.begin((2,), 1)
    watch.start()
    watch.start()
    write(tmp_path, 1, 2, 1, range(1, 21))
    wait_for(lambda: watch.newest(time.time()) and watch.newest(time.time())[0].steps[-1] == 20)
    watch.close()
    assert watch._thread is not None
    watch._thread.join(60)
    assert not watch._thread.is_alive()
