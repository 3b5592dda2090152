"""Slow phases are found where they are, noise makes none, and waiting is told apart from transfer.

The noise is recorded: the times of 200 steps of two ranks that shared two cores with other work, none of them slowed.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.diagnostics import DiagnosticsConfig, build_report, render_html
from outlast.diagnostics.report.build import _split
from outlast.diagnostics.report.load import Steps
from outlast.diagnostics.report.phases import SlowPhase, find_phases
from outlast.diagnostics.report.stragglers import StragglerRow, rank_stragglers
from tests.diagnostics.report.synthetic import SyntheticRun, clean
from tests.diagnostics.report.test_stalls import first_line

RECORDED = json.loads((Path(__file__).parents[2] / "data" / "clean_timings.json").read_text())
CONFIG = DiagnosticsConfig()


def recorded(seed: int, count: int, ranks: int = 2, late_s: dict[tuple[int, int], float] | None = None) -> Steps:
    """Recorded steps in another order, their times given to ranks by lot; ``late_s`` adds to a (step, rank)."""
    rng = np.random.default_rng(seed)
    own_s, transfer_s, values = [], [], {}
    noise = np.asarray(RECORDED["collective_s"])
    for row in rng.integers(3, len(noise), count):
        early = noise[row] - noise[row].min()  # 0 for the latest rank
        own_s.append(rng.choice(early.max() - early, ranks))
        transfer_s.append(noise[row].min())
    own = np.asarray(own_s)
    for (step, rank), seconds in (late_s or {}).items():
        own[step - 1, rank] += seconds
    waited = own.max(axis=1, keepdims=True) - own
    transfer = np.asarray(transfer_s)[:, None]
    values = {
        "t": np.cumsum(np.full((count, ranks), 0.3), axis=0),
        "collective_s": transfer + waited,
        "comm_s": transfer / 2 + waited,
        "data_s": np.full((count, ranks), 0.001),
        "checkpoint_s": np.zeros((count, ranks)),
        "step_s": 0.030 + transfer + own.max(axis=1, keepdims=True) * np.ones((1, ranks)),
    }
    return Steps(list(range(1, count + 1)), list(range(ranks)), [1] * count, [0] * count, values)


def judged(steps: Steps) -> tuple[tuple[StragglerRow, ...], tuple[SlowPhase, ...]]:
    hosts = {(1, 0, rank): "node" for rank in steps.ranks}
    rows = rank_stragglers(steps, hosts, CONFIG)
    return rows, find_phases(steps, hosts, rows, CONFIG)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(20, 400), ranks=st.integers(2, 8))
def test_recorded_noise_makes_neither_straggler_nor_phase(seed: int, count: int, ranks: int) -> None:
    rows, phases = judged(recorded(seed, count, ranks))
    assert not any(row.straggler for row in rows)
    assert phases == ()


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    ranks=st.integers(2, 8),
    first=st.integers(5, 60),
    length=st.integers(15, 60),
    late_ms=st.integers(120, 900),
    data=st.data(),
)
def test_a_slow_phase_in_recorded_noise_is_found_where_it_is(
    seed: int, ranks: int, first: int, length: int, late_ms: int, data: st.DataObject
) -> None:
    slow = data.draw(st.integers(0, ranks - 1))
    last = first + length - 1
    late_s = {(step, slow): late_ms / 1e3 for step in range(first, last + 1)}
    _, phases = judged(recorded(seed, 180, ranks, late_s))
    (phase,) = phases
    assert phase.rank == slow
    assert abs(phase.first_step - first) <= 3  # a step before it that was late by chance belongs to it
    assert abs(phase.last_step - last) <= 3
    assert 0.5 < phase.cost_s / (length * late_ms / 1e3) < 1.2  # less than all of it, where others were late too


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0.3, 0.9), late_ms=st.integers(60, 400))
def test_latest_in_nearly_all_steps_is_a_straggler_whatever_the_variance(seed: int, share: float, late_ms: int) -> None:
    """60 judged steps, in a share of which the rank is later by the whole and in the others by a little."""
    rng = np.random.default_rng(seed)
    late_s = {
        (step, 1): late_ms / 1e3 * (rng.lognormal(0, 1.5) if rng.random() < share else 1) for step in range(1, 64)
    }
    steps = recorded(seed, 63)
    steps.values = recorded(seed, 63, late_s={where: 0.080 + one for where, one in late_s.items()}).values
    rows, _ = judged(steps)
    assert [row.rank for row in rows if row.straggler] == [1]


def test_the_straggler_whose_noise_exceeds_its_lateness(tmp_path: Path) -> None:
    """100 ms late in 19 of 57 steps, 160 ms in 19, 500 ms in 19: the latest in each, with a large spread."""
    run = SyntheticRun(run_dir=tmp_path, ranks=2, steps=60)
    run.start()
    for step in range(1, 61):
        run.late_s = {1: (0.020, 0.160, 0.500)[step % 3]}
        run.train(step, step)
    run.end()
    first = build_report(tmp_path).stragglers[0]
    assert first.noise_ms > first.median_lateness_ms  # it was no straggler by this rule alone
    assert (first.rank, first.straggler, first.latest_share) == (1, True, 1.0)
    assert first.cost_s == pytest.approx(19 * 0.68, rel=0.1)
    assert first_line(tmp_path).startswith("Rank 1 on node-a is a straggler: it makes steps ")
    page = render_html(build_report(tmp_path))
    assert "<h2>Rank 1 on node-a is a straggler" in page
    assert 'class="verdict bad"' in page


def phased(run_dir: Path, late_s: dict[int, dict[int, float]], ranks: int = 4, steps: int = 80) -> SyntheticRun:
    """A run in which each step has its own late ranks."""
    run = SyntheticRun(run_dir=run_dir, ranks=ranks, steps=steps)
    run.start()
    for step in range(1, steps + 1):
        run.late_s = late_s.get(step, {})
        run.train(step, step)
    run.end()
    return run


def test_a_phase_is_told_everywhere(tmp_path: Path) -> None:
    phased(tmp_path, {step: {2: 0.160} for step in range(12, 45)})
    report = build_report(tmp_path)
    (phase,) = report.slow_phases
    assert (phase.rank, phase.host, phase.first_step, phase.last_step, phase.steps) == (2, "node-b", 12, 44, 33)
    assert phase.median_lateness_ms == pytest.approx(160, rel=0.1)
    assert phase.longer[0][0] == "compute"
    assert phase.cost_s == pytest.approx(33 * 0.160, rel=0.1)
    assert first_line(tmp_path).startswith("Rank 2 on node-b was slow in steps 12 to 44: 16")
    assert report.verdict.startswith("No straggler over the whole run, but a slow phase: rank 2 on node-b in steps 12")
    page = render_html(report)
    assert '<span class="badge warn">slow in steps 12 to 44</span>' in page
    assert 'class="verdict bad"' in page
    (incident,) = (one for one in report.incidents if one.kind == "slow_phase")
    assert (incident.step, incident.rank) == (12, 2)
    plain = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert plain["slow_phases"][0]["first_step"] == 12


def test_two_ranks_of_a_host_two_phases_of_a_rank_and_one_that_hides_another(tmp_path: Path) -> None:
    host = {step: {0: 0.2, 1: 0.2} for step in range(10, 25)}
    twice = {step: {2: 0.1} for step in [*range(30, 45), *range(60, 75)]}
    for step in range(30, 45):
        twice[step][3] = 0.3
    phased(tmp_path, host | twice, ranks=6)
    found = {(one.rank, one.first_step, one.last_step) for one in build_report(tmp_path).slow_phases}
    assert found == {(0, 10, 24), (1, 10, 24), (3, 30, 44), (2, 30, 44), (2, 60, 74)}


def test_long_steps_of_a_slow_phase_are_no_stalls_beside_it(tmp_path: Path) -> None:
    phased(tmp_path, {step: {1: 3.0} for step in range(20, 40)})
    report = build_report(tmp_path)
    assert [one.kind for one in report.incidents] == ["slow_phase"]


def test_waiting_is_told_apart_from_transfer(tmp_path: Path) -> None:
    clean(tmp_path, ranks=2, late_s={1: 0.160})
    split = build_report(tmp_path).split
    parts = split.told_apart_s()
    assert parts["waiting"] == pytest.approx(60 * 0.160 / 2, rel=0.05)  # of two ranks one waits
    assert parts["transfer"] == pytest.approx(60 * 0.6 * 0.0325, rel=0.1)
    assert parts["transfer"] + parts["waiting"] == pytest.approx(split.totals_s()["communication"])
    assert sum(split.shares_told_apart().values()) == pytest.approx(1.0)
    rank, share = split.waited_for[0]
    assert rank == 1
    assert share > 0.99


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), ranks=st.integers(1, 6), late_ms=st.integers(0, 500))
def test_waiting_is_a_part_of_communication(seed: int, ranks: int, late_ms: int) -> None:
    steps = recorded(seed, 40, ranks, {(step, 0): late_ms / 1e3 for step in range(1, 41)})
    for name in ("comm_s", "collective_s", "t", "step_s"):
        steps.values[name][7, ranks - 1] = np.nan  # a rank without an event of one step
    split = _split(steps)
    for waiting_s, communication_s in zip(split.waiting_s, split.communication_s, strict=True):
        assert 0.0 <= waiting_s <= communication_s + 1e-9 or np.isnan(communication_s)
