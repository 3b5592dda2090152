"""The timeline around the worst incident, and the page of a large run."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from outlast.diagnostics import build_report, render_html
from outlast.diagnostics.report.heat import MOST_ROWS, heat_data
from outlast.diagnostics.report.model import Lateness, Report
from outlast.diagnostics.report.scene import MOST_RANKS, Scene
from tests.diagnostics.report.synthetic import SyntheticRun, clean, eventful
from tests.diagnostics.report.test_html import CHROMIUM, drawn_by_browser
from tests.diagnostics.trace.failing_run import CULPRIT, hanging

RANKS, STEPS = 1024, 10_000
LATE, LATE_FROM = 700, 6000


def scene_of(run_dir: Path) -> Scene:
    found = build_report(run_dir).scene
    assert found is not None
    return found


@pytest.mark.parametrize("ahead_s", [0.0, 3600.0])
def test_a_hang_shows_who_waited_for_whom(tmp_path: Path, ahead_s: float) -> None:
    hanging(tmp_path, late_s={1: 0.05}, ahead_s=ahead_s)
    scene = scene_of(tmp_path)
    assert (scene.culprit, scene.title, scene.waiting) == (CULPRIT, "rank 2 hung", 3)
    assert [one.rank for one in scene.ranks] == [0, 1, 2, 3]
    for one in scene.ranks:
        last = one.spans[-1]
        assert last.kind == ("hung" if one.rank == CULPRIT else "wait")
        assert last.end_s == pytest.approx(scene.at_s, abs=0.01)
        assert last.end_s - last.begin_s == pytest.approx(10.2, abs=0.3)
        assert (one.waits_from_s is None) == (one.rank == CULPRIT)
        assert sum(span.kind == "compute" for span in one.spans) >= 2
        assert all(span.begin_s <= span.end_s for span in one.spans)
    assert "all_reduce #41" in scene.ranks[0].spans[-1].what


def test_a_slow_rank_is_shown_in_its_worst_step(tmp_path: Path) -> None:
    clean(tmp_path, late_s={2: 0.08}, stalls={33: ("rank 2", 0.2)})
    scene = scene_of(tmp_path)
    assert scene.culprit == 2
    assert "late in step 33" in scene.title
    for one in scene.ranks:
        assert (one.waits_from_s is None) == (one.rank == 2)
        if one.waits_from_s is not None:
            assert 0.2 < scene.at_s - one.waits_from_s < 0.4


def test_a_failure_of_which_no_collectives_were_kept_has_no_arrows(tmp_path: Path) -> None:
    eventful(tmp_path)
    scene = scene_of(tmp_path)
    assert [one.rank for one in scene.ranks] == [scene.culprit]
    assert scene.waiting == 0
    assert scene.ranks[0].spans[-1].kind in ("hung", "failed")


def test_without_an_incident_there_is_no_scene(tmp_path: Path) -> None:
    clean(tmp_path)
    report = build_report(tmp_path)
    assert report.scene is None
    assert 'id="scene"' not in render_html(report)
    run = SyntheticRun(run_dir=tmp_path / "empty", ranks=2)
    run.start()
    assert build_report(tmp_path / "empty").scene is None


def large(run_dir: Path) -> Report:
    """A run of 64 ranks in which one hangs, with the lateness of 1,024 ranks in 10,000 steps, rank 700 late at last."""
    hanging(run_dir, ranks=64, steps=30, ranks_per_host=8)
    report = build_report(run_dir)
    late_ms = np.abs(np.random.default_rng(0).normal(0, 1, (RANKS, STEPS)))
    late_ms[LATE, LATE_FROM:] += 80.0
    late_ms[3, ::7] = np.nan
    lateness = Lateness(
        steps=tuple(range(1, STEPS + 1)),
        ranks=tuple(range(RANKS)),
        hosts=tuple(f"node-{rank // 8:03d}" for rank in range(RANKS)),
        late_ms=tuple(late_ms),  # type: ignore[arg-type]
    )
    return dataclasses.replace(report, lateness=lateness)


def test_a_large_run_is_binned_by_ranks_and_steps_and_hides_nobody(tmp_path: Path) -> None:
    report = large(tmp_path)
    heat = heat_data(report)
    rows = len(heat["ranks"])
    assert rows == len(heat["mean"]) == len(heat["most"]) == len(heat["median"]) == len(heat["hosts"]) <= MOST_ROWS
    assert len(heat["bins"]) <= 240
    assert heat["bins"][-1][1] == STEPS
    covered = [
        rank for low, high in zip(heat["ranks"], heat["last_ranks"], strict=True) for rank in range(low, high + 1)
    ]
    assert covered == list(range(RANKS))
    (late,) = (row for row in range(rows) if heat["ranks"][row] <= LATE <= heat["last_ranks"][row])
    hot = [row for row in range(rows) if (heat["mean"][row][-1] or 0.0) > 40]
    assert hot == [late], "one late rank among those that share its row is seen"
    begin = next(place for place, (first, _) in enumerate(heat["bins"]) if first > LATE_FROM)
    assert all(value < 10 for value in heat["mean"][late][: begin - 1])
    alone = {low for low, high in zip(heat["ranks"], heat["last_ranks"], strict=True) if low == high}
    assert CULPRIT in alone, "a rank of an incident has a row of its own"
    assert len(render_html(report)) < 2_000_000


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian: chromium)")
def test_a_browser_draws_a_large_run(tmp_path: Path) -> None:
    report = large(tmp_path / "run")
    assert report.scene is not None
    assert len(report.scene.ranks) == MOST_RANKS
    assert report.scene.waiting == 63
    page = tmp_path / "report.html"
    caught = "<script>addEventListener('error', (e) => { document.title = 'ERROR ' + e.message; });</script>"
    height = "<script>document.body.dataset.height = document.getElementById('heat').clientHeight;</script>"
    page.write_text(
        render_html(report).replace("<title>", f"{caught}<title>", 1).replace("</body>", f"{height}</body>", 1)
    )
    dom = drawn_by_browser(page, tmp_path / "profile", limit_s=300)  # only to notice that it hangs
    assert "ERROR" not in re.findall(r"<title>(.*?)</title>", dom)[0]
    drawn = {
        chart: dom.split(f'id="{chart}"', 1)[1].split("</section>", 1)[0]
        for chart in ("scene", "heat", "loss", "split", "time")
    }
    assert all("<svg" in one for one in drawn.values())
    assert drawn["scene"].count('class="arrow"') == MOST_RANKS - 1
    assert "48 more waited, and are not shown" in dom
    (height_px,) = map(int, re.findall(r'data-height="(\d+)"', dom))
    assert 400 < height_px < 1000
    assert "ranks 0–" in drawn["heat"] or "rank 0" in drawn["heat"]
    assert json.loads(dom.split('id="data">', 1)[1].split("</script>", 1)[0])["scene"]["culprit"] == CULPRIT
