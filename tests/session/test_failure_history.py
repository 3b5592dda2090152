"""Earlier starts of a run, from their events: what failed, and how long it had trained."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from outlast.launch.attempt import Attempt
from outlast.session.failure_history import FailureHistory, read_failure_history

STARTED = {"kind": "run_started", "world_size": 2, "attempt": 1}


def write(run: Path, number: int, *events: dict[str, object], torn: bool = False) -> None:
    """A start's events, one every ten seconds."""
    attempt = Attempt(run, number)
    attempt.make_folders()
    lines = [
        json.dumps({"v": 1, "t": 1000.0 * number + 10 * place, "rank": 0, "generation": 0, **event})
        for place, event in enumerate(events)
    ]
    attempt.events_path(0).write_text("\n".join(lines) + ('\n{"v":1,"t":9' if torn else "\n" if lines else ""))


def step(number: int) -> dict[str, object]:
    return {"kind": "step", "step": number}


def test_starts_that_trained_and_failed_are_counted(tmp_path: Path) -> None:
    write(tmp_path, 1, STARTED, step(1), step(2), torn=True)  # killed
    write(tmp_path, 2, {"kind": "eval"}, STARTED | {"world_size": 3}, step(2), {"kind": "run_ended", "ok": False})
    write(tmp_path, 3, STARTED, step(3), step(4), {"kind": "run_ended", "ok": True})
    write(tmp_path, 4, STARTED)  # never came to a step
    write(tmp_path, 5)
    Attempt(tmp_path, 6).make_folders()  # never wrote an event
    write(tmp_path, 7, STARTED, step(5))  # the one that asks
    assert read_failure_history(Attempt(tmp_path, 7)) == FailureHistory(
        failures=2, trained_rank_s=2 * 20.0 + 3 * 20.0 + 2 * 30.0
    )
    assert read_failure_history(Attempt(tmp_path, 1)) == FailureHistory()


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, 1, STARTED, step(1))
    path = Attempt(tmp_path, 1).events_path(0)
    path.write_bytes(b"\x00garbage\n" + path.read_bytes())
    write(tmp_path, 2, STARTED, step(1))
    with caplog.at_level(logging.WARNING, logger="outlast"):
        assert read_failure_history(Attempt(tmp_path, 3)) == FailureHistory(failures=1, trained_rank_s=20.0)
    assert "attempt 1 does not count" in caplog.text
    assert "not an event" in caplog.text
