"""The tier on each node's own disk: it outlives the machine's memory, is verified, and is used if memory is lost."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from outlast.checkpoint import CheckpointConfig
from outlast.checkpoint.storage.local import LocalStore
from outlast.checkpoint.tiers.folders import OWN, local_folder, memory_folder
from outlast.checkpoint.tiers.slots import DATA, INDEX, SlotContents, clear
from outlast.errors import CheckpointError, ConfigError
from outlast.events import CheckpointFailed, CheckpointRejected, CheckpointSaved, Event
from tests.checkpoint.damage import flip
from tests.checkpoint.helpers import checkpointer, of, restored_by_one, small_disk, tiers_taken
from tests.checkpoint.ranks import Orders, Outcome, run
from tests.checkpoint.states import local, state

LOCAL = {"memory_every_steps": 1, "local_every_steps": 2}


@pytest.fixture
def url(tmp_path: Path) -> Iterator[Path]:
    """A folder for checkpoints, whose shared memory is removed afterwards."""
    place = tmp_path / "checkpoints"
    yield place
    shutil.rmtree(memory_folder(str(place)))


def settings(url: Path) -> dict[str, Any]:
    return {**LOCAL, "local_dir": str(url.parent / "disk")}


def killed(url: Path, *steps: int, disk: tuple[int, ...], durable: tuple[int, ...] = (), **orders: Any) -> None:
    """Run a job of one rank that saves these steps, and is killed once those in ``disk`` are on its disk."""
    after = [(steps[-1], "memory"), *((step, "local") for step in disk), *((step, "storage") for step in durable)]
    orders = {"attempt_id": "first", "settings": settings(url), **orders}
    order = Orders((str(url),), save=steps, durable=durable, die_after=tuple(after), **orders)
    assert [one.exitcode for one in run(order)] == [-9]


def boot(url: Path) -> None:
    """Lose what a machine loses when it restarts."""
    shutil.rmtree(memory_folder(str(url)))


def restored(url: Path, **how: Any) -> tuple[int | None, list[Event]]:
    return restored_by_one(url, settings(url), **how)


def files(url: Path, ending: str) -> list[Path]:
    return sorted(local_folder(str(url), url.parent / "disk").rglob(f"*{ending}"))


@pytest.mark.parametrize("into", [False, True])
def test_the_disk_has_it_after_the_machine_starts_again(url: Path, into: bool) -> None:
    killed(url, 1, 2, 3, 4, 5, disk=(2, 4), durable=(1,))
    boot(url)
    step, events = restored(url, into=into)
    assert step == 4
    assert tiers_taken(events) == {"local"}
    assert of(CheckpointSaved, events)[0].tier == "memory", "what lies on disks alone is copied to memory at once"


def test_memory_is_taken_while_it_is_there(url: Path) -> None:
    killed(url, 1, 2, 3, 4, disk=(4,))
    step, events = restored(url)
    assert step == 4
    assert tiers_taken(events) == {"memory"}


@pytest.mark.parametrize("into", [False, True])
def test_what_is_damaged_in_memory_comes_from_the_disk(url: Path, into: bool) -> None:
    killed(url, 1, 2, 3, 4, disk=(2, 4))
    newest = sorted(memory_folder(str(url)).rglob("*.data"), key=lambda path: path.stat().st_mtime)
    for path in newest:  # of step 4, whichever slot it is in
        flip(path, 0.0)
    step, events = restored(url, into=into)
    assert step == 4
    assert tiers_taken(events) == {"memory", "local"}, "only the damaged file comes from the disk"
    (rejected,) = of(CheckpointRejected, events)
    assert "in a node's memory" in rejected.reason


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def garbled(path: Path) -> None:
    flip(path, 0.0 if path.suffix == ".data" else 0.5)


@pytest.mark.parametrize("into", [False, True])
@pytest.mark.parametrize(
    ("ending", "damage"),
    [
        (".data", garbled),
        (".data", cut),
        (".data", Path.unlink),
        (".json", garbled),
        (".json", cut),
        (".json", Path.unlink),
        (".commit", garbled),
        (".commit", Path.unlink),
    ],
)
def test_damage_on_the_disk(url: Path, ending: str, damage: Callable[[Path], None], into: bool) -> None:
    """The newest copy is damaged, and there is no other: the one before is used."""
    killed(url, 1, 2, 3, 4, disk=(2, 4))
    boot(url)
    damage(files(url, f"4{ending}")[0])
    step, events = restored(url, into=into)
    assert step == 2
    assert tiers_taken(events) == {"local"}
    if ending == ".data":
        assert of(CheckpointRejected, events)[0].step == 4


def test_a_stale_copy_is_no_copy(url: Path) -> None:
    killed(url, 1, 2, 3, 4, disk=(2, 4), durable=(4,))
    boot(url)
    old, new = (files(url, f"{step}.data")[0] for step in (2, 4))
    shutil.copyfile(old, new)
    step, events = restored(url)
    assert step == 4
    assert "storage" in tiers_taken(events)
    assert of(CheckpointRejected, events)
    assert not new.with_suffix(".json").exists(), "it is never taken again"


def test_old_copies_go(url: Path) -> None:
    every = tuple(range(2, 17, 2))
    killed(url, *range(1, 17), disk=every)
    assert [path.name.split(".")[2] for path in files(url, ".data")] == ["14", "16"]
    assert len(files(url, ".json")) == len(files(url, ".commit")) == 2
    boot(url)
    killed(url, *range(17, 25), disk=(18, 20, 22, 24), attempt_id="second", restore=True)
    assert {path.name.partition(".")[0] for path in files(url, "")} - {"own"} == {"second"}


def test_a_run_that_ends_well_leaves_nothing(url: Path) -> None:
    killed(url, 1, 2, disk=(2,))
    with checkpointer(url, [], attempt_id="second", **settings(url)) as one:
        assert one.restore("auto") is not None
        for step in (3, 4):
            one.save(step, replicated=state(step), local=local(step), durable=step == 4)
            one.wait_copied()
    assert not files(url, ".data") + files(url, ".json") + files(url, ".commit")


def test_a_run_that_begins_anew_forgets_what_lies_there(url: Path) -> None:
    killed(url, 1, 2, disk=(2,))
    boot(url)
    killed(url, 1, disk=(), attempt_id="second", settings={**settings(url), "old_steps": "set_aside"})
    assert restored(url, attempt_id="third")[0] == 1


def test_what_storage_lacks_is_kept_at_the_end(url: Path) -> None:
    with checkpointer(url, [], **settings(url)) as one:
        one.save(2, replicated=state(2), local=local(2), durable=False)
    boot(url)
    assert restored(url)[0] == 2


@pytest.mark.root
def test_a_full_disk_is_reported_and_training_goes_on(url: Path) -> None:
    with small_disk(url.parent / "disk", "128k"):
        events: list[Event] = []
        with checkpointer(url, events, **settings(url), pack_below_kb=0.0) as one:
            for step in range(1, 9):
                one.save(step, replicated=state(step), local=local(step), durable=step == 1)
                one.wait_copied()
        full = of(CheckpointFailed, events)
        assert full
        assert {event.tier for event in full} == {"local"}
        assert all("No space left on device" in event.reason for event in full)
        assert [event.step for event in of(CheckpointSaved, events) if event.tier == "memory"] == list(range(1, 9))


@pytest.mark.root
def test_what_attempts_before_left_makes_room(url: Path) -> None:
    """There is room for three parts, and the attempt before has filled two."""
    with small_disk(url.parent / "disk", "3600k"):
        for first, attempt_id in ((1, "one"), (11, "two"), (21, "three")):
            events: list[Event] = []
            one = checkpointer(url, events, attempt_id=attempt_id, **{**settings(url), "local_every_steps": 1})
            assert attempt_id == "one" or one.restore("auto") is not None
            for step in range(first, first + 8):
                one.save(step, replicated={"w": torch.full((250_000,), float(step))}, local={}, durable=False)
                one.wait_copied()
            one._finish()
            assert one._tiers is not None
            assert one._tiers._disk is not None
            one._tiers._disk.close()
            one.abort()
            saved = [event.step for event in of(CheckpointSaved, events) if event.tier == "local"]
            assert saved == list(range(first, first + 8)), of(CheckpointFailed, events)


def test_disks_that_fail_by_turns_leave_what_all_have(url: Path) -> None:
    """Rank 0 cannot write save 3 and rank 1 not save 2, and it dies writing save 4: all have save 1 alone."""
    always = {**settings(url), "local_every_steps": 1}
    job = Orders((str(url),), "first", save=(1, 2, 3, 4), durable=(), settings=always)
    first = replace(job, fail_at="rank_00000.3.json", die_after=((4, "local"),))
    second = replace(
        job, fail_at="rank_00001.2.json", die_at="rank_00001.4.json", die_after=((4, "memory"), (9, "never"))
    )
    outcomes = run(first, second)
    assert [(event["kind"], event["step"]) for event in outcomes[0].events if event.get("tier") == "local"] == [
        ("checkpoint_saved", 1),
        ("checkpoint_saved", 2),
        ("checkpoint_failed", 3),
        ("checkpoint_saved", 4),
    ]
    assert outcomes[1].exitcode == -9
    boot(url)
    again = Orders((str(url),), "second", restore=True, settings=always)
    assert [one.restored for one in run(again, again)] == [[1], [1]]


def test_a_place_that_cannot_be(url: Path) -> None:
    (url.parent / "disk").write_text("a file")
    with pytest.raises(CheckpointError, match="local_dir"):
        checkpointer(url, [], **settings(url))


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match="a multiple of"):
        CheckpointConfig(local_every_steps=2, local_dir="/tmp")
    with pytest.raises(ConfigError, match=r"checkpoint\.local_dir"):
        CheckpointConfig(memory_every_steps=1, local_every_steps=2)


def on_nodes(orders: Orders, nodes: list[str], tmp_path: Path) -> list[Orders]:
    """Two nodes, each with two ranks and a disk of its own."""
    of_node = [replace(orders, shm=node, settings={**orders.settings, "local_dir": f"{node}-disk"}) for node in nodes]
    return [of_node[rank // 2] for rank in range(4)]


def tiers_of(outcomes: list[Outcome]) -> list[set[str]]:
    return [set(event["tiers"]) for one in outcomes for event in one.events if event["kind"] == "checkpoint_restored"]


def lose(folder: str) -> None:
    for path in Path(folder).iterdir():
        shutil.rmtree(path)


@pytest.mark.root
@pytest.mark.parametrize("lost", ["all memory", "a node", "a node and a disk"])
def test_two_nodes(tmp_path: Path, nodes: list[str], lost: str) -> None:
    """Storage has step 1, disks have 2 and 4, memory has 5."""
    place = str(tmp_path / "checkpoints")
    after = ((5, "memory"), (2, "local"), (4, "local"), (1, "storage"))
    job = Orders((place,), "first", save=(1, 2, 3, 4, 5), durable=(1,), settings=LOCAL, die_after=after)
    outcomes = run(*on_nodes(job, nodes, tmp_path))
    assert [one.exitcode for one in outcomes] == [-9] * 4, outcomes
    for node in nodes if lost == "all memory" else nodes[1:]:
        lose(node)
    if lost == "a node and a disk":
        lose(f"{nodes[1]}-disk")
    again = Orders((place,), "second", restore=True, into=lost == "a node", settings=LOCAL)
    outcomes = run(*on_nodes(again, nodes, tmp_path))
    expected = 1 if lost == "a node and a disk" else 4
    assert [one.restored for one in outcomes] == [[expected]] * 4, outcomes
    found = tiers_of(outcomes)
    if lost == "all memory":
        assert all("local" in tiers for tiers in found)
        assert not any("storage" in tiers for tiers in found)
    elif lost == "a node":
        # Node 0 has its part of step 4 in memory still, node 1 on its disk; each sends the other what it lacks.
        assert "memory" in found[0]
        assert "local" in found[3]


@pytest.mark.root
def test_a_disk_that_fails_leaves_what_all_have(tmp_path: Path, nodes: list[str]) -> None:
    """Rank 3 cannot write after its first copy: the others keep theirs of that save, however many they write."""
    place = str(tmp_path / "checkpoints")
    always = {**LOCAL, "local_every_steps": 1}
    job = Orders((place,), "first", save=tuple(range(1, 10)), durable=(), settings=always, die_after=((9, "memory"),))
    orders = on_nodes(job, nodes, tmp_path)
    orders[3] = replace(orders[3], fail_after=1, fail_at=".json")
    outcomes = run(*orders)
    assert [one.exitcode for one in outcomes] == [-9] * 4, outcomes
    assert {(event["step"], event["tier"]) for event in outcomes[3].events if event["kind"] == "checkpoint_failed"} >= {
        (step, "local") for step in range(2, 9)
    }
    for node in nodes:
        lose(node)
    again = Orders((place,), "second", restore=True, settings=always)
    assert [one.restored for one in run(*on_nodes(again, nodes, tmp_path))] == [[1]] * 4


@pytest.mark.parametrize("what", ["a copy", "what attempts before left", "an index set aside"])
def test_another_rank_removes_the_empty_folder_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """At the end of a run each rank of a node removes its copies, and one of them the folder."""
    folder = local_folder("run", tmp_path)
    only = folder / OWN / f"before.0.1{INDEX}"
    only.touch()

    def then_the_other_rank(name: str) -> None:
        really = getattr(os, name)

        def act(path: str | Path, *more: Any, **how: Any) -> None:
            really(path, *more, **how)
            if folder.exists() and Path(path) == only:
                shutil.rmtree(folder)

        monkeypatch.setattr(os, name, act)

    then_the_other_rank("unlink")
    then_the_other_rank("replace")
    if what == "a copy":
        LocalStore(str(folder / OWN)).remove(only.name)
    elif what == "what attempts before left":
        only.rename(only := only.with_suffix(DATA))
        clear(folder, 1, "now")
    else:
        SlotContents(cast(Any, None), only.with_suffix(DATA), "local").quarantine()
    assert not folder.exists()
