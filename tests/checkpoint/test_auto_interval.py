"""Daly's optimum against his model solved exactly and against runs that fail; failures expected; the pace; stalls."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outlast.checkpoint import AutoInterval, CheckpointConfig, expected_mtbf_s, optimal_interval_s
from outlast.checkpoint.auto_interval import PRIOR_LIMIT_S
from outlast.checkpoint.save.stall_forecast import StallForecast
from outlast.errors import OutOfRange
from outlast.events import CheckpointSaved, Event
from tests.checkpoint.helpers import checkpointer, of

costs = st.floats(1e-3, 1e4)
mtbfs = st.floats(1.0, 1e8)


def efficiency(interval_s: float, cost_s: float, mtbf_s: float) -> float:
    """Share of the time that is training, in Daly's model: a segment and its save take M (e^((τ+δ)/M) - 1) of it."""
    return interval_s / (mtbf_s * math.expm1((interval_s + cost_s) / mtbf_s))


def exact_s(cost_s: float, mtbf_s: float) -> float:
    """Where the model's efficiency is largest, by bisection: (1 - τ/M) e^((τ+δ)/M) falls through 1."""
    low, high = 0.0, mtbf_s
    for _ in range(200):
        middle = (low + high) / 2
        if math.log1p(-middle / mtbf_s) + (middle + cost_s) / mtbf_s > 0:
            low = middle
        else:
            high = middle
    return low


@given(mtbfs, st.floats(1e-7, 1.0))
def test_the_formula_is_the_models_optimum(mtbf_s: float, share: float) -> None:
    cost_s = share * mtbf_s
    found = optimal_interval_s(cost_s, mtbf_s)
    assert found == pytest.approx(exact_s(cost_s, mtbf_s), rel=0.02)
    assert efficiency(found, cost_s, mtbf_s) >= 0.999 * efficiency(exact_s(cost_s, mtbf_s), cost_s, mtbf_s)


@given(mtbfs, st.floats(1e-8, 1e-4))
def test_a_cheap_save_is_youngs_case(mtbf_s: float, share: float) -> None:
    assert optimal_interval_s(share * mtbf_s, mtbf_s) == pytest.approx(math.sqrt(2 * share) * mtbf_s, rel=0.01)


@given(costs, costs, mtbfs)
def test_dearer_saves_lie_farther_apart(one: float, other: float, mtbf_s: float) -> None:
    low, high = sorted((one, other))
    assert 0 < optimal_interval_s(low, mtbf_s) <= optimal_interval_s(high, mtbf_s) * (1 + 1e-9) <= mtbf_s * (1 + 2e-9)


@given(mtbfs, mtbfs, st.floats(1e-6, 1.0))
def test_rarer_failures_lie_farther_apart(one: float, other: float, share: float) -> None:
    low, high = sorted((one, other))
    assert optimal_interval_s(share * low, low) <= optimal_interval_s(share * low, high) * (1 + 1e-9)


