"""Changes are told once, one spike is nothing, and what is kept is bounded."""

from __future__ import annotations

import pytest

from outlast.diagnostics.monitor.conditions import MOST_ONCE_PER_MINUTE, MOST_OVER, MOST_TRACKED, Conditions
from outlast.diagnostics.monitor.findings import Finding
from outlast.diagnostics.monitor.monitor import NodeMonitor
from outlast.diagnostics.monitor.sample import Sampler

SLOW = Finding(what="cpu_throttled", words="its cgroup was throttled", key="/job", ranks=(1,), measured_s=0.8)


def states(conditions: Conditions, seen: str) -> list[tuple[int, str]]:
    """``(sample, state)`` of what is told; ``x`` is a sample that shows the condition."""
    return [
        (at, one.state)
        for at, char in enumerate(seen)
        for one in conditions.look([SLOW] if char == "x" else [], 1000.0 + at, 1.0)
    ]


@pytest.mark.parametrize(
    ("seen", "told"),
    [
        ("..x...", []),
        ("x..x..x..", []),
        ("..xx....", [(3, "began"), (6, "ended")]),
        ("x.x....", [(2, "began"), (5, "ended")]),
        ("xx.x..x...", [(1, "began"), (9, "ended")]),
        ("xxxxxxxxxxxxx...", [(1, "began"), (9, "lasts"), (15, "ended")]),
    ],
)
def test_when_a_condition_is_told(seen: str, told: list[tuple[int, str]]) -> None:
    assert states(Conditions("a"), seen) == told


def test_how_long_it_lasted_and_how_much_of_it_was_measured() -> None:
    conditions = Conditions("a")
    for at, char in enumerate("xx.xx..."):
        told = conditions.look([SLOW] if char == "x" else [], 1000.0 + at, 1.0)
    (one,) = told
    assert (one.host, one.state, one.since_t, one.seconds, one.ranks) == ("a", "ended", 999.0, 5.0, (1,))
    assert one.measured_s == pytest.approx(3.2)


def test_a_stopped_process_is_told_at_once_and_so_is_that_it_goes_on() -> None:
    conditions = Conditions("a")
    stopped = Finding(what="stopped", words="rank 1 was stopped", at_once=True)
    assert [one.state for one in conditions.look([stopped], 1.0, 1.0)] == ["began"]
    assert [one.state for one in conditions.look([], 2.0, 1.0)] == ["ended"]


def test_a_day_of_it_is_told_often_enough_and_no_more() -> None:
    conditions = Conditions("a")
    day_s = 86400
    told = [one for at in range(day_s) for one in conditions.look([SLOW], float(at), 1.0)]
    assert day_s / 61 <= len(told) <= day_s / 60 + 10


def test_what_is_tracked_and_kept_is_bounded() -> None:
    conditions = Conditions("a")
    flood = [Finding(what="disk_slow", words="slow", key=str(at)) for at in range(1000)]
    lines = [Finding(what="kernel_log", words="said", key=str(at), lasts=False) for at in range(1000)]
    for at in range(5):
        told = conditions.look([*flood, *lines], 100.0 + at, 1.0)
        assert len(told) <= MOST_TRACKED + MOST_ONCE_PER_MINUTE
    assert conditions.untold > 1000
    assert len(conditions.current()) <= MOST_TRACKED + MOST_OVER
    assert len(conditions.end()) == MOST_TRACKED


def test_what_fails_in_a_sample_ends_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError("a fault of our own")

    monkeypatch.setattr(Sampler, "look", fails)
    monitor = NodeMonitor("a", None, print, interval_s=0.01)
    monitor.start()
    assert monitor._thread is not None
    monitor._thread.join(20)
    assert not monitor._thread.is_alive(), "it gives up by itself"
    monitor.close()
    said = [record.getMessage() for record in caplog.records]
    assert "a fault of our own" in said[0]
    assert "no more samples" in said[-1]


def test_a_monitor_that_costs_too_much_looks_less_often(caplog: pytest.LogCaptureFixture) -> None:
    monitor = NodeMonitor("a", None, print, interval_s=1.0)
    for _ in range(10):
        monitor._count(0.5)
    told = monitor.close()
    assert (told.interval_s, told.samples, told.longest_cpu_s) == (2.0, 10, 0.5)
    assert "one every 2 s" in caplog.text
