"""Events: written whole, read back, torn tails and strangers told apart."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from outlast.errors import DiagnosticsError
from outlast.events import EvalDone, EventLog, RunEnded, read_events


def test_round_trip_with_envelope(tmp_path: Path) -> None:
    path = tmp_path / "rank_00003.jsonl"
    before = time.time()
    with EventLog(path, rank=3, generation=2) as log:
        log.write(EvalDone(step=5, loss=2.5, seconds=0.25))
        log.write(RunEnded(step=5, ok=False, reason="ünïcode\nline"))
    first, second = read_events(path)
    assert (first.rank, first.generation, first.kind, first["loss"]) == (3, 2, "eval", 2.5)
    assert second["reason"] == "ünïcode line"
    assert before <= first.t <= second.t <= time.time()
    assert json.loads(path.read_text().splitlines()[0])["v"] == 1


def test_a_torn_last_line_is_skipped_and_garbage_is_not(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    with EventLog(path, rank=0) as log:
        log.write(EvalDone(step=1, loss=1.0, seconds=0.1))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    assert len(list(read_events(path))) == 1
    path.write_bytes(b"not json\n" + whole)
    with pytest.raises(DiagnosticsError, match=r"e\.jsonl:1"):
        list(read_events(path))
    path.write_bytes(whole.replace(b'"v":1', b'"v":9'))
    with pytest.raises(DiagnosticsError, match="schema 9"):
        list(read_events(path))


def test_a_closed_log_refuses(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "e.jsonl", rank=0)
    log.close()
    log.close()
    with pytest.raises(DiagnosticsError, match="closed"):
        log.write(RunEnded(step=1, ok=True))


def test_what_was_written_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    code = (
        "import sys, time; from outlast.events import *\n"
        "log = EventLog(sys.argv[1], rank=0)\n"
        "for n in range(10**9): log.write(EvalDone(step=n, loss=0.0, seconds=0.0))\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)])
    deadline = time.monotonic() + 90
    while not (path.exists() and path.stat().st_size > 50_000):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    steps = [record["step"] for record in read_events(path)]
    assert steps == list(range(len(steps)))
    assert len(steps) > 100


_LIMITED = """
import resource, signal, sys
from outlast.events import EvalDone, EventLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (400, hard))
log = EventLog(sys.argv[1], rank=0)
for step in range(10):
    log.write(EvalDone(step=step, loss=1.0, seconds=0.5))
assert log.lost > 0
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
log.write(EvalDone(step=10, loss=1.0, seconds=0.5))
assert log.lost == 0
log.close()
"""


def test_a_file_that_takes_a_part_of_a_line_stays_readable_and_tells_what_was_lost(tmp_path: Path) -> None:
    path = tmp_path / "rank_00000.jsonl"
    done = subprocess.run([sys.executable, "-c", _LIMITED, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = list(read_events(path))
    steps = [one["step"] for one in records if one.kind == "eval"]
    lost = [one for one in records if one.kind == "events_lost"]
    assert len(lost) == 1
    assert lost[0]["count"] == 11 - len(steps)
    assert lost[0]["count"] > 0
    assert "bytes" in lost[0]["reason"]
    assert steps[-1] == 10
    assert done.stderr.count("events are being lost") == 1


def test_a_full_device_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with EventLog("/dev/full", rank=0) as log:
        for step in range(3):
            log.write(EvalDone(step=step, loss=1.0, seconds=0.5))
        assert log.lost == 3
    assert caplog.text.count("No space left on device") == 2  # once when it begins, once at the end
    assert "3 events were lost" in caplog.text


def test_a_folder_that_vanishes_is_told_and_what_is_written_then_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "events" / "rank_00000.jsonl"
    path.parent.mkdir()
    with EventLog(path, rank=0) as log:
        log.write(EvalDone(step=1, loss=1.0, seconds=0.5))
        shutil.rmtree(path.parent)
        log.write(EvalDone(step=2, loss=1.0, seconds=0.5))
        assert (log.lost, path.parent.exists()) == (1, False)
        assert "No such file" in caplog.text
        path.parent.mkdir()
        log.write(EvalDone(step=3, loss=1.0, seconds=0.5))
        path.unlink()  # of a file alone that is removed, a new one is made
        log.write(EvalDone(step=4, loss=1.0, seconds=0.5))
    assert [record["step"] for record in read_events(path)] == [4]


def test_a_folder_that_appears_later_gets_the_events_and_the_count(tmp_path: Path) -> None:
    path = tmp_path / "events" / "rank_00000.jsonl"
    with EventLog(path, rank=0) as log:
        log.write(EvalDone(step=1, loss=1.0, seconds=0.5))
        path.parent.mkdir()
        log.write(EvalDone(step=2, loss=1.0, seconds=0.5))
    lost, kept = read_events(path)
    assert (lost.kind, lost["count"], kept["step"]) == ("events_lost", 1, 2)
    assert "No such file" in lost["reason"]
