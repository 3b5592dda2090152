"""Which steps are looked at closely: the same on all ranks, of all kinds, and no more than looks may cost."""

from __future__ import annotations

import itertools

import pytest

from outlast.diagnostics.live.looks import CLOSE_LOOKS, CREDIT_S, EVERY_S, SHARE, SHORTEST_S, LookPlan, is_one_in

STEPS = range(1, 20_001)


def spent_plan(cost_s: float) -> LookPlan:
    """After the first seconds of a start, with looks of so many CPU seconds."""
    plan = LookPlan()
    for _ in range(max(200, int(CREDIT_S / cost_s) + 1)):
        plan.spent(cost_s)
    return plan


@pytest.mark.parametrize("stride", [1, 2, 8, 16, 64])
def test_a_rank_that_measures_fewer_steps_takes_some_of_the_others(stride: int) -> None:
    seldom = {step for step in STEPS if is_one_in(stride * 4, step)}
    often = {step for step in STEPS if is_one_in(stride, step)}
    assert seldom < often or stride == 1
    assert len(often) == pytest.approx(len(STEPS) / stride, rel=0.02)


@pytest.mark.parametrize("period", [2, 3, 5, 8, 10, 16, 50, 100])
def test_what_comes_every_so_many_steps_is_measured_as_often_as_the_rest(period: int) -> None:
    measured = [step for step in STEPS if is_one_in(16, step)]
    for phase in {0, 1, period - 1}:
        share = sum(step % period == phase for step in measured) / len(measured)
        assert share == pytest.approx(1 / period, rel=0.35)


def test_no_stretch_is_left_out() -> None:
    measured = [step for step in STEPS if is_one_in(16, step)]
    assert max(after - before for before, after in itertools.pairwise(measured)) <= 2.2 * 16


def test_every_step_of_a_start_then_as_many_as_may_be() -> None:
    plan = LookPlan()
    assert plan.gap_s(1, 0.0) == EVERY_S
    assert plan.gap_s(2, 1.0) == EVERY_S
    assert plan.gap_s(3, 0.05) == pytest.approx(0.05 / CLOSE_LOOKS)
    assert plan.gap_s(4, 0.001) == SHORTEST_S


@pytest.mark.parametrize("step_s", [0.002, 0.02, 0.1, 0.5, 3.0, 60.0])
@pytest.mark.parametrize("cost_s", [3e-5, 1e-4, 4e-4])
def test_looks_cost_no_more_than_their_share(step_s: float, cost_s: float) -> None:
    plan = spent_plan(cost_s)
    gaps = [gap_s for step in STEPS if (gap_s := plan.gap_s(step, step_s))]
    assert gaps
    assert all(gap_s >= SHORTEST_S for gap_s in gaps)
    cost = sum(step_s / gap_s for gap_s in gaps) * cost_s / (len(STEPS) * step_s)
    assert SHARE / 3 <= cost <= SHARE * 1.05


def test_a_number_of_seconds_is_kept_to() -> None:
    plan = LookPlan(0.02)
    plan.spent(1e9)
    assert {plan.gap_s(step, 0.1) for step in range(100)} == {0.02}


def test_the_first_look_comes_at_any_time() -> None:
    firsts = [LookPlan().first_s(0.01) for _ in range(200)]
    assert all(0 <= one < 0.01 for one in firsts)
    assert min(firsts) < 0.002 < 0.008 < max(firsts)
