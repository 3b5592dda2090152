"""A store that answers slowly, not at all, or with errors: tried again within bounds, reported, nothing is made up."""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpoint.storage import retry
from outlast.checkpoint.storage.open import open_store
from outlast.checkpoint.tools import list_steps, verify
from outlast.errors import CheckpointError, CheckpointNotFound, CorruptCheckpoint
from outlast.events import CheckpointRejected, CheckpointSaved, Event
from tests.checkpoint.crash import Expected
from tests.checkpoint.faulty import Place
from tests.checkpoint.helpers import checkpointer, failed, of, save_by_ranks, save_steps
from tests.checkpoint.recorder import Mark
from tests.checkpoint.states import local, same, state

CHUNK = "step_00000002/model/blocks.0.norm.bias/c.0"
PASSING: list[Callable[[], Exception]] = [
    lambda: OSError(errno.EIO, "Input/output error"),
    lambda: OSError(errno.EBUSY, "slow down"),
    lambda: ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    TimeoutError,
    lambda: RuntimeError("a client library's own"),
]
STAYING: list[Callable[[], Exception]] = [
    lambda: PermissionError("403: forbidden"),
    lambda: OSError(errno.EDQUOT, "Disk quota exceeded"),
    lambda: ValueError("no such storage class"),
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.0)
    place = Place(tmp_path.name)
    yield place
    place.clear()


class Failing:
    """Fails the first operations of one kind on one path."""

    def __init__(self, name: str, end: str, error: Callable[[], Exception], times: int, *, late: bool = False) -> None:
        self.calls = 0
        self._what = name, end
        self._error = error
        self._times = times
        self._late = late

    def __call__(self, name: str, path: str, do: Callable[[], Any]) -> Any:
        if name != self._what[0] or not path.endswith(self._what[1]):
            return do()
        self.calls += 1
        if self.calls > self._times:
            return do()
        if self._late:
            do()
        raise self._error()


@pytest.mark.parametrize("error", PASSING)
def test_what_passes_is_tried_again(place: Place, error: Callable[[], Exception]) -> None:
    place.around = failing = Failing("pipe_file", CHUNK, error, 4)
    save_steps(place.url, 1, 2)
    assert failing.calls == 5
    assert verify(place.url, 2).ok


@pytest.mark.parametrize("error", PASSING)
def test_but_not_for_ever(place: Place, error: Callable[[], Exception]) -> None:
    place.around = failing = Failing("pipe_file", CHUNK, error, 5)
    events: list[Event] = []
    with checkpointer(place.url, events) as saver:
        for step in (1, 2, 3):
            saver.save(step, replicated=state(step), local=local(step))
    assert failing.calls == 5
    assert [event.step for event in of(CheckpointSaved, events)] == [1, 3]
    (reason,) = failed(events)
    assert reason.startswith(
        f"ConnectionError: {place.url}/{CHUNK}: given up after 5 of 5 tries in 0.0 s, last error: "
    )
    assert type(error()).__name__ in reason
    assert [info.step for info in list_steps(place.url)] == [1, 3]


@pytest.mark.parametrize("error", STAYING)
def test_what_stays_is_not(place: Place, error: Callable[[], Exception]) -> None:
    place.around = failing = Failing("pipe_file", CHUNK, error, 1)
    events: list[Event] = []
    with checkpointer(place.url, events) as saver:
        for step in (1, 2, 3):
            saver.save(step, replicated=state(step), local=local(step))
    assert failing.calls == 1
    assert [event.step for event in of(CheckpointSaved, events)] == [1, 3]
    (reason,) = failed(events)
    assert f"{place.url}/{CHUNK}: {type(error()).__name__}: {error()}" in reason


def test_a_try_that_takes_long_is_the_last(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "RETRY_FOR_S", 0.01)

    def slow() -> Exception:
        time.sleep(0.02)
        return TimeoutError()

    place.around = failing = Failing("cat_file", "commit.json", slow, 9)
    save_steps(place.url, 1)
    with pytest.raises(CheckpointError, match=r"commit\.json: given up after 1 of 5 tries.*TimeoutError$"):
        verify(place.url)
    assert failing.calls == 1


@pytest.mark.parametrize("end", ["commit.json", "votes/rank_00000.json", "step_00000002/zarr.json"])
def test_an_answer_that_is_lost(place: Place, end: str) -> None:
    """The write is made again, and is refused because it was done: that is no other attempt."""
    place.around = failing = Failing("pipe_file", end, ConnectionResetError, 1, late=True)
    save_steps(place.url, 2)
    assert failing.calls == 2
    assert verify(place.url, 2).ok


def test_an_error_is_not_taken_for_a_missing_record(place: Place) -> None:
    """fsspec's ``isfile`` would: and a step without a record is cleared away."""
    save_steps(place.url, 1, 2)
    events: list[Event] = []
    with checkpointer(place.url, events, attempt_id="two") as reader:
        place.around = Failing("info", "step_00000002/commit.json", ConnectionResetError, 5)
        with pytest.raises(CheckpointError, match=r"cannot be listed.*step_00000002/commit\.json: given up"):
            reader.restore("auto")
        place.around = Failing("info", "step_00000002/commit.json", ConnectionResetError, 5)
        with pytest.raises(CheckpointError, match="cannot be read"):
            verify(place.url)
        back = reader.restore("auto")
    assert back is not None
    assert back.step == 2
    assert of(CheckpointRejected, events) == []


def test_an_error_is_not_taken_for_an_empty_folder(place: Place) -> None:
    """fsspec's ``find`` would: and what it does not list is not copied when a step is moved."""
    save_steps(place.url, 1)
    store = open_store(place.url)
    place.around = Failing("ls", "step_00000001/model", ConnectionResetError, 5)
    with pytest.raises(ConnectionError):
        store.move_tree("step_00000001", "step_00000001.replaced")
    assert verify(place.url, 1).ok


