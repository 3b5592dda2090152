from __future__ import annotations

import os
import signal
import statistics
import time
from pathlib import Path

import pytest

from outlast.diagnostics import (
    Heartbeat,
)
from outlast.diagnostics.live import (
    heartbeat_path,
    read_heartbeat,
)
from outlast.diagnostics.live.heartbeat import WINDOW_STEPS
from outlast.errors import DiagnosticsError
from tests.diagnostics.conftest import Spawn

WRITER = """
import sys
from pathlib import Path
from outlast.diagnostics import Heartbeat
heartbeat = Heartbeat(Path(sys.argv[1]), rank=1)
step = 0
while True:
    step += 1
    heartbeat.beat("step", step)
    if step == 200:
        print("ready", flush=True)
"""


def test_the_first_beat_is_given_at_once(shm: Path) -> None:
    before = time.monotonic()
    heartbeat = Heartbeat(heartbeat_path(shm, 2), rank=2)
    beat = read_heartbeat(heartbeat_path(shm, 2))
    assert (beat.rank, beat.pid, beat.phase, beat.step, beat.median_step_s) == (2, os.getpid(), "setup", 0, 0.0)
    assert before <= beat.t_s <= time.monotonic()
    heartbeat.beat("eval", 40)
    assert read_heartbeat(heartbeat_path(shm, 2)).phase == "eval"
    heartbeat.close(unlink=True)
    heartbeat.close()
    assert not heartbeat_path(shm, 2).exists()


def test_the_median_is_that_of_the_last_steps(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock_ns = [10**9]
    monkeypatch.setattr(time, "monotonic_ns", lambda: clock_ns[0])
    heartbeat = Heartbeat(heartbeat_path(shm, 0), rank=0)
    durations_ms = [(7 * n) % 50 + 1 for n in range(100)]
    for step, duration_ms in enumerate(durations_ms, 1):
        heartbeat.beat("step", step)
        heartbeat.beat("step", step)  # a second sign of life in the same step counts for nothing
        clock_ns[0] += duration_ms * 1_000_000
        if step % 10 == 0:  # a checkpoint belongs to its step
            heartbeat.beat("checkpoint", step)
        done = durations_ms[: step - 1][-WINDOW_STEPS:]
        expected_s = statistics.median(done) / 1e3 if len(done) >= 3 else 0.0
        assert read_heartbeat(heartbeat_path(shm, 0)).median_step_s == pytest.approx(expected_s, abs=1e-6)
    heartbeat.close()


def test_an_evaluation_or_a_jump_is_not_a_step(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock_ns = [10**9]
    monkeypatch.setattr(time, "monotonic_ns", lambda: clock_ns[0])
    heartbeat = Heartbeat(heartbeat_path(shm, 0), rank=0)
    for step in range(1, 6):
        heartbeat.beat("step", step)
        clock_ns[0] += 10**8
    heartbeat.beat("eval", 5)
    clock_ns[0] += 10**11
    heartbeat.beat("step", 6)
    clock_ns[0] += 10**11
    heartbeat.beat("step", 16)
    assert read_heartbeat(heartbeat_path(shm, 0)).median_step_s == pytest.approx(0.1)
    heartbeat.close()


def test_what_a_killed_process_leaves_is_readable(shm: Path, spawn: Spawn) -> None:
    path = heartbeat_path(shm, 1)
    for _ in range(3):
        writer = spawn(WRITER, path)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        live = [read_heartbeat(path) for _ in range(50)]
        assert [beat.step for beat in live] == sorted(beat.step for beat in live)
        writer.send_signal(signal.SIGKILL)
        writer.wait(timeout=30)
        last = read_heartbeat(path)
        assert (last.pid, last.rank, last.phase) == (writer.pid, 1, "step")
        assert last.step >= live[-1].step
        assert last.median_step_s > 0


def test_a_beat_cut_off_in_the_middle_leaves_the_one_before(shm: Path) -> None:
    path = heartbeat_path(shm, 0)
    heartbeat = Heartbeat(path, rank=0)
    heartbeat.beat("step", 1)
    heartbeat.beat("step", 2)
    heartbeat.close()
    data = bytearray(path.read_bytes())
    slots = {int.from_bytes(data[at : at + 8], "little"): at for at in (64, 128)}
    newest = slots[max(slots)]
    data[newest + 40 : newest + 48] = bytes(8)
    path.write_bytes(data)
    assert read_heartbeat(path).step == 1
    data[64:] = bytes(128)
    path.write_bytes(data)
    with pytest.raises(DiagnosticsError, match="no complete beat"):
        read_heartbeat(path)


def test_misuse_is_refused(shm: Path) -> None:
    heartbeat = Heartbeat(heartbeat_path(shm, 0), rank=0)
    with pytest.raises(DiagnosticsError, match="no phase 'stepp'"):
        heartbeat.beat("stepp", 1)
    heartbeat.close()
    with pytest.raises(DiagnosticsError, match="closed"):
        heartbeat.beat("step", 1)
    with pytest.raises(DiagnosticsError, match="cannot be read"):
        read_heartbeat(heartbeat_path(shm, 9))