def simulated(interval_s: float, cost_s: float, mtbf_s: float, failures_s: np.ndarray) -> float:
    """Share of the time that is training, of a run that fails after each of these times in turn."""
    kept_s = 0.0
    for until_failure_s in failures_s:
        kept_s += interval_s * (until_failure_s // (interval_s + cost_s))  # the rest is done again
    return kept_s / float(failures_s.sum())


@pytest.mark.parametrize(("cost_s", "mtbf_s"), [(0.2, 600.0), (5.0, 3600.0), (60.0, 1800.0), (300.0, 1200.0)])
def test_no_interval_does_better_in_runs_that_fail(cost_s: float, mtbf_s: float) -> None:
    failures_s = np.random.default_rng(7).exponential(mtbf_s, 20_000)
    found = optimal_interval_s(cost_s, mtbf_s)
    share = simulated(found, cost_s, mtbf_s, failures_s)
    best = max(simulated(found * factor, cost_s, mtbf_s, failures_s) for factor in np.geomspace(0.2, 5, 41))
    assert share >= 0.99 * best
    assert share == pytest.approx(efficiency(found, cost_s, mtbf_s), rel=0.02)
    for factor in (0.2, 5):
        assert simulated(found * factor, cost_s, mtbf_s, failures_s) < share


@given(st.floats(60, 1e8), st.integers(0, 1000), st.floats(0, 1e8))
def test_failures_seen_and_time_without_any_move_what_is_expected(prior_s: float, failures: int, seen_s: float) -> None:
    found = expected_mtbf_s(prior_s, failures, seen_s)
    assert 0 < found <= max(prior_s, seen_s) * (1 + 1e-9)
    assert expected_mtbf_s(prior_s, failures + 1, seen_s) <= found * (1 + 1e-9)
    assert expected_mtbf_s(prior_s, failures, 2 * seen_s + 1) >= found * (1 - 1e-9)
    assert expected_mtbf_s(2 * prior_s, failures, seen_s) >= found * (1 - 1e-9)
    assert expected_mtbf_s(prior_s, 0, 0.0) == pytest.approx(prior_s)


@given(st.floats(60, 1e8), st.floats(10, 1e6))
def test_many_failures_outweigh_what_was_expected(prior_s: float, mtbf_s: float) -> None:
    failures = math.ceil(100 * PRIOR_LIMIT_S / mtbf_s) + 100
    assert expected_mtbf_s(prior_s, failures, failures * mtbf_s) == pytest.approx(mtbf_s, rel=0.03)


def test_what_a_run_shows_is_soon_believed() -> None:
    # Expected once in half a year; five failures in the first hour make it once in 24 minutes.
    assert expected_mtbf_s(4000 * 3600, 5, 3600) == pytest.approx(24 * 60, rel=1e-3)


class Training:
    """Steps of a second, beside a save half a second longer; a save holds the thread for 0.25 s and lasts 4 steps."""

    def __init__(self, pace: AutoInterval, fails: Callable[[int], bool] = lambda step: False, every: int = 0) -> None:
        self.durable = 0  # the newest step that a restart finds
        self.saved: list[int] = []
        self.asked: list[int] = []
        self._pace = pace
        self._fails = fails
        self._left = 0
        self._ask_at = pace.FIRST_DECISION_STEPS
        self._every = every

    def run(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.step(step)

    def step(self, step: int) -> float:
        """Its seconds; with ``every`` it is no concern of the pace's when to save."""
        beside = self._left > 0
        self._left = max(0, self._left - 1)
        if beside and not self._left:
            self.durable = self.saved[-1]
        begins = self._every > 0 and step % self._every == 0
        if not self._every and step == self._ask_at:
            self.asked.append(step)
            begins, again = self._pace.decide(step, saving=self._left > 0)
            self._ask_at += again
        if begins:
            assert not self._left, "a save runs into the next"
            self.saved.append(step)
            self._left = 4
            if self._fails(step):
                self._pace.failed()
        blocked_s = 0.25 if begins else 0.0
        step_s = (1.5 if beside else 1.0) + blocked_s
        self._pace.note(step_s, blocked_s, saving=self._left > 0)
        return step_s


def pace(mtbf_s: float, *, limit_s: float = 1e9, failures: int = 0, trained_s: float = 0.0) -> AutoInterval:
    config = CheckpointConfig(every_steps="auto", rank_mtbf_h=2 * mtbf_s / 3600, interval_limit_s=limit_s)
    return AutoInterval(config, 2, failures=failures, trained_s=trained_s)


def test_the_pace_is_dalys_for_what_saves_were_measured_to_cost() -> None:
    mine = pace(20_000.0)
    training = Training(mine)
    training.run(1, 1500)
    found = mine.interval()
    assert found.cost_s == pytest.approx(0.25 + 4 * 0.5)
    assert found.mtbf_s == pytest.approx(20_000, rel=0.1)
    assert found.every_steps == round(optimal_interval_s(found.cost_s, found.mtbf_s))
    assert "a save costs 2.25 s" in found.why
    assert "0 seen" in found.why
    assert training.saved[0] == AutoInterval.FIRST_DECISION_STEPS
    gaps = np.diff(training.saved)
    assert len(gaps) >= 3
    assert set(gaps) <= set(range(found.every_steps - 5, found.every_steps + 6))
    assert max(np.diff(training.asked)) <= 30, "time without failures counts at least every 30 s"


def test_a_save_never_runs_into_the_next_and_steps_beside_none_stay_known() -> None:
    mine = pace(0.5, failures=1000, trained_s=500.0)
    training = Training(mine)
    training.run(1, 100)
    assert mine.interval().every_steps == 5
    assert "4 steps until it is durable" in mine.interval().why
    assert set(np.diff(training.saved)) <= {5, 6}


def test_the_limit_holds_where_nothing_ever_fails() -> None:
    mine = pace(1e9, limit_s=50.0)
    training = Training(mine)
    training.run(1, 300)
    assert mine.interval().every_steps == 50
    assert "interval_limit_s = 50" in mine.interval().why
    assert set(np.diff(training.saved)) == {50}


def test_failures_of_earlier_starts_bring_saves_nearer() -> None:
    calm, troubled = pace(1e6), pace(1e6, failures=20, trained_s=20_000.0)
    for one in (calm, troubled):
        Training(one).run(1, 40)
    assert troubled.interval().every_steps < calm.interval().every_steps / 5
    assert "20 seen" in troubled.interval().why


def kept_share(failures_s: Sequence[float], prior_s: float, every: int = 0) -> float:
    """Share of a run's time from its first failure on that is left as steps, if it fails after each of these times."""
    kept, seen_s, trained_s = 0, 0.0, 0.0
    for failures, until_failure_s in enumerate(failures_s):
        training = Training(pace(prior_s, failures=failures, trained_s=trained_s), every=every)
        step, now_s = 0, 0.0
        while now_s < until_failure_s:
            step += 1
            now_s += training.step(step)
        trained_s += now_s
        if failures:
            kept += training.durable
            seen_s += now_s
    return kept / seen_s


@pytest.mark.parametrize("prior_s", [10.0, 1e7])
@pytest.mark.parametrize("seed", [3, 4, 5])
def test_a_run_that_failed_once_keeps_nearly_what_the_best_number_of_steps_would(prior_s: float, seed: int) -> None:
    failures_s = np.random.default_rng(seed).exponential(1000.0, 30).tolist()
    best = max(kept_share(failures_s, prior_s, every) for every in (10, 20, 40, 67, 100, 150))
    assert kept_share(failures_s, prior_s) >= 0.97 * best, "whatever was expected beforehand"


def test_a_failed_save_says_nothing_of_the_cost_and_is_made_up_for() -> None:
    mine = pace(20_000.0)
    training = Training(mine, fails=lambda step: step == AutoInterval.FIRST_DECISION_STEPS)
    training.run(1, 100)
    assert training.saved[:2] == [7, 37]
    assert mine.interval().cost_s == pytest.approx(2.25)


def test_news_is_what_differs_from_what_was_told() -> None:
    mine = pace(20_000.0)
    training = Training(mine)
    training.run(1, 10)
    assert mine.news() is None
    training.run(11, 12)
    first = mine.news()
    assert first is not None
    assert mine.news() is None
    training.run(13, 400)
    assert mine.news() is None, "less than a tenth"
    training.run(401, 40_000)
    assert mine.news() is not None, "so long without a failure"


@pytest.mark.parametrize(
    ("name", "value"),
    [("every_steps", 0), ("every_steps", "often"), ("rank_mtbf_h", 0.0), ("interval_limit_s", -1.0)],
)
def test_settings_out_of_range(name: str, value: object) -> None:
    with pytest.raises(OutOfRange, match=f"checkpoint.{name}"):
        CheckpointConfig(**{name: value})  # type: ignore[arg-type]


@given(st.integers(1, 10**12), st.floats(1e3, 1e11), st.floats(0, 100))
def test_a_stall_is_foretold_from_bytes_rate_and_lead(nbytes: int, rate: float, lead_s: float) -> None:
    forecast = StallForecast()
    assert forecast.begin(1000, 5.0) is None
    forecast.end(asked=5.0 + lead_s, copied=5.0 + 1000 / rate)
    expected = nbytes / rate - lead_s
    assert forecast.begin(nbytes, 9.0) == pytest.approx(max(0.0, expected), rel=1e-3, abs=1e-3 * (lead_s + 1))
    forecast.end(asked=10.0, copied=None)
    assert forecast.begin(nbytes, 11.0) == pytest.approx(max(0.0, expected), rel=1e-3, abs=1e-3 * (lead_s + 1))


def test_saves_tell_what_stall_was_expected(tmp_path: Path) -> None:
    events: list[Event] = []
    with checkpointer(tmp_path, events) as saver:
        for step in range(3):
            saver.save(step, replicated={"w": torch.full((1 << 20,), float(step))}, local={})
            saver.wait_copied()
    first, *rest = [event.predicted_stall_s for event in of(CheckpointSaved, events)]
    assert first is None
    assert all(value is not None and value >= 0 for value in rest)
