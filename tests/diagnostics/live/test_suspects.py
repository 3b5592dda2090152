from __future__ import annotations

from dataclasses import replace

import pytest

from outlast.diagnostics.live import Observation
from outlast.diagnostics.live.suspects import Suspect, find_suspects
from tests.diagnostics.live.test_stall import NOW_S, rank


def told(*ranks: Observation, whole: bool = True, after_s: float = 4.0) -> tuple[Suspect, ...]:
    return find_suspects(ranks, after_s, NOW_S, whole=whole)


def idle(number: int, *, silent_s: float, idle_s: float, entered: int = 100) -> Observation:
    return replace(rank(number, silent_s=silent_s, phase="program", entered=entered), idle_s=idle_s)


PEERS = [rank(number, silent_s=4.5, inside=True, entered=101) for number in (0, 1, 3)]


def test_a_stopped_rank_and_one_in_the_middle_of_a_step() -> None:
    for one, words in (
        (rank(2, silent_s=4.6, phase="eval", state="stopped"), "stopped (state T)"),
        (rank(2, silent_s=4.6), "outside of any collective in step 35, silent for 4.6 s"),
        (idle(2, silent_s=4.6, idle_s=4.1), "does nothing for 4.1 s, outside of any collective in step 35"),
    ):
        (found,) = told(*PEERS, one)
        assert (found.rank, found.pid, found.waiting, found.awaited_s) == (2, 4002, 3, 4.5)
        assert found.evidence.startswith(words)
        assert found.evidence.endswith("3 peers have been waiting for 4.5 s in all_gather #100")


@pytest.mark.parametrize("phase", ["setup", "eval", "data", "checkpoint", "finish"])
def test_phases_that_last_are_nobody_s_fault(phase: str) -> None:
    assert told(*PEERS, rank(2, silent_s=60, phase=phase)) == ()


def test_nor_is_a_program_that_computes_or_has_had_no_peers() -> None:
    assert told(*PEERS, idle(2, silent_s=60, idle_s=0)) == ()
    assert told(*PEERS, idle(2, silent_s=60, idle_s=60, entered=0)) == ()


def test_nor_what_all_do_at_once() -> None:
    assert told(*(rank(number, silent_s=600) for number in range(4))) == ()
    assert told(*(idle(number, silent_s=600, idle_s=600) for number in range(4))) == ()


def test_nor_before_three_median_steps() -> None:
    peers = [rank(number, silent_s=5.9, inside=True, entered=101, median_step_s=2.0) for number in (0, 1)]
    assert told(*peers, rank(2, silent_s=6.0, median_step_s=2.0)) == ()
    assert told(*(replace(one, excused_s=-0.2) for one in peers), rank(2, silent_s=6.0, median_step_s=2.0)) == ()
    late = [rank(number, silent_s=6.1, inside=True, entered=101, median_step_s=2.0) for number in (0, 1)]
    assert [one.rank for one in told(*late, rank(2, silent_s=6.2, median_step_s=2.0))] == [2]


def test_time_in_which_nobody_watched_does_not_count() -> None:
    peers = [replace(one, excused_s=2.0) for one in PEERS]
    assert told(*peers, replace(rank(2, silent_s=4.6), excused_s=2.0)) == ()


def test_a_dead_rank_is_a_crash() -> None:
    assert told(*PEERS, rank(2, silent_s=60, state="dead")) == ()


def test_all_inside_are_judged_by_their_order_if_all_are_known() -> None:
    inside = [rank(number, silent_s=4.5, inside=True, entered=101) for number in range(3)]
    assert told(*inside) == ()
    left = rank(3, silent_s=4.5, inside=True, entered=100)
    assert left.ring is not None
    *before, last = left.ring.records
    other = replace(
        left.ring, records=(*before[:-1], replace(before[-1], op="broadcast"), replace(last, op="all_reduce"))
    )
    left = replace(left, ring=other)
    assert [one.rank for one in told(*inside, left)] == [3]
    assert told(*inside, left, whole=False) == ()
