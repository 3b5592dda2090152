"""What the monitor finds explains a verdict: as facts of the kinds, units and clock that verdicts are made with."""

from __future__ import annotations

from pathlib import Path

import pytest

from outlast.diagnostics.monitor import NodeCondition, facts_of
from outlast.diagnostics.monitor.findings import find
from outlast.diagnostics.monitor.sample import Sampler
from outlast.diagnostics.syndromes.facts import FACT_KINDS, overlapping
from tests.diagnostics.monitor.nodes import write
from tests.diagnostics.monitor.test_recorded_nodes import PID, v2


def test_a_condition_is_a_fact_of_each_rank_on_the_nodes_own_clock() -> None:
    throttled = NodeCondition(
        host="a",
        what="cpu_throttled",
        state="lasts",
        words="its cgroup /job was throttled",
        since_t=1000.0,
        seconds=40.0,
        measured_s=31.0,
        value=0.8,
        ranks=(1, 3),
    )
    facts = facts_of([throttled], node="a", t=1050.0, at_s=77.0)
    assert [(one.rank, one.begin_s, one.end_s, one.lost_s) for one in facts] == [
        (1, 27.0, 67.0, 31.0),
        (3, 27.0, 67.0, 31.0),
    ]
    (seen,) = overlapping(facts, node="a", rank=1, begin_s=60.0, end_s=70.0)
    assert seen.is_software
    assert seen.words() == (
        "a throttled cgroup: 0.8 of the time throttled by its cgroup, 31 s lost (its cgroup /job was throttled)"
    )
    assert overlapping(facts, node="a", rank=2, begin_s=60.0, end_s=70.0) == ()


@pytest.mark.parametrize("what", ["stopped", "clock_jumped", "time_set", "thermal", "of a version to come"])
def test_what_is_no_fact(what: str) -> None:
    one = NodeCondition(host="a", what=what, state="once", words="x", since_t=1.0, seconds=0.0)
    assert facts_of([one], node="a", t=2.0, at_s=1.0) == ()


def test_what_a_node_shows_is_called_as_facts_are(tmp_path: Path) -> None:
    """Whatever a sample of a node in every trouble shows has a kind that verdicts know, and a value."""
    info = "MemAvailable: 5 kB\nSwapTotal: 9 kB\nSwapFree: 1 kB\n"
    calm = {"proc/meminfo": info, "proc/vmstat": "pswpin 0\nallocstall_normal 0\noom_kill 0\n"}
    calm |= {"proc/net/snmp": "Tcp: OutSegs RetransSegs\nTcp: 0 0\n"}
    write(tmp_path, v2(0.0, 0) | calm)
    sampler = Sampler(None, root=tmp_path)
    sampler.look({0: PID})
    trouble = {"proc/vmstat": "pswpin 900000000\nallocstall_normal 900000\noom_kill 2\n"}
    trouble |= {"proc/net/snmp": "Tcp: OutSegs RetransSegs\nTcp: 900 800\n"}
    write(tmp_path, v2(50.0, 10) | trouble)
    found = find(sampler.look({0: PID}))
    assert [one.what for one in found] == ["cpu_throttled", "swap", "memory_pressure", "network_errors", "oom_kill"]
    assert {one.what for one in found} <= set(FACT_KINDS)
    assert all(one.value > 0 for one in found if one.what != "memory_pressure")
