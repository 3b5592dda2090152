"""The two-phase commit: what counts, what does not, and in which order things become durable."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from outlast.checkpoint.format.names import vote_path
from outlast.checkpoint.format.records import Vote, seal, unseal_vote
from outlast.checkpoint.storage.local import LocalStore
from outlast.checkpoint.tools import list_steps, verify
from outlast.errors import CheckpointError
from outlast.events import CheckpointSaved, Event
from tests.checkpoint.damage import files_of, steps_at
from tests.checkpoint.helpers import checkpointer, failed, of, rejected, save_by_ranks, save_steps
from tests.checkpoint.states import local, same, state


def test_three_ranks_commit(tmp_path: Path) -> None:
    events = save_by_ranks(tmp_path, 1, 2, world_size=3)
    for rank, seen in enumerate(events):
        assert failed(seen) == []
        assert [(e.step, e.committed) for e in of(CheckpointSaved, seen)] == [(1, rank == 0), (2, rank == 0)]
    assert steps_at(tmp_path) == ["step_00000001", "step_00000002"]
    checked = verify(tmp_path)
    assert checked.ok
    assert checked.step == 2
    # Every file but the votes and the record is in exactly one vote.
    assert checked.files == len(files_of(tmp_path / "step_00000002")) - 4
    (_, newest) = list_steps(tmp_path)
    assert (newest.status, newest.world_size) == ("committed", 3)
    assert (
        newest.size_bytes
        == checked.size_bytes
        == sum(e[1].size_bytes for e in (of(CheckpointSaved, s) for s in events))
    )


def test_a_rank_that_does_not_vote(tmp_path: Path) -> None:
    save_by_ranks(tmp_path, 1, world_size=2)
    events: list[Event] = []
    with checkpointer(tmp_path, events, world_size=2, attempt_id="two", commit_timeout_s=0.3) as alone:
        alone.save(2, replicated=state(2), local=local(2))
        alone.wait_copied()
    assert len(failed(events)) == 1
    assert "rank 1" in failed(events)[0]
    assert [info.status for info in list_steps(tmp_path)] == ["committed", "uncommitted"]
    assert files_of(tmp_path / "step_00000002") == []


def test_a_rank_whose_coordinator_does_not_open_the_save(tmp_path: Path) -> None:
    events: list[Event] = []
    with checkpointer(tmp_path, events, rank=1, world_size=2, commit_timeout_s=0.3) as alone:
        alone.save(2, replicated=state(2), local=local(2))
    assert "rank 0 did not open" in failed(events)[0]
    assert not (tmp_path / "step_00000002").exists()


@pytest.mark.parametrize("stale", ["epoch", "serial"])
def test_a_vote_of_another_save_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stale: str) -> None:
    # Rank 1's vote of an earlier save arrives while rank 0 waits: all files it lists are there.
    old = Vote(2, 1, 2, "zero" if stale == "epoch" else "one", 1 if stale == "epoch" else 7, "", ())
    events: list[Event] = []
    put_atomic = LocalStore.put_atomic

    def with_stale_vote(store: LocalStore, path: str, data: bytes) -> None:
        put_atomic(store, path, data)
        if path == vote_path(2, 0):
            put_atomic(store, vote_path(2, 1), seal(old))

    monkeypatch.setattr(LocalStore, "put_atomic", with_stale_vote)
    with checkpointer(tmp_path, events, world_size=2, commit_timeout_s=0.3) as alone:
        alone.save(2, replicated=state(2), local=local(2))
    assert "rank 1 (a vote of another save" in failed(events)[0]
    assert not (tmp_path / "step_00000002" / "commit.json").exists()


def test_saving_a_step_again_after_a_cut_off_save(tmp_path: Path) -> None:
    events: list[Event] = []
    with checkpointer(tmp_path, events, world_size=2, commit_timeout_s=0.3) as alone:
        alone.save(2, replicated={"model": {"left over": torch.ones(3)}}, local={})
        alone.wait_copied()
    # What a killed rank leaves, as far as it came.
    folder = tmp_path / "step_00000002"
    for path in ("model/stale/c.0", "rank_00001/stale/zarr.json", "votes/rank_00001.json", "zarr.json"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"{}")
    save_by_ranks(tmp_path, 2, world_size=2, attempt_id="two")
    assert not [file for file in files_of(folder) if "stale" in file or "left over" in file]
    assert verify(tmp_path, 2).ok


def test_saving_a_step_twice(tmp_path: Path) -> None:
    save_steps(tmp_path, 2)
    events: list[Event] = []
    with checkpointer(tmp_path, events, attempt_id="two") as saver:
        saver.save(2, replicated=state(5), local=local(2))
        saver.wait_copied()
        saver.save(2, replicated=state(6), local=local(2))
        back = saver.restore(2)
    assert back is not None
    assert same(back.replicated, state(5))
    assert rejected(events) == [(2, "")]
    assert steps_at(tmp_path) == ["step_00000002", "step_00000002.aside-1"]
    assert ["already saved and committed step" in reason for reason in failed(events)] == [True]


def test_saving_a_step_again_that_fails_brings_the_old_one_back(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    with checkpointer(tmp_path, [], world_size=2, attempt_id="two", commit_timeout_s=0.1) as alone:
        alone.save(2, replicated=state(5), local=local(2))
    assert [info.status for info in list_steps(tmp_path)] == ["committed", "uncommitted", "aside"]
    with checkpointer(tmp_path, [], attempt_id="three") as saver:
        back = saver.restore("auto")
        assert back is not None
        assert back.step == 2
        assert same(back.replicated, state(2))
        assert steps_at(tmp_path)[:2] == ["step_00000001", "step_00000002"]


def test_one_rank_that_fails_releases_the_others_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = LocalStore.put

    def full(store: LocalStore, path: str, parts: Sequence[Any]) -> None:
        if "step_00000001/rank_00001" in path:
            raise OSError(28, "No space left on device")
        put(store, path, parts)

    monkeypatch.setattr(LocalStore, "put", full)
    # With nobody to tell them, the others would wait for 10 minutes.
    events = save_by_ranks(tmp_path, 1, 2, 3, 4, world_size=3, commit_timeout_s=600.0)
    assert "another rank gave up" in failed(events[0])[0]
    assert "No space left" in failed(events[1])[0]
    # Rank 2 may hear of it before it has written, or have voted by then.
    assert all("another rank gave up" in reason for reason in failed(events[2]))
    for seen in events:
        assert [event.step for event in of(CheckpointSaved, seen)][-3:] == [2, 3, 4]
    assert steps_at(tmp_path) == ["step_00000002", "step_00000003", "step_00000004"]


def test_a_coordinator_that_fails_releases_the_others_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_atomic = LocalStore.put_atomic

    def full(store: LocalStore, path: str, data: bytes) -> None:
        if path == "step_00000001/zarr.json":
            raise OSError(28, "No space left on device")
        put_atomic(store, path, data)

    monkeypatch.setattr(LocalStore, "put_atomic", full)
    events = save_by_ranks(tmp_path, 1, 2, world_size=2, commit_timeout_s=600.0)
    assert "No space left" in failed(events[0])[0]
    assert "another rank gave up" in failed(events[1])[0]
    assert [info.step for info in list_steps(tmp_path)] == [2]


def test_a_file_that_vanishes_before_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_atomic = LocalStore.put_atomic

    def losing(store: LocalStore, path: str, data: bytes) -> None:
        put_atomic(store, path, data)
        if path == vote_path(1, 0):
            (tmp_path / "step_00000001" / "model" / "zarr.json").unlink()

    monkeypatch.setattr(LocalStore, "put_atomic", losing)
    events: list[Event] = []
    with checkpointer(tmp_path, events) as saver:
        saver.save(1, replicated=state(1), local=local(1))
    assert "model/zarr.json" in failed(events)[0]
    assert not (tmp_path / "step_00000001" / "commit.json").exists()


def test_retention(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 3, 4, keep_last=2)
    assert steps_at(tmp_path) == ["step_00000003", "step_00000004"]
    save_steps(tmp_path, 5, attempt_id="two", keep_last=1)
    assert steps_at(tmp_path) == ["step_00000005"]
    save_steps(tmp_path, 6, 7, attempt_id="three", keep_last=0)
    assert steps_at(tmp_path) == ["step_00000005", "step_00000006", "step_00000007"]


def test_pruning_that_is_cut_off_leaves_nothing_that_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(tmp_path, 1)
    gone: list[bool] = []

    def stopped(path: str, **_: Any) -> None:
        gone.append(not os.path.exists(f"{path}/commit.json"))
        raise OSError(5, "the machine died here")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", stopped)
        save_steps(tmp_path, 2, attempt_id="two", keep_last=1)
    assert gone == [True]
    assert [info.status for info in list_steps(tmp_path)] == ["uncommitted", "committed"]


def test_a_bug_in_the_background_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(store: LocalStore, paths: Any) -> None:
        raise ZeroDivisionError("a bug")

    events: list[Event] = []
    saver = checkpointer(tmp_path, events)
    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "sync_dirs", broken)
        saver.save(1, replicated=state(1), local={})
        with pytest.raises(ZeroDivisionError):
            saver.close()
    assert failed(events) == ["ZeroDivisionError: a bug"]
    saver.close()


def test_an_event_sink_that_fails_is_raised(tmp_path: Path) -> None:
    class Sink(list[Event]):
        def append(self, event: Event) -> None:
            raise RuntimeError("the log is closed")

    saver = checkpointer(tmp_path, Sink())
    saver.save(1, replicated=state(1), local={})
    with pytest.raises(RuntimeError, match="the log is closed"):
        saver.close()
    assert verify(tmp_path, 1).ok


def test_an_error_in_training_gives_the_save_up(tmp_path: Path) -> None:
    events: list[Event] = []
    saver = checkpointer(tmp_path, events, world_size=2, exit_wait_s=0.2)

    def train() -> None:
        with saver:
            saver.save(1, replicated=state(1), local={})
            raise ValueError("training broke")

    with pytest.raises(ValueError, match="training broke"):
        train()
    assert "training ended with ValueError: training broke" in failed(events)[0]
    with pytest.raises(CheckpointError, match="closed"):
        saver.save(2, replicated={}, local={})


def test_the_order_in_which_things_become_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[tuple[str, str]] = []
    lock = threading.Lock()
    fsync, replace = os.fsync, os.replace

    def recording_fsync(fd: int) -> None:
        fsync(fd)
        with lock:
            log.append(("fsync", os.readlink(f"/proc/self/fd/{fd}")))

    def recording_replace(old: str, new: str) -> None:
        with lock:
            log.append(("replace", f"{old} {new}"))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    url = tmp_path / "made" / "on the way"
    save_by_ranks(url, 1, world_size=2)
    folder = url / "step_00000001"

    def index(entry: tuple[str, str]) -> int:
        return log.index(entry)

    def renamed(path: Path) -> int:
        (place,) = [n for n, (what, which) in enumerate(log) if what == "replace" and which.endswith(f" {path}")]
        temporary = log[place][1].removesuffix(f" {path}")
        assert index(("fsync", temporary)) < place
        return place

    assert index(("fsync", str(tmp_path))) < index(("fsync", str(url)))
    votes = []
    for rank in range(2):
        path = folder / "votes" / f"rank_{rank:05d}.json"
        voted = renamed(path)
        votes.append(voted)
        for entry in unseal_vote(path.read_bytes(), "").files:
            file = folder / entry.path
            written = renamed(file) if entry.path == "zarr.json" else index(("fsync", str(file)))
            assert written < voted
            for parent in file.relative_to(tmp_path / "made").parents:
                synced = [n for n, e in enumerate(log) if e == ("fsync", str(tmp_path / "made" / parent))]
                assert any(written < n < voted for n in synced) or str(parent) == ".", (file, parent)
    committed = renamed(folder / "commit.json")
    synced = [n for n, entry in enumerate(log) if entry == ("fsync", str(folder / "votes"))]
    assert any(max(votes) < n < committed for n in synced)
    # Nor may a commit record be there without the folder of the votes that it lists.
    synced = [n for n, entry in enumerate(log) if entry == ("fsync", str(folder))]
    assert any(max(votes) < n < committed for n in synced)
    assert log[committed + 1] == ("fsync", str(folder))


def test_a_vote_that_may_have_been_counted_keeps_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_atomic = LocalStore.put_atomic

    def failing_late(store: LocalStore, path: str, data: bytes) -> None:
        put_atomic(store, path, data)
        if path == vote_path(1, 1):
            raise OSError(5, "Input/output error")  # as when the directory's fsync fails: the vote is visible

    monkeypatch.setattr(LocalStore, "put_atomic", failing_late)
    events = save_by_ranks(tmp_path, 1, world_size=2)
    assert "Input/output error" in failed(events[1])[0]
    # Whether rank 0 saw the vote or the failure first: a commit record never stands for files that are gone.
    committed = [info.step for info in list_steps(tmp_path) if info.status == "committed"]
    assert committed == [e.step for e in of(CheckpointSaved, events[0])]
    assert all(verify(tmp_path, step).ok for step in committed)


@pytest.mark.parametrize("only", ["replicated", "local"])
def test_either_kind_of_state_is_enough(tmp_path: Path, only: str) -> None:
    with checkpointer(tmp_path) as saver:
        if only == "replicated":
            saver.save(1, replicated=state(1))
        else:
            saver.save(1, local=local(1))
        saver.wait_copied()
        back = saver.restore(1)
    assert back is not None
    assert same(back.replicated, state(1) if only == "replicated" else {})
    assert same(back.local, local(1) if only == "local" else {})


def test_a_save_of_nothing_is_an_error(tmp_path: Path) -> None:
    with checkpointer(tmp_path) as saver, pytest.raises(CheckpointError, match="step 3 was given nothing to save"):
        saver.save(3)
    assert list_steps(tmp_path) == []
