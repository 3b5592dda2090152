"""Looks now and then give the time in which collectives were pending, and where they cannot, no number at all."""

from __future__ import annotations

import random
import statistics

import pytest

from outlast.diagnostics.live.pending_time import PendingTime

GAP_S = 0.0104


def looked_at(
    spans: list[tuple[float, float]], looks: list[float], *, step_s: float = 0.1, close: bool = True
) -> object:
    """Of a step with collectives pending in these spans of it."""
    pending = PendingTime(0.0)
    pending.begin(0.0, GAP_S if close else 0.25, close=close)
    for at_s in looks:
        pending.look(at_s, any(begin <= at_s < end for begin, end in spans))
    return pending.end(step_s)


def grid(first_s: float, gap_s: float, step_s: float = 0.1) -> list[float]:
    return [first_s + gap_s * number for number in range(int((step_s - first_s) / gap_s) + 1)]


@pytest.mark.parametrize(
    "spans",
    [
        [(0.04, 0.07)],
        [(0.05, 0.1)],  # up to the optimizer's step
        [(0.0, 0.03)],
        [(0.02, 0.021), (0.06, 0.063)],  # most looks miss them
        [(0.01 * number, 0.01 * number + 0.004) for number in range(10)],
        [],
    ],
)
def test_right_on_average_wherever_it_is_pending(spans: list[tuple[float, float]]) -> None:
    chance = random.Random(1)
    found = [looked_at(spans, grid(chance.random() * GAP_S, GAP_S)) for _ in range(4000)]
    values = [one for one in found if isinstance(one, float)]
    assert len(values) == len(found)
    true_s = sum(end - begin for begin, end in spans)
    assert statistics.fmean(values) == pytest.approx(true_s, abs=0.0006)
    assert max(abs(one - true_s) for one in values) <= len(spans) * GAP_S


def test_a_change_that_nobody_saw_for_long_is_not_measured() -> None:
    times = grid(0.005, GAP_S)
    assert looked_at([(0.02, 0.06)], times) is not None
    late = [at_s for at_s in times if not 0.03 < at_s < 0.075]
    assert looked_at([(0.02, 0.06)], late) is None
    assert looked_at([(0.0, 0.1)], late) == pytest.approx(0.1, abs=GAP_S), "it did not change in between"


def test_a_step_that_is_not_looked_at_closely_is_measured_only_if_it_is_long() -> None:
    assert looked_at([(0.02, 0.06)], [], close=False) is None
    assert looked_at([(0.02, 0.06)], [0.05], close=False) is None
    found = looked_at([(1.0, 4.0)], grid(0.2, 0.25, 5.0), step_s=5.0, close=False)
    assert found == pytest.approx(3.0, abs=0.25)


def test_a_pause_for_collecting_garbage_is_no_time_in_collectives() -> None:
    pending = PendingTime(0.0)
    pending.begin(0.0, GAP_S, close=True)
    for at_s in (0.01, 0.02):
        pending.look(at_s, False)
    pending.look(0.07, True, 0.04)  # 40 ms of garbage collection, and a collective entered after it
    pending.look(0.08, False, 0.04)
    assert pending.end(0.1, 0.04) == pytest.approx(0.005 + 0.005)


def test_a_new_step_begins_with_nothing() -> None:
    pending = PendingTime(0.0)
    pending.begin(0.0, GAP_S, close=True)
    for at_s in grid(0.004, GAP_S):
        pending.look(at_s, True)
    assert pending.end(0.1) == pytest.approx(0.1, abs=GAP_S)
    pending.begin(0.1, GAP_S, close=True)
    assert pending.end(0.11) == 0.0
