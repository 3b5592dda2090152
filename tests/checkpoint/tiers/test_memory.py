"""The memory tier: what is in shared memory outlives the ranks, is verified, and is used first."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpoint import CheckpointConfig
from outlast.checkpoint.tiers.folders import memory_folder
from outlast.errors import CheckpointError, ConfigError
from outlast.events import CheckpointFailed, CheckpointRejected, CheckpointSaved, Event
from tests.checkpoint.damage import flip
from tests.checkpoint.helpers import checkpointer, of, restored_by_one, tiers_taken
from tests.checkpoint.ranks import Orders, run
from tests.checkpoint.states import local, state

MEMORY = {"memory_every_steps": 1}


@pytest.fixture
def url(tmp_path: Path) -> Iterator[Path]:
    """A folder for checkpoints, whose shared memory is removed afterwards."""
    place = tmp_path / "checkpoints"
    yield place
    shutil.rmtree(memory_folder(str(place)))


def killed(url: Path, *steps: int, durable: tuple[int, ...] = (), ranks: int = 1, **orders: Any) -> None:
    """Run a job that saves these steps and is then killed, without closing anything."""
    after = ((steps[-1], "memory"), *((step, "storage") for step in durable))
    orders = {"attempt_id": "first", "settings": MEMORY, **orders}
    order = Orders((str(url),), save=steps, durable=durable, die_after=after, **orders)
    assert [one.exitcode for one in run(*[order] * ranks)] == [-9] * ranks


def restored(url: Path, **how: Any) -> tuple[int | None, list[Event]]:
    return restored_by_one(url, MEMORY, **how)


def files(url: Path, ending: str) -> list[Path]:
    return sorted(memory_folder(str(url)).rglob(f"*{ending}"))


def test_what_lies_in_memory_outlives_the_process(url: Path) -> None:
    killed(url, 1, 2, 3, durable=(1,))
    step, events = restored(url)
    assert step == 3
    assert tiers_taken(events) == {"memory"}


def test_the_next_attempts_commits_take_the_place_of_those_before(url: Path) -> None:
    killed(url, 1, 2)
    killed(url, 3, 4, 5, 6, attempt_id="second", restore=True)
    assert {path.name.partition(".")[0] for path in files(url, "")} >= {"second"}
    assert not [path for path in files(url, ".data") if path.name.startswith("first.")]
    assert len(files(url, ".data")) == 3
    assert restored(url, attempt_id="third")[0] == 6


def test_a_run_that_begins_anew_forgets_what_lies_there(url: Path) -> None:
    killed(url, 1, 2, 3)
    killed(url, 1, attempt_id="second", settings={**MEMORY, "old_steps": "set_aside"})
    assert restored(url, attempt_id="third")[0] == 1


def test_a_step_that_is_gone_back_to_makes_newer_ones_forgotten(url: Path) -> None:
    killed(url, 1, 2, 3, durable=(1,))
    assert restored(url, which=1)[0] == 1
    assert restored(url, attempt_id="third")[0] == 1


def test_a_step_in_memory_can_be_asked_for(url: Path) -> None:
    killed(url, 1, 2, 3)
    assert restored(url, which=2)[0] == 2


def test_a_run_that_ends_well_leaves_no_memory_behind(url: Path) -> None:
    events: list[Event] = []
    with checkpointer(url, events, **MEMORY) as one:
        for step in (1, 2):
            one.save(step, replicated=state(step), local=local(step), durable=step == 2)
            one.wait_copied()
    assert [(event.step, event.tier) for event in of(CheckpointSaved, events)] == [
        (1, "memory"),
        (2, "memory"),
        (2, "storage"),
    ]
    assert not files(url, ".data") + files(url, ".json") + files(url, ".commit")
    assert restored(url)[0] == 2


def test_nor_what_attempts_before_it_left(url: Path) -> None:
    killed(url, 1, 2)
    with checkpointer(url, [], attempt_id="second", **MEMORY) as one:
        assert one.restore("auto") is not None
        one.save(3, replicated=state(3), local=local(3))
    assert not files(url, ".data") + files(url, ".json") + files(url, ".commit")


def test_memory_that_storage_lacks_is_kept_at_the_end(url: Path) -> None:
    with checkpointer(url, [], **MEMORY) as one:
        one.save(1, replicated=state(1), local=local(1), durable=False)
    assert restored(url)[0] == 1


@pytest.mark.parametrize("into", [False, True])
@pytest.mark.parametrize("ending", [".data", ".json", ".commit"])
def test_damage_in_memory_is_found_and_the_next_copy_taken(url: Path, ending: str, into: bool) -> None:
    killed(url, 1, 2, durable=(1, 2))
    newest = files(url, ending)[1]
    flip(newest, 0.0 if ending == ".data" else 0.5)
    step, events = restored(url, into=into)
    assert step == 2
    if ending == ".data":
        assert tiers_taken(events) == {"memory", "storage"}, "only the damaged file comes from storage"
        (rejected,) = of(CheckpointRejected, events)
        assert rejected.file
        assert "CRC32C" in rejected.reason
        assert not newest.with_suffix(".json").exists(), "the damaged copy is never taken again"
    else:
        assert tiers_taken(events) == {"storage"}


@pytest.mark.parametrize("into", [False, True])
def test_damage_in_memory_alone_goes_back_a_step(url: Path, into: bool) -> None:
    killed(url, 1, 2, 3)
    flip(files(url, ".data")[2], 0.0)
    step, events = restored(url, into=into)
    assert step == 2
    assert of(CheckpointRejected, events)[0].step == 3


@pytest.mark.parametrize("into", [False, True])
@pytest.mark.parametrize("what", ["truncated", "removed", "emptied"])
def test_a_slot_that_is_cut_short_goes_back_a_step(url: Path, what: str, into: bool) -> None:
    killed(url, 1, 2, 3)
    slot = files(url, ".data")[2]
    if what == "removed":
        slot.unlink()
    else:
        os.truncate(slot, 0 if what == "emptied" else 4096)
    assert restored(url, into=into)[0] == 2


def test_no_step_counts_without_its_commit_record(url: Path) -> None:
    killed(url, 1, 2, 3)
    files(url, "3.commit")[0].unlink()
    assert restored(url)[0] == 2


@pytest.mark.parametrize("into", [False, True])
def test_ranks_find_their_own(url: Path, into: bool) -> None:
    killed(url, 1, 2, durable=(1,), ranks=3)
    orders = Orders((str(url),), "second", restore=True, into=into, settings=MEMORY)
    outcomes = run(*[orders] * 3)
    assert [one.restored for one in outcomes] == [[2]] * 3
    for one in outcomes:
        (event,) = [event for event in one.events if event["kind"] == "checkpoint_restored"]
        assert set(event["tiers"]) == {"memory"}


def test_fewer_ranks_find_everything(url: Path) -> None:
    killed(url, 1, 2, ranks=3)
    orders = Orders((str(url),), "second", restore=True, any_world_size=True, settings=MEMORY)
    assert [one.restored for one in run(*[orders] * 2)] == [[2]] * 2


def test_a_rank_that_dies_leaves_the_step_before(url: Path) -> None:
    """It is killed when it would vote for step 3 in memory; the others give step 3 up at once, and report it."""
    good = Orders((str(url),), "first", save=(1, 2, 3), durable=(), settings=MEMORY, die_after=((2, "memory"),))
    outcomes = run(good, replace(good, die_voting=3))
    assert outcomes[1].exitcode == -9
    orders = Orders((str(url),), "second", restore=True, settings=MEMORY)
    assert [one.restored for one in run(orders, orders)] == [[2]] * 2


def test_shared_memory_that_is_full_is_reported_and_storage_used(url: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("outlast.checkpoint.tiers.slots.os.posix_fallocate", full)
    events: list[Event] = []
    with checkpointer(url, events, **MEMORY) as one:
        one.save(1, replicated=state(1), local=local(1))
        one.wait_copied()
        one.save(2, replicated=state(2), local=local(2), durable=False)
    assert [(event.step, event.tier) for event in of(CheckpointFailed, events)] == [(1, "memory"), (2, "memory")]
    assert [(event.step, event.tier) for event in of(CheckpointSaved, events)] == [(1, "storage")]


def test_others_may_not_look(url: Path) -> None:
    folder = memory_folder(str(url))
    folder.chmod(0o755)
    with pytest.raises(CheckpointError, match="0755"):
        memory_folder(str(url))
    folder.chmod(0o700)


def test_no_memory_tier_and_a_save_to_memory_alone_is_an_error(tmp_path: Path) -> None:
    with checkpointer(tmp_path, []) as one, pytest.raises(CheckpointError, match="no memory tier"):
        one.save(1, replicated=state(1), local=local(1), durable=False)


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match="a multiple of"):
        CheckpointConfig(partner_every_steps=2)
    with pytest.raises(ConfigError, match="a multiple of"):
        CheckpointConfig(memory_every_steps=2, partner_every_steps=3)


def lose(node: str) -> None:
    """All files in a node's memory."""
    for path in Path(node).iterdir():
        shutil.rmtree(path)


