"""Garbage collection, data and compilation in a real process, each told once it happens, and not otherwise."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from outlast.diagnostics.live.step_delays import StepDelays, elements_of
from outlast.events import EventLog, Record, read_events
from tests.helpers import clean_env


class Slow(Dataset[torch.Tensor]):
    """Rows of 6 elements, each of which takes a while."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        time.sleep(self.seconds)
        return torch.zeros(6)


class Nested(IterableDataset[torch.Tensor]):
    """Reads from a loader of its own."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from DataLoader(Slow(0.01), batch_size=None)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EventLog]:
    with EventLog(tmp_path / "rank_00000.jsonl", rank=0) as log:
        yield log


def told(log: EventLog) -> list[Record]:
    return list(read_events(log.path))


def test_collections_of_a_step_are_told_and_a_step_without_them_is_not(log: EventLog) -> None:
    before = list(gc.callbacks)
    delays = StepDelays(log)
    delays.open()
    alive = [[one] for one in range(20_000)]
    delays.forget()
    gc.disable()  # what others leave on this machine's heap is collected in its own time
    try:
        began_s = time.perf_counter()
        while time.perf_counter() - began_s < 0.05:
            gc.collect()
        first = delays.end_step(1, None)
        second = delays.end_step(2, 0.1)
    finally:
        gc.enable()
        delays.close()
    (one,) = told(log)
    assert (one.kind, one["step"], one["what"], one["generation_collected"]) == (
        "rank_delay",
        1,
        "garbage_collection",
        2,
    )
    assert one["seconds"] == pytest.approx(first.gc_s, abs=1e-5)
    assert one["count"] >= 1
    assert second.gc_s == 0
    assert gc.callbacks == before
    gc.collect()
    assert len(alive) == 20_000
    assert delays.end_step(3, 0.1).gc_s == 0, "closed"


def test_a_share_of_the_step_that_is_small_is_not_told(log: EventLog) -> None:
    delays = StepDelays(log)
    delays.open()
    next(iter(DataLoader(Slow(0.01), batch_size=1)))
    totals = delays.end_step(1, 10.0)
    delays.close()
    assert totals.data_s >= 0.01
    assert not told(log)


def test_time_in_loaders_is_told_with_the_size_of_the_batches(log: EventLog) -> None:
    original = _BaseDataLoaderIter.__next__
    delays = StepDelays(log)
    delays.open()
    delays.open()
    batches = iter(DataLoader(Slow(0.01), batch_size=2))
    next(batches)
    next(batches)
    first = delays.end_step(1, 0.05)
    assert first.data_s >= 0.04
    assert first.batch_elements == 24
    second = delays.end_step(2, 0.05)
    assert (second.data_s, second.batch_elements) == (0.0, None)
    with torch.no_grad():
        next(batches)
    evaluated = delays.end_step(3, 0.05)
    assert evaluated.data_s >= 0.02
    assert evaluated.batch_elements is None, "what is evaluated is no work"
    delays.close()
    delays.close()
    assert _BaseDataLoaderIter.__next__ is original
    assert [(one["step"], one["what"]) for one in told(log)] == [(1, "data_wait"), (3, "data_wait")]


def test_a_loader_inside_a_loader_is_not_counted_twice_and_its_end_is_the_programs(log: EventLog) -> None:
    delays = StepDelays(log)
    delays.open()
    began_s = time.perf_counter()
    rows = list(DataLoader(Nested(), batch_size=4))
    took_s = time.perf_counter() - began_s
    totals = delays.end_step(1, took_s)
    delays.close()
    assert len(rows) == 2
    assert 0.08 <= totals.data_s <= took_s
    assert totals.batch_elements == 48


def test_a_thread_that_loads_ahead_is_no_wait_of_the_one_that_trains(log: EventLog) -> None:
    delays = StepDelays(log)
    delays.open()
    ahead = threading.Thread(target=lambda: list(DataLoader(Slow(0.005), batch_size=4)))
    ahead.start()
    ahead.join()
    totals = delays.end_step(1, 0.01)
    delays.close()
    assert (totals.data_s, totals.batch_elements) == (0.0, 48)
    assert not told(log)


def test_worker_processes_of_a_loader_are_waited_for(log: EventLog) -> None:
    delays = StepDelays(log)
    delays.open()
    rows = list(DataLoader(Slow(0.01), batch_size=4, num_workers=1, multiprocessing_context="fork"))
    totals = delays.end_step(1, 0.1)
    delays.close()
    assert len(rows) == 2
    assert totals.data_s >= 0.04
    assert totals.batch_elements == 48


def test_what_somebody_else_has_wrapped_meanwhile_stays(log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    original = _BaseDataLoaderIter.__next__
    delays = StepDelays(log)
    delays.open()
    ours = _BaseDataLoaderIter.__next__
    monkeypatch.setattr(_BaseDataLoaderIter, "__next__", lambda self: ours(self))
    delays.close()
    assert _BaseDataLoaderIter.__next__ is not original
    assert len(list(DataLoader(Slow(0.0), batch_size=4))) == 2
    assert delays.end_step(1, 0.1).data_s == 0
    monkeypatch.undo()
    _BaseDataLoaderIter.__next__ = original  # type: ignore[method-assign]


def test_two_at_once_each_count_and_leave_nothing(tmp_path: Path, log: EventLog) -> None:
    original = _BaseDataLoaderIter.__next__
    with EventLog(tmp_path / "other.jsonl", rank=0) as other:
        outer, inner = StepDelays(log), StepDelays(other)
        outer.open()
        inner.open()
        next(iter(DataLoader(Slow(0.0), batch_size=4)))
        assert (outer.end_step(1, 1.0).batch_elements, inner.end_step(1, 1.0).batch_elements) == (24, 24)
        inner.close()
        outer.close()
    assert _BaseDataLoaderIter.__next__ is original


@pytest.mark.slow
def test_compilations_are_told_also_after_the_compiler_was_reset(log: EventLog) -> None:
    delays = StepDelays(log)
    delays.open()

    def compiled(numbers: torch.Tensor) -> torch.Tensor:
        for _ in range(50):
            numbers = numbers * 2 + 1
        return numbers

    function = torch.compile(compiled, backend="eager")
    function(torch.ones(2))
    assert delays.end_step(1, None).compile_s > 0
    function(torch.ones(2))
    assert delays.end_step(2, 0.1).compile_s == 0, "it was compiled before"
    torch._dynamo.reset()
    delays.end_step(3, 0.1)
    function(torch.ones(2))
    assert delays.end_step(4, 0.1).compile_s > 0
    delays.close()
    torch._dynamo.reset()
    function(torch.ones(2))
    assert delays.end_step(5, 0.1).compile_s == 0, "closed"
    handler = torch._dynamo.callback.callback_handler
    assert not handler.start_callbacks
    assert {one["step"] for one in told(log)} == {1, 4}
    assert {one["what"] for one in told(log)} <= {"compile", "garbage_collection"}


def test_elements_of_a_batch() -> None:
    tensor = torch.zeros(3, 4)
    batch = {"input_ids": tensor, "more": [tensor, (tensor, "text")], "count": 5, "none": None}
    assert elements_of(batch, torch.Tensor) == 36
    assert elements_of("text", torch.Tensor) == 0
    endless: list[object] = []
    endless.append(endless)
    assert elements_of(endless, torch.Tensor) == 0
    assert elements_of([tensor] * 100_000, torch.Tensor) <= 12 * 10_000


def test_torch_is_not_imported_for_it(tmp_path: Path) -> None:
    code = f"""
import sys
from outlast.diagnostics.live.step_delays import StepDelays
from outlast.events import EventLog
paths = list(sys.meta_path)
with EventLog({str(tmp_path / "e.jsonl")!r}, rank=0) as log:
    delays = StepDelays(log)
    delays.open()
    delays.end_step(1, 0.1)
    delays.close()
assert sys.meta_path == paths and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=clean_env())
