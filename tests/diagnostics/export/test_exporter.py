"""Exporters that are slow or fail: the others do not notice, and what is lost is counted and told."""

from __future__ import annotations

import threading
import time
from collections import Counter

import pytest

from outlast.diagnostics.export.exporter import Queued
from outlast.diagnostics.export.scalars import RETRY_S, TrackerExporter
from outlast.events import Record
from tests.diagnostics.export.node import STEP, record


class Slow:
    """Takes one event, and no more until it is let go."""

    name = "slow"

    def __init__(self) -> None:
        self.go = threading.Event()
        self.taken: list[float] = []
        self.closed = False

    def take(self, attempt: int, record: Record) -> None:
        self.go.wait(30)
        self.taken.append(record.t)

    def close(self) -> None:
        self.closed = True


def test_what_has_no_room_is_dropped_and_counted_and_nobody_waits(caplog: pytest.LogCaptureFixture) -> None:
    slow, lost = Slow(), Counter[tuple[str, str]]()
    queued = Queued(slow, 5, lambda counter, name: lost.update([(counter, name)]))
    for t in range(1000):
        queued.take(1, record(float(t), "step"))
    dropped = lost["dropped_records", "slow"]
    assert dropped in (994, 995), "five wait, and one may be under way"
    assert sum("events wait already" in one.getMessage() for one in caplog.records) == 1
    slow.go.set()
    queued.close(30)
    assert slow.closed
    assert len(slow.taken) == 1000 - dropped
    assert slow.taken[:5] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert f"{dropped} events were dropped" in caplog.text


def test_one_that_hangs_is_left_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    slow = Slow()
    queued = Queued(slow, 5, lambda counter, name: None)
    for t in range(3):
        queued.take(1, record(float(t), "step"))
    queued.close(0.1)
    assert "because it takes too long" in caplog.text
    slow.go.set()


class Failing:
    """Refuses events of even steps."""

    name = "failing"

    def take(self, attempt: int, record: Record) -> None:
        if record["step"] % 2 == 0:
            raise OSError("no space left")

    def close(self) -> None:
        raise ConnectionError("gone")


def test_what_fails_is_counted_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    lost = Counter[tuple[str, str]]()
    queued = Queued(Failing(), 100, lambda counter, name: lost.update([(counter, name)]))
    for step in range(50):
        queued.take(1, record(1.0, "step", step=step))
    queued.close(30)
    assert lost == {("failures", "failing"): 25}
    assert caplog.text.count("no space left") == 1
    assert "ConnectionError at the end" in caplog.text


def test_a_tracker_that_cannot_be_opened_is_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def refuse() -> None:
        tries.append(1)
        raise ConnectionError("no route")

    exporter = TrackerExporter("wandb", 0.0, refuse)  # type: ignore[arg-type]
    exporter.take(1, record(1.0, "step", 1, step=1, **STEP))
    assert not tries, "rank 1 is no reason to open it"
    for _ in range(3):
        with pytest.raises(ConnectionError):
            exporter.take(1, record(1.0, "step", 0, step=1, **STEP))
    assert len(tries) == 1
    now_s = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now_s + RETRY_S + 1)
    with pytest.raises(ConnectionError):
        exporter.take(1, record(1.0, "step", 0, step=1, **STEP))
    assert len(tries) == 2
