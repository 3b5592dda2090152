"""A real place that can only be read: saves fail and say so, restores do what they can without changing anything."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from outlast.checkpoint.tools import list_steps, verify
from outlast.errors import CheckpointError, CheckpointNotFound
from outlast.events import CheckpointSaved, Event
from tests.checkpoint.damage import files_of, flip, steps_at
from tests.checkpoint.helpers import checkpointer, failed, of, rejected, save_steps
from tests.checkpoint.states import local, same, state

pytestmark = pytest.mark.root


class Disk:
    """A mounted file system that can be made read-only, and writable again, while it is used."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.url = place / "checkpoints"

    def may_only(self, mode: str) -> None:
        """``ro`` or ``rw``."""
        subprocess.run(["mount", "-o", f"remount,{mode}", str(self.place)], check=True, timeout=30)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "outlast-test", str(place)], check=True, timeout=30)
    yield Disk(place)
    subprocess.run(["umount", str(place)], check=True, timeout=30)


def test_a_checkpointer_needs_a_place_to_write_to(disk: Disk) -> None:
    save_steps(disk.url, 1)
    disk.may_only("ro")
    refused = pytest.raises(CheckpointError, match=r"cannot be written to .*Read-only file system")
    with refused as error:
        checkpointer(disk.place / "elsewhere" / "deep")
    assert str(disk.place / "elsewhere" / "deep") in str(error.value)
    with checkpointer(disk.url) as reader:  # it may only want to read
        assert reader.restore("auto") is not None
        with refused as error:
            reader.save(2, replicated=state(2), local=local(2))
        assert str(disk.url) in str(error.value)
    assert verify(disk.url).ok


def test_a_disk_that_becomes_read_only_in_a_run(disk: Disk) -> None:
    events: list[Event] = []
    with checkpointer(disk.url, events) as saver:
        for step in (1, 2, 3, 4):
            saver.save(step, replicated=state(step), local=local(step))
            saver.wait_copied()
            assert saver._saving is not None
            saver._saving.join()
            if step in (1, 3):
                disk.may_only("ro" if step == 1 else "rw")
    assert [event.step for event in of(CheckpointSaved, events)] == [1, 4]
    assert len(failed(events)) == 2
    assert all("Read-only file system" in reason for reason in failed(events))
    assert str(disk.url / "step_00000002") in failed(events)[0]
    assert steps_at(disk.url) == ["step_00000001", "step_00000004"]
    assert verify(disk.url).ok


def test_no_rank_waits_longer_than_it_may(disk: Disk) -> None:
    """They cannot tell each other, on that disk."""
    events: list[list[Event]] = [[], []]
    ranks = [
        checkpointer(disk.url, events[rank], rank=rank, world_size=2, attempt_id="two", commit_timeout_s=1.0)
        for rank in (0, 1)
    ]
    for step in (1, 2):
        for rank, saver in enumerate(ranks):
            saver.save(step, replicated=state(step), local=local(step, rank))
        for saver in ranks:
            saver.wait_copied()
        for saver in ranks:
            assert saver._saving is not None
            saver._saving.done.wait()
        disk.may_only("ro")
    for saver in ranks:
        saver.close()
    assert "Read-only file system" in failed(events[0])[0]
    assert "rank 0 did not open the save" in failed(events[1])[0]
    assert verify(disk.url, 1).ok


def test_restoring_changes_nothing_there_and_says_what_it_would_have(disk: Disk) -> None:
    """Of a damaged step, a save that was cut off, and steps newer than the one asked for."""
    save_steps(disk.url, 1, 2, 3, 4)
    flip(disk.url / "step_00000003" / "model" / "blocks.0.norm.bias" / "c.0")
    (disk.url / "step_00000004" / "commit.json").unlink()
    events: list[Event] = []
    with checkpointer(disk.url, events, attempt_id="two") as reader:
        disk.may_only("ro")
        before = files_of(disk.url)
        back = reader.restore("auto")
        assert back is not None
        assert (back.step, back.world_size) == (2, 1)
        assert same(back.replicated, state(2))
        assert same(back.local, local(2))
        assert same(back.read_local(0), local(2))
        assert rejected(events) == [(3, "model/blocks.0.norm.bias/c.0"), (4, "commit.json")]
        asked_for = reader.restore(1)
        assert asked_for.step == 1
        assert same(asked_for.replicated, state(1))
        with pytest.raises(CheckpointNotFound, match="step 9"):
            reader.restore(9)
        assert files_of(disk.url) == before
    reasons = [event.reason for event in events if event.kind == "checkpoint_rejected"]
    assert sum("not used" in reason or "another name" in reason for reason in reasons) == 4
    disk.may_only("rw")
    with checkpointer(disk.url, events, attempt_id="three") as reader:
        again = reader.restore("auto")
        reader.wait_copied()
    assert again is not None
    assert again.step == 2
    assert [info.status for info in list_steps(disk.url)] == ["committed", "committed", "aside", "aside"]


def test_a_step_that_was_to_be_saved_anew_is_not_passed_over(disk: Disk) -> None:
    """It is read where the interrupted overwrite has left it, and brought back when the run goes on."""
    save_steps(disk.url, 1, 2)
    (disk.url / "step_00000002").rename(disk.url / "step_00000002.replaced")
    with checkpointer(disk.url, attempt_id="two") as reader:
        disk.may_only("ro")
        for which in ("auto", 2):
            there = reader.restore(which)
            assert there.step == 2
            assert same(there.replicated, state(2))
            assert same(there.read_local(0), local(2))
        asked_for = reader.restore(1)
        assert asked_for.step == 1
        disk.may_only("rw")
        back = reader.restore("auto")
        assert steps_at(disk.url) == ["step_00000001", "step_00000002.replaced"]
        reader.wait_copied()
        assert same(back.read_local(0), local(2))
        assert [info.status for info in list_steps(disk.url)] == ["committed", "committed"]
    assert back is not None
    assert back.step == 2
    assert same(back.replicated, state(2))
