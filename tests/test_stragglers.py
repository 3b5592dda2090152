"""A slow rank stands first in the report, with its lateness; without one, nobody is called a straggler."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from outlast.diagnostics import build_report, render_html
from tests.helpers import outlast, tiny_config, torchrun


def report_of(folder: Path, delay_s: float | str, steps: int = 30) -> tuple[dict[str, Any], Path, float]:
    """The report, the run, and by how many milliseconds a step rank 1 was slowed in the median."""
    config, run = tiny_config(folder)
    script = Path(__file__).parent / "slow_rank.py"
    words = ["--trainer.steps", str(steps), "--data.batch-size", "8", "--checkpoint.every-steps", "1000"]
    # Ranks that share cores with other work are late by tens of milliseconds, now this one, now that one.
    out = torchrun(script, "1", str(delay_s), config, *words, "--diagnostics.straggler-min-s", "0.1")
    slowed = re.search(r"slowed by ([\d.]+) ms", out)
    assert slowed
    report: dict[str, Any] = json.loads(outlast("report", run, "--json").stdout)
    return report, run, float(slowed[1])


def test_a_rank_slowed_by_300_ms_stands_first(tmp_path: Path) -> None:
    report, run, slowed_ms = report_of(tmp_path, 0.3)
    assert slowed_ms >= 300
    first = report["stragglers"][0]
    assert first["rank"] == 1
    assert first["straggler"] is True
    assert first["median_lateness_ms"] == pytest.approx(slowed_ms, rel=0.2)
    assert [row["straggler"] for row in report["stragglers"][1:]] == [False]
    assert first["cause"] == "waiting for its data"
    text = outlast("report", run).stdout
    assert "rank 1" in text
    html = tmp_path / "report.html"
    outlast("report", run, "--html", html)
    assert "rank 1" in html.read_text()


def test_a_phase_in_which_a_rank_was_slow_stands_first_and_the_wait_for_it_is_told(tmp_path: Path) -> None:
    report, run, slowed_ms = report_of(tmp_path, "0.3@14-27", steps=42)
    (phase,) = report["slow_phases"]
    assert phase["rank"] == 1
    assert phase["first_step"] == pytest.approx(14, abs=2)  # others share the machine: a step beside it may be late too
    assert phase["last_step"] == pytest.approx(27, abs=2)
    assert phase["latest_share"] > 0.8
    assert phase["cost_s"] == pytest.approx(14 * slowed_ms / 1e3, rel=0.3)
    assert phase["longer"][0][0] == "data"
    assert phase["cause"].startswith("waiting for its data: ")
    split = report["split"]
    assert split["waited_for"][0][0] == 1
    waited_s = sum(split["waiting_s"][phase["first_step"] - 1 : phase["last_step"]])
    assert waited_s == pytest.approx(14 * slowed_ms / 1e3 / 2, rel=0.3)  # of two ranks one waits
    first = outlast("report", run).stdout.splitlines()[0]
    assert first.startswith(f"Rank 1 on {phase['host']} was slow in steps 1")


@pytest.mark.soak
def test_latest_in_nearly_all_steps_is_a_straggler_though_its_lateness_varies(tmp_path: Path) -> None:
    report, run, _ = report_of(tmp_path, "0.15,0.5,1.3", steps=33)
    first = report["stragglers"][0]
    assert first["noise_ms"] > first["behind_typical_ms"] / 2  # far beyond what the usual rule allows
    assert (first["rank"], first["straggler"]) == (1, True)
    assert "Rank 1" in render_html(build_report(run)).split("<h2>")[1][:40]


@pytest.mark.slow
def test_without_a_slow_rank_nobody_is_called_one(tmp_path: Path) -> None:
    report, run, _ = report_of(tmp_path, 0.0)
    assert [row["straggler"] for row in report["stragglers"]] == [False, False]
    assert report["slow_phases"] == []
    assert "no straggler" in outlast("report", run).stdout.lower()
