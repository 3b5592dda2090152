"""The report at the end of a run: what keeps it from being written ends no run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from outlast.events import EventLog, RunEnded, RunStarted
from outlast.launch.attempt import Attempt
from outlast.trainer.main import _write_report


def _run(tmp_path: Path) -> Any:
    attempt = Attempt(tmp_path / "run", 1)
    attempt.make_folders()
    with EventLog(attempt.events_path(0), rank=0) as log:
        about = {"attempt": 1, "world_size": 1, "host": "h", "pid": 1, "device": "cpu", "parameters": 3, "comm": "none"}
        log.write(RunStarted(first_step=1, last_step=2, **about))  # type: ignore[arg-type]
        log.write(RunEnded(step=2, ok=True))
    return SimpleNamespace(attempt=attempt)


def test_a_report_that_cannot_be_written_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = _run(tmp_path)
    (run.attempt.run / "report.html").mkdir()
    _write_report(run)
    assert "no report was written" in caplog.text
    assert "it is a folder" in caplog.text


def test_events_that_are_gone_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = _run(tmp_path)
    run.attempt.events_path(0).unlink()
    _write_report(run)
    assert "no report was written" in caplog.text


def test_a_summary_needs_no_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _run(tmp_path)
    _write_report(run)
    assert (run.attempt.run / "report.html").is_file()
    assert "held-out loss" not in capsys.readouterr().out
