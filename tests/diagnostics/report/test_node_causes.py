"""The software cause is named beside the rank that was slow, when it explains it, and else not."""

from __future__ import annotations

from typing import Any

import pytest

from outlast.diagnostics.report.node_causes import NodeCauses
from outlast.events import Record

HOSTS = {(1, 0, 0): "a", (1, 0, 1): "a", (1, 0, 2): "b"}


def condition(begin_t: float, lasted_s: float, **more: Any) -> Record:
    fields = {
        "host": "a",
        "what": "cpu_throttled",
        "state": "ended",
        "words": "its cgroup /job was throttled",
        "since_t": begin_t,
        "seconds": lasted_s,
        "measured_s": None,
        "ranks": [],
        "key": "",
    }
    return Record(begin_t + lasted_s, -1, 0, "node_condition", fields | more)


def test_what_was_measured_is_told_of_the_time_in_question() -> None:
    causes = NodeCauses([condition(100.0, 60.0, measured_s=46.5, ranks=[1])], HOSTS)
    assert causes.during(110.0, 150.0, 1) == "node a: its cgroup /job was throttled, for 31 s of 40 s"
    assert causes.during(110.0, 150.0) == "node a (rank 1): its cgroup /job was throttled, for 31 s of 40 s"


@pytest.mark.parametrize(
    ("begin_t", "end_t", "rank"),
    [(110.0, 150.0, 0), (110.0, 150.0, 2), (200.0, 240.0, 1), (20.0, 110.0, 1), (150.0, 150.0, 1)],
    ids=["another rank", "another node", "another time", "too short", "no time"],
)
def test_what_does_not_explain_it_is_not_named(begin_t: float, end_t: float, rank: int) -> None:
    assert NodeCauses([condition(100.0, 20.0, ranks=[1])], HOSTS).during(begin_t, end_t, rank) == ""


def test_a_quota_that_held_back_next_to_nothing_is_no_cause() -> None:
    assert NodeCauses([condition(100.0, 60.0, measured_s=3.0)], HOSTS).during(100.0, 160.0, 1) == ""


def test_the_newest_line_of_a_condition_counts_and_the_worst_come_first() -> None:
    lines = [
        condition(100.0, 2.0, state="began"),
        condition(100.0, 30.0, state="lasts"),
        condition(100.0, 25.0, words="it swapped", what="swap"),
        condition(100.0, 20.0, words="its disk was slow", what="disk_slow"),
        condition(100.0, 30.0, host="b"),
    ]
    told = NodeCauses(lines, HOSTS).during(100.0, 130.0, 0)
    assert told == "node a: its cgroup /job was throttled, for 30 s of 30 s and node a: it swapped, for 25 s of 30 s"


def test_lines_of_another_version_are_left_out_or_read_as_far_as_they_are_known() -> None:
    lines = [
        condition(100.0, 30.0, seconds=None),
        condition(100.0, 30.0, since_t="x"),
        condition(100.0, 30.0, ranks=None, measured_s="x", new_field=3),
    ]
    assert NodeCauses(lines, HOSTS).during(100.0, 130.0, 0).startswith("node a: its cgroup /job was throttled")
