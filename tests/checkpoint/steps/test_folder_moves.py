"""Where folders are moved object by object: a process that ends between any two operations loses no step.

Each operation on an object is atomic and durable once done, so that what may be left is what a prefix of them leaves.
All prefixes of saves, saves anew, and going back are laid out and restored from; and those of some of these restores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpoint import CheckpointConfig, Checkpointer
from outlast.checkpoint.format.names import COMMIT
from outlast.checkpoint.storage.fsspec import FsspecStore
from outlast.events import CheckpointSaved, Event
from tests.checkpoint.crash import Expected
from tests.checkpoint.faulty import CHANGES, Place
from tests.checkpoint.recorder import Mark
from tests.checkpoint.states import local, same, state

CONFIG = CheckpointConfig(keep_last=2, io_threads=2)
"""Everything packed: a handful of objects a step."""

Files = dict[str, bytes]


class Record:
    """What lay at a place after each of the operations on it, and what might be restored then."""

    def __init__(self, place: Place, expected: Expected | None = None) -> None:
        self.states: list[tuple[Files, Expected]] = []
        self.expected = expected or Expected()
        self._place = place
        place.around = self._around

    def mark(self, what: str, step: int = -1, version: str = "") -> None:
        """Log what the program said or asked for."""
        with self._place.lock:
            self.expected = self.expected.after(Mark(what, step, version))
            self.states.append((self._place.files(), self.expected))

    def _around(self, name: str, path: str, do: Callable[[], Any]) -> Any:
        with self._place.lock:
            result = do()
            if name in CHANGES:
                self.states.append((self._place.files(), self.expected))
            return result


def content(step: int, version: str) -> dict[str, Any]:
    return {**state(step), "version": version}


def attempt(place: Place, record: Record | None, attempt_id: str) -> Checkpointer:
    def on_event(event: Event) -> None:
        if record is not None and isinstance(event, CheckpointSaved):
            record.mark("acked", event.step, attempt_id)

    return Checkpointer(place.url, CONFIG, rank=0, world_size=1, attempt_id=attempt_id, on_event=on_event)


def save(saver: Checkpointer, record: Record, step: int, version: str) -> None:
    record.mark("begin", step, version)
    saver.save(step, replicated=content(step, version), local=local(step))
    saver.wait_copied()
    assert saver._saving is not None
    saver._saving.join()


def restored(place: Place) -> tuple[int, str] | None:
    """What a fresh process finds."""
    with attempt(place, None, "judge") as reader:
        back = reader.restore("auto")
        reader.wait_copied()  # it goes on from there
    if back is None:
        return None
    version = back.replicated["version"]
    assert same(back.replicated, content(back.step, version))
    assert same(back.local, local(back.step))
    return back.step, version


def violation(place: Place, files: Files, expected: Expected) -> str | None:
    place.around = lambda name, path, do: do()
    place.fill(files)
    found = restored(place)
    if found is None:
        return None if expected.nothing else f"nothing found, expected {expected.allowed}"
    return None if found in expected.allowed else f"found {found}, expected {expected.allowed}"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path.name)
    yield place
    place.clear()


def run(place: Place) -> list[tuple[Files, Expected]]:
    record = Record(place)
    with attempt(place, record, "one") as saver:
        save(saver, record, 1, "one")
        save(saver, record, 2, "one")
    with attempt(place, record, "two") as saver:
        assert saver.restore("auto") is not None
        saver.wait_copied()
        record.mark("restored", 2, "one")
        save(saver, record, 2, "two")
    with attempt(place, record, "three") as saver:
        record.mark("back", 1, "one")
        saver.restore(1)
        saver.wait_copied()
        record.mark("restored", 1, "one")
        save(saver, record, 2, "three")
        save(saver, record, 3, "three")
    assert record.expected.allowed == ((3, "three"),)
    return record.states


def test_no_step_is_lost_between_two_operations(place: Place) -> None:
    states = run(place)
    assert len(states) > 80
    wrong = [
        f"{n}: {found}" for n, (files, expected) in enumerate(states) if (found := violation(place, files, expected))
    ]
    assert wrong == []


def test_nor_between_two_operations_of_the_restore_after(place: Place) -> None:
    states = [(files, expected) for files, expected in run(place) if any(".replaced/" in path for path in files)]
    seen = 0
    for files, expected in states[::6]:
        place.fill(files)
        again = Record(place, expected)
        restored(place)
        seen += len(again.states)
        for files_then, _ in again.states[::2]:
            assert violation(place, files_then, expected) is None
    assert seen > 50


def test_moving_one_object_after_the_other_is_found_to_lose_steps(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_by_one(store: FsspecStore, old: str, new: str) -> None:
        record = bytes(store.read(f"{old}/{COMMIT}"))
        store.remove(f"{old}/{COMMIT}")
        for name in store.sizes(old):
            store.put(f"{new}/{name}", [bytes(store.read(f"{old}/{name}"))])
            store.remove(f"{old}/{name}")
        store.put(f"{new}/{COMMIT}", [record])

    with monkeypatch.context() as patch:
        patch.setattr(FsspecStore, "move_tree", one_by_one)
        states = run(place)
    assert any(violation(place, files, expected) for files, expected in states)
