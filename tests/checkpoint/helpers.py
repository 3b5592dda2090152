"""What the tests of checkpoints share: a Checkpointer of one rank, saves, outcomes."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from outlast.checkpoint import CheckpointConfig, Checkpointer
from outlast.errors import NotDurable
from outlast.events import CheckpointFailed, CheckpointRejected, CheckpointRestored, CheckpointSaved, Event
from tests.checkpoint.states import local, same, state

E = TypeVar("E", bound=Event)
QUICK = CheckpointConfig(commit_timeout_s=60.0, keep_last=0, io_threads=2, pack_below_kb=0, old_steps="keep")
"""Nothing is packed, so that every tensor is a file whose path tells which it is. A test may save in a used place."""


class ToldByEvents(Checkpointer):
    """A Checkpointer of a test that looks at the events: closing it raises nothing for a save that has failed."""

    def close(self) -> None:
        with suppress(NotDurable):
            super().close()


def checkpointer(
    url: Path | str,
    events: list[Event] | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
    attempt_id: str = "one",
    **settings: Any,
) -> Checkpointer:
    """A Checkpointer without a process group."""
    on_event = (lambda event: None) if events is None else events.append
    config = replace(QUICK, **settings)
    return ToldByEvents(url, config, rank=rank, world_size=world_size, attempt_id=attempt_id, on_event=on_event)


def save_steps(url: Path | str, *steps: int, attempt_id: str = "one", **settings: Any) -> list[Event]:
    """Save some steps by one rank; all must be committed."""
    events: list[Event] = []
    with checkpointer(url, events, attempt_id=attempt_id, **settings) as saver:
        for step in steps:
            saver.save(step, replicated=state(step), local=local(step))
    assert [event.step for event in of(CheckpointSaved, events)] == list(steps)
    return events


def save_by_ranks(
    url: Path | str, *steps: int, world_size: int, attempt_id: str = "one", **settings: Any
) -> list[list[Event]]:
    """Save some steps by several ranks in this one process; the events of each, by rank."""
    events: list[list[Event]] = [[] for _ in range(world_size)]
    ranks = [
        checkpointer(url, events[rank], rank=rank, world_size=world_size, attempt_id=attempt_id, **settings)
        for rank in range(world_size)
    ]
    for step in steps:
        for rank, saver in enumerate(ranks):
            saver.save(step, replicated=state(step), local=local(step, rank))
        for saver in ranks:
            saver.wait_copied()
    for saver in ranks:
        saver.close()
    return events


def save_and_join(saver: Checkpointer, step: int, replicated: dict[str, Any]) -> None:
    """Save and wait for the outcome, whatever it is."""
    saver.save(step, replicated=replicated, local=local(step))
    saver.wait_copied()
    assert saver._saving is not None
    saver._saving.join()


def before(
    monkeypatch: pytest.MonkeyPatch, kind: type, operation: str, when: Callable[[str], bool], do: Callable[[], Any]
) -> None:
    """Do something once, right before the first operation of a kind on such a path, in the thread that runs it."""
    real = getattr(kind, operation)
    lock, done = threading.Lock(), list[str]()

    def wrapped(store: Any, path: str, *args: Any) -> Any:
        with lock:
            first = not done and when(path)
            if first:
                done.append(path)
        if first:
            do()
        return real(store, path, *args)

    monkeypatch.setattr(kind, operation, wrapped)


def restored_by_one(
    url: Path, settings: dict[str, Any], *, which: Any = "auto", attempt_id: str = "second", into: bool = False
) -> tuple[int | None, list[Event]]:
    """What one rank finds, in tensors of its own or in those that are there; its state must be right."""
    events: list[Event] = []
    with checkpointer(url, events, attempt_id=attempt_id, **settings) as one:
        back = one.restore(which, into=state(99) if into else None)
        if back is None:
            one.wait_copied()
            return None, events
        assert same(back.replicated, state(back.step))
        assert same(back.local, local(back.step))
        assert same(back.read_local(0), back.local)
        one.wait_copied()  # the run goes on from there
        return back.step, events


def tiers_taken(events: list[Event]) -> set[str]:
    """The tiers that one restore took from."""
    (event,) = of(CheckpointRestored, events)
    return set(event.tiers)


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[None]:
    """A file system of that size at a folder; needs root."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def of(kind: type[E], events: list[Event]) -> list[E]:
    """The events of one kind."""
    return [event for event in events if isinstance(event, kind)]


def rejected(events: list[Event]) -> list[tuple[int, str]]:
    """Step and file of what was rejected."""
    return [(event.step, event.file) for event in of(CheckpointRejected, events)]


def failed(events: list[Event]) -> list[str]:
    """Why saves failed."""
    return [event.reason for event in of(CheckpointFailed, events)]
