"""A run that goes back to an earlier step while its own save is still on its way to storage."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from outlast.checkpoint.storage.local import LocalStore
from outlast.checkpoint.tools import list_steps, verify
from outlast.events import CheckpointSaved, Event
from tests.checkpoint.helpers import checkpointer, failed, of, save_steps
from tests.checkpoint.states import local, state


def test_a_restore_waits_for_the_runs_own_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_block, opened, reached = LocalStore.put_block, threading.Event(), threading.Event()

    def late(store: LocalStore, path: str, block: memoryview, size_bytes: int) -> None:
        if "step_00000002" in path:
            reached.set()
            assert opened.wait(60)
        put_block(store, path, block, size_bytes)

    monkeypatch.setattr(LocalStore, "put_block", late)
    events: list[Event] = []
    with checkpointer(tmp_path, events, memory_every_steps=1) as saver:
        for step in (1, 2):
            saver.save(step, replicated=state(step), local=local(step))
            saver.wait_copied()
        assert reached.wait(60)
        timer = threading.Timer(0.5, opened.set)  # storage still writes when the restore begins
        timer.start()
        back = saver.restore(1)
        assert back is not None
        saver.wait_copied()
        assert [info.step for info in list_steps(tmp_path) if info.status == "committed"] == [1]
        saver.save(3, replicated=state(3), local=local(3))
    assert failed(events) == []
    stored = [event.step for event in of(CheckpointSaved, events) if event.tier == "storage"]
    assert stored == [1, 2, 3]
    kinds = {info.folder: info.status for info in list_steps(tmp_path)}
    assert kinds["step_00000003"] == "committed"
    assert "aside" in kinds.values()
    assert verify(tmp_path, 3).ok


def test_what_this_run_has_open_is_not_cleared_away(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, attempt_id="one")
    save_steps(tmp_path, 3, attempt_id="other")
    for step in (2, 3):
        (tmp_path / f"step_{step:08d}" / "commit.json").unlink()
    with checkpointer(tmp_path, attempt_id="one") as saver:
        assert saver.restore(1) is not None
        saver.wait_copied()
        assert (tmp_path / "step_00000002").is_dir(), "may be this run's own save, in progress"
        assert not (tmp_path / "step_00000003").is_dir(), "another run's, cut off"