@pytest.mark.parametrize("error", [ConnectionResetError, PermissionError])
def test_an_error_is_not_taken_for_damage(place: Place, error: Callable[[], Exception]) -> None:
    save_steps(place.url, 1, 2)
    events: list[Event] = []
    with checkpointer(place.url, events, attempt_id="two") as reader:
        for end in ("model/blocks.0.norm.bias/c.0", "step_00000002/zarr.json", "votes/rank_00000.json", "commit.json"):
            place.around = Failing("cat_file", end, error, 5)
            with pytest.raises(CheckpointError, match=rf"step_00000002.*{error.__name__}"):
                reader.restore("auto")
            place.around = lambda name, path, do: do()
        back = reader.restore("auto")
    assert back is not None
    assert back.step == 2
    assert of(CheckpointRejected, events) == []


def test_a_store_that_cannot_refuse(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """It says so, and looks before it writes."""
    place.conditional = False
    with caplog.at_level(logging.WARNING, "outlast.checkpoint"):
        save_steps(place.url, 1)
    assert "cannot create a file exclusively" in caplog.text
    store = open_store(place.url)
    store.prepare()
    store.put_new("file", b"one")
    store.put_new("file", b"one")
    with pytest.raises(FileExistsError):
        store.put_new("file", b"two")
    assert bytes(store.read("file")) == b"one"
    assert store.names("") == ["file", "step_00000001"]


class Weather:
    """Delays, errors before or after the deed, outages (some of them mute: things are done, no answer comes)."""

    def __init__(self, place: Place, seed: int) -> None:
        self._rng = random.Random(seed)
        self._place = place
        self._passing = self._rng.choice((0.0, 0.05, 0.2))
        self._outage = self._rng.choice((0.0, 0.005, 0.02))
        self._staying = self._rng.choice((0.0, 0.005, 0.02))
        self._left = 0
        self._mute = False
        place.around = self

    def __call__(self, name: str, path: str, do: Callable[[], Any]) -> Any:
        rng = self._rng
        with self._place.lock:
            if not self._left and rng.random() < self._outage:
                self._left, self._mute = rng.randrange(1, 40), rng.random() < 0.5
            luck, late, slow, error = rng.random(), rng.random() < 0.5, rng.random() < 0.02, rng.choice(PASSING)()
            staying = rng.choice(STAYING[:2])()
            down = self._left > 0
            self._left -= down
        if slow:
            time.sleep(0.001)
        if down:
            if self._mute:
                do()
            raise error
        if luck < self._passing:
            if late:
                do()
            raise error
        if luck < self._passing + self._staying:
            raise staying
        return do()


def _attempt(place: Place, attempt_id: str, expected: Expected) -> Expected:
    """One process: restores what it can, saves that step anew and two more."""
    events: list[Event] = []
    try:
        with checkpointer(place.url, events, attempt_id=attempt_id, keep_last=2, pack_below_kb=16.0) as saver:
            back = saver.restore("auto")
            expected = _judge(back, expected)
            first = 1 if back is None else back.step
            for step in (first, first + 1, first + 2):
                expected = expected.after(Mark("begin", step, attempt_id))
                saver.save(step, replicated={**state(step), "version": attempt_id}, local=local(step))
                saver.wait_copied()
                assert saver._saving is not None
                saver._saving.join()
                if [event.step for event in of(CheckpointSaved, events)][-1:] == [step]:
                    expected = expected.after(Mark("acked", step, attempt_id))
                else:
                    assert place.url in failed(events)[-1]
    except (CorruptCheckpoint, CheckpointNotFound) as error:
        raise AssertionError(f"nothing is damaged: {error}") from error
    except CheckpointError as error:
        print(error)  # the storage's
    damaged = [event.reason for event in of(CheckpointRejected, events) if event.reason[:7] in ("Corrupt", "Incompl")]
    assert damaged == []
    return expected


def _judge(back: Any, expected: Expected) -> Expected:
    if back is None:
        assert expected.nothing, expected
        return expected.after(Mark("nothing", -1, ""))
    found = back.step, back.replicated["version"]
    assert found in expected.allowed
    assert same(back.replicated, {**state(back.step), "version": found[1]})
    assert same(back.local, local(back.step))
    return expected.after(Mark("restored", *found))


def _sweep(place: Place, seeds: range) -> None:
    for seed in seeds:
        Weather(place, seed)
        expected = Expected()
        try:
            for number in range(4):
                expected = _attempt(place, f"attempt-{number}", expected)
            place.around = lambda name, path, do: do()
            with checkpointer(place.url, attempt_id="judge") as reader:
                _judge(reader.restore("auto"), expected)
            for info in list_steps(place.url):
                if info.status == "committed":
                    assert verify(place.url, info.step).ok
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        place.clear()


def test_whatever_the_weather_acknowledged_steps_are_found(place: Place) -> None:
    _sweep(place, range(40))


@pytest.mark.slow
def test_much_weather(place: Place) -> None:
    _sweep(place, range(1000, 1100))


def test_no_step_of_several_ranks_is_committed_in_part(place: Place) -> None:
    saved = 0
    for seed in range(8):
        Weather(place, seed)
        with suppress(CheckpointError):  # the place could not be written at the start
            saved += len(of(CheckpointSaved, save_by_ranks(place.url, 1, 2, 3, world_size=2, commit_timeout_s=2.0)[0]))
        place.around = lambda name, path, do: do()
        for info in list_steps(place.url):
            if info.status == "committed":
                assert verify(place.url, info.step).ok
        place.clear()
    assert saved
