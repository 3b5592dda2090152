"""The report at the end of a run: what keeps it from being written ends no run."""

from __future__ import annotations

import json
from pathlib import Path

from tests.forked import Job
from tests.helpers import clean_env, events, outlast, steps_saved, tiny_config

SHORT = ("--trainer.steps", "3", "--checkpoint.every-steps", "3")


def test_a_report_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    config, run = tiny_config(tmp_path)
    (run / "report.html").mkdir(parents=True)
    done = outlast("train", config, *SHORT)
    told = done.stdout + done.stderr
    assert "no report was written" in told
    assert "it is a folder" in told
    assert f"outlast report {run}" in told
    assert steps_saved(run) == [3]


def test_a_summary_that_nobody_can_read_is_told(tmp_path: Path) -> None:
    """The terminal's log is on a full disk."""
    config, run = tiny_config(tmp_path)
    words = ["train", str(config), *SHORT]
    job = Job("outlast.cli", words, env=clean_env(), stdout=Path("/dev/full"), stderr=tmp_path / "log")
    assert job.wait(120) == 0, (tmp_path / "log").read_text()[-4000:]
    (log,) = run.glob("attempts/[0-9]*/logs/rank_00000.log")
    assert "no report was written" in log.read_text()
    assert "No space left on device" in log.read_text()
    assert steps_saved(run) == [3]


def test_a_summary_needs_no_evaluation(tmp_path: Path) -> None:
    config, run = tiny_config(tmp_path)
    done = outlast("train", config, *SHORT)
    assert (run / "report.html").is_file()
    assert "held-out loss" in done.stdout
    assert [record["ok"] for record in events(run, "run_ended")] == [True]
    (written,) = run.glob("attempts/[0-9]*/events/rank_00000.jsonl")
    kept = [line for line in written.read_text().splitlines(True) if json.loads(line)["kind"] != "eval"]
    assert len(kept) < len(written.read_text().splitlines())
    written.write_text("".join(kept))
    again = outlast("report", run)
    assert "held-out loss" not in again.stdout
    assert "committed" in again.stdout
