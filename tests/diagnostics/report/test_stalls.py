"""Stalls that healed, and the first line of a report."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from outlast.diagnostics import build_report, render_html, render_terminal
from tests.diagnostics.report.synthetic import clean, eventful


def first_line(run_dir: Path) -> str:
    out = io.StringIO()
    render_terminal(build_report(run_dir), Console(file=out, width=1000))
    return out.getvalue().splitlines()[0]


@pytest.mark.parametrize(
    ("what", "why", "rank"),
    [
        ("link", "all ranks spent it inside collectives: the network was slow or cut", None),
        ("all", "all ranks were slow outside collectives", None),
        ("data", "all ranks were slow waiting for data", None),
        ("rank 2", "its peers waited 26.5 s for rank 2, which was slow outside collectives", 2),
    ],
)
def test_one_long_step(tmp_path: Path, what: str, why: str, rank: int | None) -> None:
    clean(tmp_path, stalls={30: (what, 26.5)})
    (stall,) = (one for one in build_report(tmp_path).incidents if one.kind == "stall")
    assert (stall.step, stall.rank) == (30, rank)
    assert stall.cost_s == pytest.approx(26.5, abs=0.1)
    assert why in stall.detail
    assert first_line(tmp_path).startswith("Step 30 stalled for 26.5 s: ")
    assert "it went on by itself" in first_line(tmp_path)
    assert "Step 30 stalled for 26.5 s" in render_html(build_report(tmp_path))


def test_a_stretch_of_slow_steps_is_one_stall(tmp_path: Path) -> None:
    clean(tmp_path, stalls={step: ("all", 2.5) for step in range(20, 32)})
    (stall,) = (one for one in build_report(tmp_path).incidents if one.kind == "stall")
    assert stall.cost_s == pytest.approx(30, abs=0.5)
    assert "Steps 20 to 31 stalled" in first_line(tmp_path)


def test_short_steps_that_are_slow_together_are_one_stall(tmp_path: Path) -> None:
    """As on a throttled processor: no step is long, and half a minute is lost. One alone is no stall."""
    clean(tmp_path / "long", stalls={step: ("all", 0.9) for step in range(20, 44) if step % 4})
    (stall,) = (one for one in build_report(tmp_path / "long").incidents if one.kind == "stall")
    assert stall.cost_s == pytest.approx(18 * 0.9, abs=1.0)
    assert "as on a busy, throttled or suspended machine" in stall.detail
    assert "Steps 21 to 43 stalled" in first_line(tmp_path / "long")
    clean(tmp_path / "short", stalls={step: ("all", 0.9) for step in (20, 30, 40)})
    assert not [one for one in build_report(tmp_path / "short").incidents if one.kind == "stall"]


def test_six_short_stops(tmp_path: Path) -> None:
    clean(tmp_path, stalls={step: ("rank 1", 3.0) for step in range(15, 45, 5)})
    stalls = [one for one in build_report(tmp_path).incidents if one.kind == "stall"]
    assert [(one.step, one.rank) for one in stalls] == [(step, 1) for step in range(15, 45, 5)]
    assert first_line(tmp_path).startswith("6 stalls cost 18")
    assert "for rank 1" in first_line(tmp_path)


def test_a_stall_in_which_nobody_looked_at_collectives_blames_nobody(tmp_path: Path) -> None:
    clean(tmp_path, steps=120, stalls={41: ("rank 2", 3.0)}, looked_every=8)
    assert "Step 41 stalled for 3 s: nobody knows in what" in first_line(tmp_path)


def test_a_clean_run_and_its_first_steps_have_none(tmp_path: Path) -> None:
    clean(tmp_path, noise_s=0.04, stalls={1: ("all", 30.0)})
    assert [one for one in build_report(tmp_path).incidents if one.kind == "stall"] == []
    assert first_line(tmp_path) == tmp_path.name


def test_the_worst_failure_stands_in_the_first_line(tmp_path: Path) -> None:
    """A hang that was found after 10 s, and cost 18 steps: more than a kill that cost 4, or a stall of 9 s."""
    eventful(tmp_path, stalls={5: ("link", 9.0)})
    line = first_line(tmp_path)
    assert line.startswith("Rank 3 on node-b hung in step 49: stopped (state T)")
    assert line.endswith("; 15.1 s and 18 steps lost; recovered; the worst of 2 failures.")
    kill, hang = build_report(tmp_path).failures
    assert (kill.cause, kill.steps_lost, kill.outcome) == (
        "rank 1 on node-a killed (SIGKILL) at 23.3 s, after step 34",
        4,
        "recovered",
    )
    assert hang.lost_s is not None
    assert kill.lost_s is not None
    assert hang.lost_s > kill.lost_s + 10


def test_a_hang_stands_there_with_its_evidence(tmp_path: Path) -> None:
    run = clean(tmp_path)
    run.fail(2, generation=0, step=61, hang=True)
    assert first_line(tmp_path).startswith(
        "Rank 2 on node-b hung in step 61: stopped (state T), last entered all_gather"
    )