def on_nodes(orders: Orders, nodes: list[str], ranks: int = 4) -> list[Orders]:
    """Two nodes with two ranks each."""
    return [replace(orders, shm=nodes[rank * len(nodes) // ranks]) for rank in range(ranks)]


def tiers_of(outcomes: list[Any]) -> list[set[str]]:
    return [set(event["tiers"]) for one in outcomes for event in one.events if event["kind"] == "checkpoint_restored"]


@pytest.mark.root
@pytest.mark.parametrize("lost", [None, 0, 1])
def test_a_nodes_memory_is_lost(tmp_path: Path, nodes: list[str], lost: int | None) -> None:
    """With a partner, either node may be lost; step 4 was copied to the partner, step 5 was not."""
    settings = {"memory_every_steps": 1, "partner_every_steps": 2}
    url = str(tmp_path / "checkpoints")
    after = ((5, "memory"), (4, "partner"), (1, "storage"))
    job = Orders((url,), "first", save=(1, 2, 3, 4, 5), durable=(1,), settings=settings, die_after=after)
    assert [one.exitcode for one in run(*on_nodes(job, nodes))] == [-9] * 4
    if lost is not None:
        lose(nodes[lost])
    again = Orders((url,), "second", restore=True, into=lost == 1, settings=settings)
    outcomes = run(*on_nodes(again, nodes))
    assert [one.restored for one in outcomes] == [[5 if lost is None else 4]] * 4, outcomes
    # Each node has its own parts, and its copies of the other's: nothing is sent unless a node lost all it had.
    assert all(found <= {"memory", "partner"} for found in tiers_of(outcomes))


@pytest.mark.root
def test_both_nodes_memory_is_lost(tmp_path: Path, nodes: list[str]) -> None:
    url = str(tmp_path / "checkpoints")
    job = Orders(
        (url,), "first", save=(1, 2, 3), durable=(2,), settings=MEMORY, die_after=((3, "memory"), (2, "storage"))
    )
    run(*on_nodes(job, nodes))
    lose(nodes[1])
    outcomes = run(*on_nodes(Orders((url,), "second", restore=True, settings=MEMORY), nodes))
    assert [one.restored for one in outcomes] == [[2]] * 4
    assert {"storage"} <= tiers_of(outcomes)[3], "no partner: what the lost node had comes from storage"
    assert "memory" in tiers_of(outcomes)[0], "and the rest from the other node's memory"
