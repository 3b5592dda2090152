"""What a run that begins anew, or only reads, does to the steps of others: nothing, unless it is told to."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from outlast.checkpoint.tools import list_steps, verify
from outlast.errors import CheckpointError, CheckpointNotFound, CorruptCheckpoint, PlaceInUse
from outlast.events import CheckpointSaved, Event
from tests.checkpoint.damage import files_of, flip, steps_at
from tests.checkpoint.helpers import checkpointer, of, save_and_join, save_steps
from tests.checkpoint.ownership.job import Job
from tests.checkpoint.states import local, same, state


def test_who_begins_anew_is_refused_and_told_the_ways_out(tmp_path: Path) -> None:
    url = tmp_path / "run"
    save_steps(url, 5, 10)
    before = files_of(url)
    with checkpointer(url, attempt_id="two", old_steps="refuse") as anew:
        for step in (1, 2):  # each time, and not only the first
            with pytest.raises(PlaceInUse, match=r"2 steps \(step_00000005 to step_00000010\)") as error:
                anew.save(step, replicated=state(step), local=local(step))
        for way in ('restore("auto")', "another place", 'old_steps = "set_aside"'):
            assert way in error.value.fix
        assert [name for name in files_of(url) if "lease" not in name] == before
        # The first way out, in the same process.
        back = anew.restore("auto")
        assert back is not None
        assert back.step == 10
        save_and_join(anew, 11, state(11))
    assert steps_at(url) == ["step_00000005", "step_00000010", "step_00000011"]


def test_the_old_steps_are_moved_away_and_can_be_restored_there(tmp_path: Path) -> None:
    for attempt_id in ("one", "two", "three"):
        save_steps(tmp_path, 1, 2, attempt_id=attempt_id, old_steps="set_aside")
    assert steps_at(tmp_path) == ["earlier-1", "earlier-2", "step_00000001", "step_00000002"]
    assert [info.step for info in list_steps(tmp_path)] == [1, 2]
    assert all(verify(tmp_path / folder, step).ok for folder in ("earlier-1", "earlier-2") for step in (1, 2))
    with checkpointer(tmp_path / "earlier-2", attempt_id="x") as reader:
        back = reader.restore("auto")
        assert back is not None
        assert same(back.replicated, state(2))
    with checkpointer(tmp_path, attempt_id="x") as reader:
        assert reader.restore("auto").step == 2


def test_old_steps_may_be_kept(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    save_steps(tmp_path, 2, attempt_id="two", old_steps="keep")
    assert [info.status for info in list_steps(tmp_path)] == ["committed", "committed"]


@pytest.mark.parametrize("left", ["uncommitted", "aside", "nothing"])
def test_what_is_no_step_does_not_make_a_place_used(tmp_path: Path, left: str) -> None:
    if left != "nothing":
        save_steps(tmp_path, 5)
    if left == "uncommitted":
        (tmp_path / "step_00000005" / "commit.json").unlink()
    elif left == "aside":
        (tmp_path / "step_00000005").rename(tmp_path / "step_00000005.aside-1")
    save_steps(tmp_path, 1, attempt_id="two", old_steps="refuse")


def test_steps_in_memory_alone_count(tmp_path: Path) -> None:
    url, settings = tmp_path / "run", {"memory_every_steps": 1}
    with Job(url, **settings) as first:
        first.tell("save 3")
        first.kill()
        shutil.rmtree(url)  # so that memory alone has it
        with (
            checkpointer(url, attempt_id="two", old_steps="refuse", **settings) as anew,
            pytest.raises(PlaceInUse, match="memory or disk has step_00000003"),
        ):
            anew.save(1, replicated=state(1), local=local(1))
        with checkpointer(url, attempt_id="three", old_steps="set_aside", **settings) as anew:
            save_and_join(anew, 1, state(1))


def test_reading_beside_a_live_run_changes_nothing(tmp_path: Path) -> None:
    """A save is in progress, a step is damaged, one is newer than the one that is asked for."""
    url = tmp_path / "run"
    with Job(url) as run:
        for step in (1, 2, 3):
            run.tell(f"save {step}")
        flip(url / "step_00000003" / "commit.json")
        shutil.copytree(url / "step_00000002", url / "step_00000004")  # as if rank 0 waited for votes
        (url / "step_00000004" / "commit.json").unlink()
        (url / "step_00000004" / "votes" / "rank_00000.json").unlink()
        before = files_of(url)
        for which, found in (("auto", 2), (1, 1), (2, 2)):
            with checkpointer(url, attempt_id=f"reads-{which}") as reader:
                back = reader.restore(which)
                assert back is not None
                assert back.step == found
        with checkpointer(url, attempt_id="reads") as reader:
            with pytest.raises(CheckpointNotFound, match="step 7"):
                reader.restore(7)
            with pytest.raises(CorruptCheckpoint):
                reader.restore(3)
        assert files_of(url) == before
        assert run.tell("save 5")["saved"] == [1, 2, 3, 5]


def test_reading_where_no_run_is_changes_nothing_either(tmp_path: Path) -> None:
    url = tmp_path / "run"
    save_steps(url, 1, 2, 3)
    before = files_of(url)
    with checkpointer(url, attempt_id="reads", memory_every_steps=1) as reader:
        assert reader.restore(1).step == 1
    assert files_of(url) == before
    # The next run goes on from the newest, as if nobody had looked.
    with checkpointer(url, attempt_id="two") as run:
        assert run.restore("auto").step == 3


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_a_mistyped_place_is_not_made(tmp_path: Path, scheme: str) -> None:
    url = f"{scheme}{tmp_path}/rnu/checkpoints"
    with checkpointer(url) as reader:
        assert reader.restore("auto") is None
        with pytest.raises(CheckpointNotFound, match="there is no checkpoint"):
            reader.restore(2)
    assert not (tmp_path / "rnu").exists()
    if scheme:
        import fsspec

        assert not fsspec.filesystem("memory").exists(f"{tmp_path}/rnu")


def test_what_a_restore_leaves_behind_is_put_in_order_when_the_run_goes_on(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 3)
    events: list[Event] = []
    with checkpointer(tmp_path, events, attempt_id="two") as run:
        run.restore(1)
        run.restore(2)  # changed its mind: only the last one counts
        save_and_join(run, 3, state(33))
        assert run.restore("auto").step == 3
    assert [event.step for event in of(CheckpointSaved, events)] == [3]
    assert [info.folder for info in list_steps(tmp_path)] == [
        "step_00000001",
        "step_00000002",
        "step_00000003",
        "step_00000003.aside-1",
    ]


def test_a_refused_job_leaves_memory_of_the_other_alone(tmp_path: Path) -> None:
    """Both have a memory tier on this node: the second one's restore would have removed newer steps there."""
    url, settings = tmp_path / "run", {"memory_every_steps": 1}
    with Job(url, **settings) as first, Job(url, **settings) as second:
        for step in (1, 2, 3):
            first.tell(f"save {step}")
        assert second.tell("restore 2")["step"] == 2
        assert f"process {first.pid}" in second.tell("save 3")["error"]
        second.kill()
        first.kill()
        with Job(url, **settings) as third:
            assert third.tell("restore auto")["step"] == 3


def test_reading_needs_no_place_that_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="Not a directory"):
        checkpointer(tmp_path / "file" / "run")
