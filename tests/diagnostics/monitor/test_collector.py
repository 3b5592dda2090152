"""Who is convicted from the words of all nodes, and who is not; what a message holds; how clocks are compared."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from outlast.diagnostics.live import Beat, Collective, Observation, Ring, StallRules
from outlast.diagnostics.live.stall import ProcessState
from outlast.diagnostics.live.suspects import Suspect
from outlast.diagnostics.monitor import Accused, Collector, LeastDelay, NodeCondition, NodeReport, ago
from outlast.diagnostics.monitor.node_times import offset
from outlast.diagnostics.monitor.reports import at, decode
from outlast.diagnostics.syndromes.step_trace import RankSteps
from outlast.errors import DiagnosticsError

RULES = StallRules(floor_s=8.0, factor=4.0, startup_limit_s=600.0)


def rank(
    number: int,
    silent_s: float,
    *,
    inside: bool = True,
    phase: str = "step",
    state: ProcessState = "running",
    median_s: float = 0.1,
) -> Observation:
    """A rank at 0, inside its third collective or not."""
    calls = (Collective(2, "all_reduce", "grads", 400, 7, -silent_s, None, "dp", 2),) if inside else ()
    return Observation(
        rank=number,
        pid=1000 + number,
        state=state,
        started_s=-silent_s,
        beat=Beat(number, 1000 + number, phase, 7, -silent_s, median_s),
        ring=Ring(number, 1000 + number, 4, 3 if inside else 2, calls, ()),
    )


class Job:
    """Messages of nodes with two ranks each, and the collector on node 0."""

    def __init__(self, nodes: int = 2) -> None:
        self.nodes = nodes
        self.collector = Collector(nodes, 2 * nodes, 1.0)
        self.seq = 0

    def hear(self, ranks: list[Observation], *, without: tuple[int, ...] = ()) -> tuple[Accused, ...]:
        """One message of each node but some; whom node 0 then names."""
        self.seq += 1
        reports = []
        for node in range(self.nodes):
            mine = tuple(one for one in ranks if one.rank // 2 == node)
            numbers = (2 * node, 2 * node + 1)
            reports.append(NodeReport(node=node, host=f"h{node}", seq=self.seq, t=0.0, ranks=numbers, watched=mine))
        for one in reports[1:]:
            if one.node not in without:
                self.collector.take(one.encode())
        return self.collector.find_hung(reports[0], RULES)


def test_the_silent_rank_of_another_node_is_named_with_the_evidence_of_all_and_only_twice_seen() -> None:
    job = Job(3)
    ranks = [rank(0, 12.0), rank(1, 12.0), rank(2, 12.0), rank(3, 12.0), rank(4, 12.0), rank(5, 12.5, inside=False)]
    assert job.hear(ranks) == ()
    (found,) = job.hear(ranks)
    assert (found.rank, found.node, found.host, found.pid, found.step, found.entered) == (5, 2, "h2", 1005, 7, 2)
    assert found.limit_s == 8.0
    assert "5 peers have been waiting 12.0 s in all_reduce #2" in found.evidence
    assert "weak" not in found.evidence


def test_a_stopped_rank_is_named_whatever_it_did() -> None:
    job = Job()
    ranks = [rank(0, 9.0), rank(1, 9.0), rank(2, 9.0), rank(3, 9.0, state="stopped")]
    job.hear(ranks)
    (found,) = job.hear(ranks)
    assert (found.rank, found.node) == (3, 1)
    assert "stopped (state T)" in found.evidence


def test_a_rank_that_left_the_order_of_collectives_is_named_though_all_wait() -> None:
    job = Job()
    order = Collective(2, "broadcast", "grads", 4, 7, -12.0, None, "dp", 2)
    left = replace(rank(3, 12.0), ring=Ring(3, 1003, 4, 3, (order,), ()))
    ranks = [rank(0, 12.0), rank(1, 12.0), rank(2, 12.0), left]
    job.hear(ranks)
    (found,) = job.hear(ranks)
    assert (found.rank, found.node, found.inside) == (3, 1, True)
    assert "rank 3 left the order first" in found.evidence
    assert decode(NodeReport(node=0, host="h0", seq=1, t=0.0, accused=(found,)).encode()).accused == (found,)
    assert {one.rank: one.waiting for one in suspects(job, ranks)} == {3: 3}
    assert suspects(job, ranks[1:]) == (), "not while a rank is not known of"


def suspects(job: Job, ranks: list[Observation]) -> tuple[Suspect, ...]:
    """Whom node 0 suspects after one more message of each node."""
    job.hear(ranks)
    mine = tuple(one for one in ranks if one.rank < 2)
    own = NodeReport(node=0, host="h0", seq=job.seq, t=0.0, ranks=(0, 1), watched=mine)
    return job.collector.suspects(own, 4.0)


def test_whom_others_wait_for_is_suspected_across_nodes() -> None:
    job = Job()
    ranks = [rank(0, 5.0), rank(1, 5.0), rank(2, 5.0), rank(3, 5.0, inside=False)]
    (found,) = suspects(job, ranks)
    assert (found.rank, found.pid, found.waiting) == (3, 1003, 3)
    assert suspects(job, [*ranks[:3], rank(3, 5.0, inside=False, phase="eval")]) == ()
    job = Job(3)
    job.hear([], without=(2,))
    own = NodeReport(node=0, host="h0", seq=2, t=0.0, ranks=(0, 1), watched=tuple(ranks[:2]))
    assert job.collector.suspects(own, 4.0) == (), "not while a node is not heard"


HEALTHY = {
    "all in the same collective: a network, or a rank that nobody sees": [rank(n, 100.0) for n in range(4)],
    "all in evaluation": [rank(n, 60.0, inside=False, phase="eval") for n in range(4)],
    "all outside collectives in a step": [rank(n, 60.0, inside=False) for n in range(4)],
    "one writes a checkpoint for longer than a step": [
        rank(n, 100.0, inside=n != 3, phase="step" if n != 3 else "checkpoint") for n in range(4)
    ],
    "one has long steps": [rank(n, 30.0, inside=n != 3, median_s=10.0) for n in range(4)],
    "one is not silent for long": [rank(0, 7.9), rank(1, 7.9), rank(2, 7.9), rank(3, 7.9, inside=False)],
}


@pytest.mark.parametrize("case", HEALTHY)
def test_nobody_is_named(case: str) -> None:
    job = Job()
    assert [job.hear(HEALTHY[case]) for _ in range(4)] == [()] * 4


def test_nobody_is_named_while_a_node_is_not_heard_or_its_message_is_old() -> None:
    ranks = [rank(0, 12.0), rank(1, 12.0), rank(2, 12.0), rank(3, 12.0, inside=False)]
    job = Job(3)
    assert [job.hear(ranks, without=(2,)) for _ in range(3)] == [()] * 3
    quiet = [one for one in ranks if one.rank < 4]
    job.hear(quiet)
    assert len(job.hear(quiet)) == 1, "node 2 is well, and says so"
    job = Job()
    job.hear(ranks)
    assert [job.hear(ranks, without=(1,)) for _ in range(3)] == [()] * 3, "what it said before is not said again"


def test_who_moves_between_two_messages_is_spared() -> None:
    job = Job()
    ranks = [rank(0, 12.0), rank(1, 12.0), rank(2, 12.0), rank(3, 12.0, inside=False)]
    for entered in range(5, 10):
        assert ranks[3].ring is not None
        ranks[3] = replace(ranks[3], ring=replace(ranks[3].ring, entered=entered))
        assert job.hear(ranks) == ()


def test_a_condition_of_the_culprit_is_part_of_the_evidence() -> None:
    condition = NodeCondition(
        host="h0", what="gil_held", state="lasts", words="rank 1 computed", since_t=0.0, seconds=3.0, ranks=(1,)
    )
    collector = Collector(1, 2, 1.0)
    watched = (rank(0, 12.0), rank(1, 12.0, inside=False))
    for seq in (1, 2):
        own = NodeReport(node=0, host="h0", seq=seq, t=0.0, ranks=(0, 1), watched=watched, conditions=(condition,))
        found = collector.find_hung(own, RULES)
    assert found[0].evidence.endswith("; rank 1 computed")


def test_a_message_says_the_same_on_another_clock() -> None:
    here_s, there_s = 5000.0, 77.0
    seen = replace(rank(3, 12.0), excused_s=4.0)
    seen = _later(seen, here_s)
    told = NodeReport(node=1, host="ü\x1b", seq=9, t=3.5, ranks=(3,), watched=ago([seen], here_s))
    back = decode(told.encode())
    before = {key: value for key, value in json.loads(told.encode()).items() if key != "probe"}
    assert decode(json.dumps(before).encode()).probe == 0, "of the version before"
    assert back == told
    (one,) = at(back.watched, there_s)
    assert one.silent_s(there_s) == pytest.approx(8.0), "without what was excused"
    assert there_s - one.pending[0].entered_s == pytest.approx(12.0)
    assert (one.step, one.entered, one.pid) == (7, 3, 1003)


def _later(one: Observation, by_s: float) -> Observation:
    (moved,) = at([one], by_s)
    return replace(moved, excused_s=one.excused_s)


def test_an_old_message_and_one_that_is_none_are_not_taken() -> None:
    collector = Collector(2, 2, 1.0)
    told = NodeReport(node=1, host="b", seq=5, t=0.0, ranks=(1,), watched=(rank(1, 9.0),))
    assert collector.take(told.encode()) is not None
    assert collector.take(replace(told, seq=4).encode()) is None, "as somebody would who repeats what was said"
    raw = json.loads(told.encode())
    with pytest.raises(DiagnosticsError, match="of version 7"):
        collector.take(json.dumps(raw | {"v": 7}).encode())
    drawn = random.Random(0)
    whole = told.encode()
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[drawn.randrange(len(damaged))] = drawn.randrange(256)
        try:
            decode(bytes(damaged))
        except DiagnosticsError:
            continue


def test_a_message_of_a_node_has_a_bounded_size() -> None:
    many = NodeCondition(host="b", what="disk_slow", state="lasts", words="x" * 200, since_t=0.0, seconds=3.0)
    calls = tuple(replace(rank(0, 9.0).pending[0], seq=seq) for seq in range(500))
    ring = Ring(0, 1000, 500, 500, calls, ())
    ranks = [replace(rank(n, 9.0), ring=ring) for n in range(8)]
    quiet = NodeReport(node=1, host="b", seq=5, t=0.0, ranks=tuple(range(8)))
    loud = replace(quiet, watched=ago(ranks, 0.0), conditions=(many,) * 100)
    assert len(quiet.encode()) < 310
    assert len(loud.encode()) < 20_000
    steps = [RankSteps(rank=n, steps=tuple(range(900)), done_s=(-9.0,) * 900, inside_s=(0.1,) * 900) for n in range(8)]
    assert len(replace(quiet, steps=tuple(steps)).encode()) < 310 + 8 * 1600


def test_the_newest_steps_of_each_rank_are_told_and_a_version_without_them_is_read() -> None:
    steps = RankSteps(rank=3, steps=(7, 8), done_s=(-1.5, -0.25), inside_s=(0.5, 0.0))
    told = NodeReport(node=1, host="b", seq=9, t=3.5, ranks=(3,), steps=(steps,))
    assert decode(told.encode()) == told
    raw = json.loads(told.encode())
    raw["steps"]["3"] = raw["steps"]["3"][:-4]
    with pytest.raises(DiagnosticsError):
        decode(json.dumps(raw).encode())
    del raw["steps"]
    assert decode(json.dumps(raw).encode()) == replace(told, steps=())


def test_clocks_are_compared_by_the_least_way_in_each_direction() -> None:
    drawn = random.Random(1)
    ahead_s = 3600.25
    there, here = LeastDelay(), LeastDelay()
    assert offset(there.least_s, here.least_s) is None
    for at_s in range(200):
        there.read(at_s, at_s + ahead_s + drawn.uniform(0.001, 1.0))
        here.read(at_s + ahead_s, at_s + drawn.uniform(0.001, 1.0))
    found = offset(there.least_s, here.least_s)
    assert found is not None
    assert abs(found.ahead_s - ahead_s) <= found.error_s < 0.05
