from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from outlast.diagnostics.syndromes.restraint import Budget, Debounce, History, Watcher
from outlast.diagnostics.syndromes.verdict import Culprit, Verdict

SLOW = Verdict(
    syndrome="non_communication_slow",
    culprit=Culprit(place="rank", ranks=(3,), nodes=("b",)),
    evidence="",
    confidence="likely",
    step=7,
)


@given(st.lists(st.booleans(), max_size=30), st.integers(1, 4), st.integers(0, 3))
def test_a_verdict_counts_once_it_was_given_n_times_of_m(said: list[bool], needed: int, more: int) -> None:
    state = Debounce(needed=needed, among=needed + more)
    for at, one in enumerate(said):
        state, counted = state.look([SLOW] if one else [])
        times = sum(said[max(0, at + 1 - needed - more) : at + 1])
        assert bool(counted) == (one and times >= needed)


def test_what_is_weak_never_counts_and_what_is_certain_does_at_once() -> None:
    state, counted = Debounce().look([replace(SLOW, confidence="certain")])
    assert len(counted) == 1
    for _ in range(5):
        state, counted = state.look([replace(SLOW, confidence="weak")])
        assert not counted


def test_a_neighbour_who_is_accused_next_does_not_inherit_the_count() -> None:
    state, _ = Debounce().look([SLOW])
    other = replace(SLOW, culprit=Culprit(place="rank", ranks=(4,), nodes=("b",)))
    assert state.look([other])[1] == ()


@given(st.lists(st.floats(0.1, 30.0), min_size=1, max_size=30))
def test_time_in_which_the_watcher_stood_still_is_excused(gaps: list[float]) -> None:
    state = Watcher(interval_s=0.5, last_s=100.0)
    now_s, late_s = 100.0, 0.0
    for gap in gaps:
        now_s += gap
        state = state.tick(now_s)
        late_s += gap - 0.5 if gap - 0.5 > 1.0 else 0.0
        assert state.is_back == (gap - 0.5 > 1.0)
    assert abs(state.lost_s(100.0) - late_s) < 1e-6
    assert state.lost_s(now_s) == 0.0
    assert 0.0 <= state.lost_s(now_s - 1.0) <= 1.0 * (len(gaps) + 1)


def test_a_fault_that_moves_with_its_ranks_is_the_jobs() -> None:
    history = History().add(replace(SLOW, culprit=Culprit(place="rank", ranks=(3,), nodes=("a",))), 0)
    assert "on a in generation 0" in history.follows_job(SLOW, 1)
    assert history.follows_job(SLOW, 0) == ""  # two nodes at once are two faults
    other = replace(SLOW, culprit=Culprit(place="rank", ranks=(5,), nodes=("b",)))
    assert history.follows_job(other, 1) == ""
    assert "three nodes" in history.add(other, 1).follows_job(
        replace(SLOW, culprit=Culprit(place="rank", ranks=(9,), nodes=("c",))), 2
    )


def test_a_fault_that_stays_with_its_node_is_the_nodes() -> None:
    history = History().add(SLOW, 0).add(replace(SLOW, step=40), 1)
    assert history.follows_job(replace(SLOW, step=90, culprit=Culprit(place="rank", ranks=(1,), nodes=("b",))), 2) == ""


def test_a_crash_in_the_same_step_after_every_restart_is_the_jobs() -> None:
    crash = replace(SLOW, syndrome="crash", step=1234)
    history = History().add(crash, 0)
    assert history.follows_job(crash, 1) == ""
    assert "step 1234 after every restart" in history.add(crash, 1).follows_job(crash, 2)


def test_a_software_cause_is_the_jobs() -> None:
    verdict = replace(SLOW, cause="garbage collection", is_software=True)
    assert "garbage collection" in History().follows_job(verdict, 0)


def test_a_budget_is_not_exceeded() -> None:
    budget = Budget(shadow=False, evictions_per_hour=2, least_nodes=3)
    assert budget.refuses(0.0, 8) == ""
    budget = budget.spend(0.0).spend(10.0)
    assert "2 nodes were given up" in budget.refuses(20.0, 8)
    assert budget.refuses(3700.0, 8) == ""
    assert "have to remain" in budget.refuses(3700.0, 3)
    assert "shadow" in Budget().refuses(0.0, 100)
