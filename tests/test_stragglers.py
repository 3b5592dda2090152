"""A slow rank stands first in the report, with its lateness; without one, nobody is called a straggler."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import outlast, tiny_config, torchrun


def report_of(folder: Path, delay_s: float) -> tuple[dict[str, Any], Path, float]:
    """The report, the run, and by how many milliseconds a step rank 1 was slowed."""
    config, run = tiny_config(folder)
    script = Path(__file__).parent / "slow_rank.py"
    words = ["--trainer.steps", "30", "--data.batch-size", "8", "--checkpoint.every-steps", "1000"]
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
    text = outlast("report", run).stdout
    assert "rank 1" in text
    html = tmp_path / "report.html"
    outlast("report", run, "--html", html)
    assert "rank 1" in html.read_text()


@pytest.mark.slow
def test_without_a_slow_rank_nobody_is_called_one(tmp_path: Path) -> None:
    report, run, _ = report_of(tmp_path, 0.0)
    assert [row["straggler"] for row in report["stragglers"]] == [False, False]
    assert "no straggler" in outlast("report", run).stdout.lower()
