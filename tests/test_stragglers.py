"""A slow rank stands first in the report, with its lateness; without one, nobody is called a straggler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.helpers import outlast, tiny_config, torchrun


def report_of(folder: Path, delay_s: float) -> tuple[dict[str, Any], Path]:
    config, run = tiny_config(folder)
    script = Path(__file__).parent / "slow_rank.py"
    words = ["--trainer.steps", "60", "--data.batch-size", "8", "--checkpoint.every-steps", "1000"]
    torchrun(script, "1", str(delay_s), config, *words)
    report: dict[str, Any] = json.loads(outlast("report", run, "--json").stdout)
    return report, run


def test_a_rank_slowed_by_50_ms_stands_first(tmp_path: Path) -> None:
    report, run = report_of(tmp_path, 0.05)
    first = report["stragglers"][0]
    assert first["rank"] == 1
    assert first["straggler"] is True
    assert 40 <= first["median_lateness_ms"] <= 60
    assert [row["straggler"] for row in report["stragglers"][1:]] == [False]
    text = outlast("report", run).stdout
    assert "rank 1" in text
    html = tmp_path / "report.html"
    outlast("report", run, "--html", html)
    assert "rank 1" in html.read_text()


def test_without_a_slow_rank_nobody_is_called_one(tmp_path: Path) -> None:
    report, run = report_of(tmp_path, 0.0)
    assert [row["straggler"] for row in report["stragglers"]] == [False, False]
    assert "no straggler" in outlast("report", run).stdout.lower()
