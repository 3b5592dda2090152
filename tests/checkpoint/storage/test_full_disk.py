"""A real disk that is too small: found before anything is written, old checkpoints make room, training goes on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from outlast.checkpoint.tools import list_steps, verify
from outlast.events import CheckpointSaved, Event
from tests.checkpoint.damage import files_of, flip, steps_at
from tests.checkpoint.helpers import checkpointer, failed, of, small_disk
from tests.checkpoint.states import same

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """2 MiB."""
    place = tmp_path / "disk"
    with small_disk(place, "2m"):
        yield place


def weights(step: int, kb: int = 500) -> dict[str, Any]:
    return {"model": {"w": torch.full((kb * 250,), float(step))}, "step": step}


def test_old_checkpoints_make_room_for_new_ones(disk: Path) -> None:
    events: list[Event] = []
    with checkpointer(disk, events) as saver:
        for step in range(1, 8):
            saver.save(step, replicated=weights(step), local={})
            saver.wait_copied()
        back = saver.restore("auto")
    assert failed(events) == []
    assert [event.step for event in of(CheckpointSaved, events)] == [1, 2, 3, 4, 5, 6, 7]
    assert 2 <= len(steps_at(disk)) <= 4
    assert back is not None
    assert same(back.replicated, weights(7))


def test_the_newest_that_verifies_is_kept_though_a_newer_one_is_there(disk: Path) -> None:
    events: list[Event] = []
    with checkpointer(disk, events) as saver:
        for step in (1, 2, 3):
            saver.save(step, replicated=weights(step), local={})
            saver.wait_copied()
        saver.save(4, replicated={}, local={})  # until here is everything durable
        saver.wait_copied()
        saver._finish()
        flip(disk / "step_00000003" / "model" / "w" / "c.0")
        flip(disk / "step_00000004" / "zarr.json")
        saver.save(5, replicated=weights(5, 900), local={})
    assert failed(events) == []
    assert [info.step for info in list_steps(disk)] == [2, 3, 4, 5]
    assert verify(disk, 2).ok
    assert verify(disk, 5).ok


def test_a_checkpoint_that_is_larger_than_the_disk(disk: Path) -> None:
    events: list[Event] = []
    with checkpointer(disk, events) as saver:
        saver.save(1, replicated=weights(1), local={})
        saver.wait_copied()
        saver.save(2, replicated=weights(2, 4000), local={})
        saver.wait_copied()
        saver.save(3, replicated=weights(3), local={})
    (reason,) = failed(events)
    assert "needs 40" in reason
    assert [event.step for event in of(CheckpointSaved, events)] == [1, 3]
    assert verify(disk, 1).ok
    assert verify(disk, 3).ok
    assert not [name for name in files_of(disk) if "step_00000002/" in name]


def test_a_disk_that_fills_up_meanwhile(disk: Path) -> None:
    events: list[Event] = []
    with checkpointer(disk, events) as saver:
        saver.save(1, replicated=weights(1), local={})
        saver._finish()
        store = saver._store
        room = type(store).free_bytes
        try:
            type(store).free_bytes = lambda self: None  # type: ignore[method-assign]
            saver.save(2, replicated=weights(2, 1900), local={})
            saver.wait_copied()
            saver._finish()
        finally:
            type(store).free_bytes = room  # type: ignore[method-assign]
        saver.save(3, replicated=weights(3), local={})
    assert "No space left" in failed(events)[0]
    assert [event.step for event in of(CheckpointSaved, events)] == [1, 3]
    assert verify(disk, 1).ok
