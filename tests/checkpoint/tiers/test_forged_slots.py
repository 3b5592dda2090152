"""Slots of a node's memory and of its disk that somebody forged, with the right checksums: the step before is taken."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outlast.checkpoint.tiers.folders import local_folder, memory_folder
from outlast.checkpoint.tools.memory import list_memory
from outlast.cli.main import main
from outlast.events import Event
from tests.checkpoint.convert.hostile import little_memory
from tests.checkpoint.forging import Record, forge_slot, places_in, put_at, unsealed
from tests.checkpoint.helpers import checkpointer, tiers_taken
from tests.checkpoint.ranks import Orders, run
from tests.checkpoint.restore.test_forged import COMMITS, DOCUMENTS, VALUES, VOTES, WEIGHT, entry, setting
from tests.checkpoint.states import local, same, state

CHUNK = f"{WEIGHT}/c.0.0"
TIERS = ("memory", "local")


def set_up(url: Path, tier: str) -> dict[str, Any]:
    more = {"local_every_steps": 1, "local_dir": str(url.parent / "disk")} if tier == "local" else {}
    return {"memory_every_steps": 1, **more}


def folder(url: Path, tier: str) -> Path:
    """Where this node's own slots are."""
    return (memory_folder(str(url)) if tier == "memory" else local_folder(str(url), url.parent / "disk")) / "own"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Copies of the slots of a job that was killed after it saved steps 1 and 2 to memory and to its disk."""
    url = tmp_path_factory.mktemp("original") / "checkpoints"
    after = tuple((step, tier) for step in (1, 2) for tier in TIERS)
    orders = Orders((str(url),), "first", save=(1, 2), durable=(), settings=set_up(url, "local"), die_after=after)
    assert [one.exitcode for one in run(orders)] == [-9]
    places = {}
    for tier in TIERS:
        places[tier] = url.parent / tier
        shutil.copytree(folder(url, tier), places[tier])
    shutil.rmtree(memory_folder(str(url)))
    return places


@pytest.fixture
def url(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "checkpoints"
    yield place
    shutil.rmtree(memory_folder(str(place)))


def copied(originals: dict[str, Path], url: Path, tier: str) -> Path:
    own = folder(url, tier)
    for place in (own, folder(url, "memory")):
        shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(originals[tier], own)
    return own


def taken(url: Path, tier: str, *, into: bool = False) -> int | None:
    """The step that is restored, with all of its state right."""
    events: list[Event] = []
    with little_memory(), checkpointer(url, events, attempt_id="later", **set_up(url, tier)) as saver:
        back = saver.restore("auto", into=state(99) if into else None)
        if back is None:
            return None
        assert tiers_taken(events) == {tier}
        if back.step == 1:
            assert same(back.replicated, state(1))
            assert same(back.local, local(1))
        return back.step


def place(to: Any) -> Callable[[Record], None]:
    """Where a chunk begins in its slot."""
    return lambda body: put_at(body, ("places", CHUNK), to)


INDICES: dict[str, Callable[[Record], object]] = {
    "a place behind the slot": place(1 << 40),
    "a place beyond integers": place(1 << 70),
    "a place before the slot": place(-4096),
    "a place that is a float": place(0.0),
    "a place that is a truth value": place(True),
    "a place that is a text": place("0"),
    "another chunk's place": lambda body: put_at(
        body, ("places", CHUNK), next(at for path, at in body["places"].items() if path.endswith("/c.0") and at)
    ),
    "no place": lambda body: body["places"].pop(CHUNK),
    "no places": setting("places", to=[]),
    "another field": setting("more", to=1),
    "a nested vote": setting("vote", to={"vote": {}}),
}
SIZES: dict[str, Callable[[Record], object]] = {
    "a chunk of 2^38 bytes": lambda body: entry(body, CHUNK).update(size_bytes=1 << 38),
    "a chunk of 2^62 bytes": lambda body: entry(body, CHUNK).update(size_bytes=1 << 62),
    "a document of 2^30 bytes": lambda body: entry(body, "zarr.json").update(size_bytes=1 << 30),
    "a chunk of 4 bytes": lambda body: entry(body, CHUNK).update(size_bytes=4),
}
FORGED: dict[str, tuple[str, Any]] = {
    **{f"index: {name}": ("index", change) for name, change in INDICES.items()},
    **{f"vote: {name}": ("vote", change) for name, change in (VOTES | SIZES).items()},
    **{f"commit: {name}": ("commit", change) for name, change in COMMITS.items()},
    **{f"document: {name}": ("files", {path: change}) for name, (path, change) in DOCUMENTS.items()},
}


@pytest.mark.parametrize("tier", TIERS)
def test_whatever_is_forged_the_step_before_is_taken(originals: dict[str, Path], url: Path, tier: str) -> None:
    wrong: dict[str, Any] = {}
    for number, (name, (part, change)) in enumerate(list(FORGED.items())[:: 1 if tier == "memory" else 3]):
        forge_slot(copied(originals, url, tier), 2, **{part: change})
        step = taken(url, tier, into=number % 2 == 0)
        if step != 1:
            wrong[name] = step
    assert not wrong


KINDS: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path),
}


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("ending", [".json", ".data", ".commit"])
def test_what_is_no_regular_file(originals: dict[str, Path], url: Path, tier: str, ending: str) -> None:
    for kind in KINDS.values():
        own = copied(originals, url, tier)
        newest = next(path for path in own.glob("*.json") if unsealed(path)["vote"]["step"] == 2)
        if ending == ".commit":
            newest = next(path for path in own.glob("*.commit") if unsealed(path)["step"] == 2)
        path = newest.with_suffix(ending)
        path.unlink()
        kind(path)
        assert taken(url, tier) == 1
        assert len(list_memory(url).steps) in (0, 1, 2)


def test_any_one_value_of_a_slot_forged(originals: dict[str, Path], url: Path) -> None:
    index = next(path for path in originals["memory"].glob("*.json") if unsealed(path)["vote"]["step"] == 2)
    commit = next(path for path in originals["memory"].glob("*.commit") if unsealed(path)["step"] == 2)
    values = {"index": list(places_in(unsealed(index))), "commit": list(places_in(unsealed(commit)))}
    places = [(part, path) for part, paths in values.items() for path in paths]

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(which=st.sampled_from(places), value=st.sampled_from(VALUES))
    def forged(which: tuple[str, tuple[Any, ...]], value: Any) -> None:
        part, path = which
        forge_slot(copied(originals, url, "memory"), 2, **{part: lambda body: put_at(body, path, value)})
        assert taken(url, "memory") in (1, 2)
        assert main(["ckpt", "memory", str(url), "--json"]) == 0

    forged()


@pytest.mark.root
def test_a_node_that_says_it_has_much_is_not_believed(tmp_path: Path, nodes: list[str]) -> None:
    """What one node lacks another sends: nobody takes memory for more than is there."""
    settings = {"memory_every_steps": 1}
    url = str(tmp_path / "checkpoints")
    job = Orders(
        (url,), "first", save=(1, 2), durable=(1,), settings=settings, die_after=((2, "memory"), (1, "storage"))
    )
    jobs = [Orders(**{**vars(job), "shm": node}) for node in nodes]
    assert [one.exitcode for one in run(*jobs)] == [-9] * 2
    (own,) = Path(nodes[0]).glob("*/own")
    forge_slot(own, 2, vote=lambda body: entry(body, CHUNK).update(size_bytes=1 << 38))
    record = next(path for path in own.glob("*.commit") if unsealed(path)["step"] == 2)
    (other,) = Path(nodes[1]).glob("*/own")
    shutil.copyfile(record, other / record.name)
    again = Orders((url,), "second", restore=True, into=True, settings=settings)
    outcomes = run(*[Orders(**{**vars(again), "shm": node}) for node in nodes])
    assert [one.restored for one in outcomes] == [[1]] * 2, outcomes
