"""A crash of the machine at any moment costs no acknowledged checkpoint, and never gives a mix of two.

The programs of ``oracle`` are recorded, and crash states (``crash``) from after each of their operations are laid out
and restored from. That this finds what it should is shown by leaving out one kind of fsync at a time, in the recording.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpoint.format.names import COMMIT
from outlast.checkpoint.storage import local
from outlast.checkpoint.storage.local import LocalStore
from tests.checkpoint.crash import Disk, Recording, states_now, states_of
from tests.checkpoint.oracle import URL, Judge, cut_off, goes_back, saves, saves_anew, sets_aside
from tests.checkpoint.recorder import Names, Op, Recorder, Resize, Sync, Tree, Unrecorded, Write

Scenario = Callable[[Path, int], Iterator[Recording]]

SCENARIOS: dict[str, Scenario] = {
    "saves, keeping one": lambda root, world_size: saves(root, world_size, 1),
    "saves, keeping two": lambda root, world_size: saves(root, world_size, 2),
    "saves a step anew": saves_anew,
    "goes back": goes_back,
    "cut off": cut_off,
    "sets aside": sets_aside,
}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No warnings: a restore would log thousands. Direct I/O for small chunks, too."""
    monkeypatch.setattr(local, "DIRECT_FROM_BYTES", 24)
    log = logging.getLogger("outlast.checkpoint")
    log.setLevel(logging.CRITICAL)
    yield
    log.setLevel(logging.NOTSET)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """An empty directory, in memory if the machine has /dev/shm."""
    shared = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


def _look(name: str, world_size: int, root: Path, memory: Path, *, randoms: int, singles: int) -> int:
    """Judge crash states of a scenario; returns how many different directories there were."""
    began, seen = time.process_time(), set[int]()
    place = f"{name.replace(' ', '-')}-{world_size}"
    (memory / place).mkdir()
    # A step that is damaged on purpose does have a commit record.
    judge = Judge(memory / place, world_size, complete=name != "sets aside")
    for recording in SCENARIOS[name](root / place, world_size):
        ops, base, start = recording.ops, recording.base, recording.start
        for state in states_of(ops, base, start, seed=world_size, randoms=randoms, singles=singles):
            seen.add(hash(frozenset(state.tree.items())))
            wrong = judge.violation(state, go_on=len(seen) % 200 == 0)
            assert wrong is None, f"{name}, {world_size} ranks: {wrong}"
    print(f"{name}, {world_size} ranks: {len(seen)} crash states, {time.process_time() - began:.1f} s of CPU time")
    return len(seen)


@pytest.mark.brief
def test_a_thousand_crashes(tmp_path: Path, memory: Path) -> None:
    states = _look("saves, keeping one", 1, tmp_path, memory, randoms=1, singles=2)
    states += _look("saves a step anew", 1, tmp_path, memory, randoms=1, singles=1)
    states += _look("saves, keeping two", 3, tmp_path, memory, randoms=0, singles=1)
    print(f"{states} crash states")
    assert states >= 1_000


# The scenarios differ in length. Those of one rank, and two of three ranks, are more than 10,000 states.
SHORT = {"sets aside": 150}
OF_THREE_RANKS = ("saves a step anew", "goes back")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "world_size"),
    [(name, 1) for name in SCENARIOS]
    + [pytest.param(name, 3, marks=[] if name in OF_THREE_RANKS else pytest.mark.soak) for name in SCENARIOS],
)
def test_more_than_ten_thousand_crashes_in_all(tmp_path: Path, memory: Path, name: str, world_size: int) -> None:
    randoms, singles = (4, 2) if world_size == 1 else (0, 1)
    states = _look(name, world_size, tmp_path, memory, randoms=randoms, singles=singles)
    assert states >= SHORT.get(name, 1_300)


# Does it bite? Some operations are left out of a recording, or come later in it, as if the code were wrong.

Change = Callable[[list[Op]], list[Op]]


def _without(drop: Callable[[Sync], bool]) -> Change:
    """Without some fsyncs."""
    return lambda ops: [op for op in ops if not (isinstance(op, Sync) and drop(op))]


def _without_after(begins: Callable[[Names], bool], drop: Callable[[Sync], bool], *, count: int = 1) -> Change:
    """Without the first ``count`` fsyncs, of those to drop, after each of some changes of names."""

    def change(ops: list[Op]) -> list[Op]:
        kept: list[Op] = []
        left = 0
        for op in ops:
            if isinstance(op, Names) and begins(op):
                left = count
            if left and isinstance(op, Sync) and drop(op):
                left -= 1
            else:
                kept.append(op)
        return kept

    return change


def _record_last(ops: list[Op]) -> list[Op]:
    """Prune removes the commit record, and fsyncs, after all else in the folder."""
    kept: list[Op] = []
    held: list[Op] = []
    for op in ops:
        if (isinstance(op, Names) and op.what == "unlink" and op.path.endswith(f"/{COMMIT}")) or len(held) == 1:
            held.append(op)
            continue
        if isinstance(op, Names) and op.what == "rmdir" and _step(op.path):
            kept += held
            held = []
        kept.append(op)
    return kept


def _step(path: str) -> bool:
    """Whether this is the folder of a step."""
    return path.startswith(f"{URL}/step_") and path.count("/") == URL.count("/") + 1


def _temporary(*what: str) -> Callable[[Sync], bool]:
    """Files before they are renamed to these."""
    return lambda op: not op.folder and any(f"/.{name}." in op.path for name in what)


def _named(end: str) -> Callable[[Names], bool]:
    return lambda op: op.what == "rename" and op.path.endswith(end)


VOTE = "rank_00000.json"

LEFT_OUT: dict[str, tuple[str, Change]] = {
    "files: bytes": ("saves, keeping one", _without(lambda op: not op.folder and not op.path.endswith(".tmp"))),
    "the root group's document: bytes before the rename": ("saves, keeping one", _without(_temporary("zarr.json"))),
    "votes: bytes before the rename": ("saves, keeping one", _without(_temporary(VOTE))),
    "the commit record: bytes before the rename": ("saves, keeping one", _without(_temporary(COMMIT))),
    "the commit record: its folder after the rename": (
        "saves, keeping one",
        _without_after(_named(COMMIT), lambda op: _step(op.path)),
    ),
    "before the vote: folders in the step": (
        "saves, keeping one",
        _without(lambda op: op.folder and "/step_" in op.path and not _step(op.path) and "/votes" not in op.path),
    ),
    "before the vote and the record: the step's folder": (
        "saves, keeping one",
        _without_after(lambda op: op.what == "mkdir" and _step(op.path), lambda op: _step(op.path), count=3),
    ),
    "before the vote and the record: the URL": ("saves, keeping one", _without(lambda op: op.path == URL)),
    "before the record: the folder of the votes": (
        "saves, keeping one",
        _without_after(_named(VOTE), lambda op: op.path.endswith("/votes"), count=2),
    ),
    "before the record: the folder that the votes' folder is in": (
        "saves, keeping one",
        _without_after(_named(VOTE), lambda op: _step(op.path)),
    ),
    "at the start: folders on the way to the URL": ("saves, keeping one", _without(lambda op: op.path in ("", "run"))),
    "prune: the commit record goes last": ("saves, keeping one", _record_last),
    "prune: the folder after the commit record went": (
        "saves, keeping one",
        _without_after(
            lambda op: op.what == "unlink" and op.path.endswith(f"/{COMMIT}"), lambda op: _step(op.path)
        ),
    ),
    "going back: the URL after newer steps were set aside": (
        "goes back",
        _without_after(lambda op: op.what == "rename" and ".aside-" in op.path, lambda op: op.path == URL),
    ),
}  # fmt: skip

HARMLESS: dict[str, tuple[str, Change]] = {
    # It is fsynced again before the vote that lists the document; that others see it before it is durable is all right.
    "the root group's document: its folder after the rename": (
        "saves, keeping one",
        _without_after(_named("zarr.json"), lambda op: _step(op.path)),
    ),
    # The coordinator fsyncs the folder once more before the record. (Not so if the ranks are on several machines of
    # which each fsyncs its own changes alone; hence both.)
    "votes: their folder after the rename, by the rank that votes": (
        "saves, keeping one",
        _without_after(_named(VOTE), lambda op: op.path.endswith("/votes")),
    ),
    # What was pruned is back then, but without its record, and is cleared away again.
    "prune: the URL at the end": (
        "saves, keeping one",
        _without_after(lambda op: op.what == "rmdir" and _step(op.path), lambda op: op.path == URL),
    ),
    # The old step is where it was then. Its new folder cannot be there unless the old one was moved out of its way.
    "saving anew: the URL after the old step was moved": (
        "saves a step anew",
        _without_after(_named(".replaced"), lambda op: op.path == URL),
    ),
    # The old step is still being replaced then; the next restore sets it aside, as it finds the new one's record.
    "saving anew: the URL after the old step was set aside": (
        "saves a step anew",
        _without_after(lambda op: op.what == "rename" and ".aside-" in op.path, lambda op: op.path == URL),
    ),
}


def _violation(scenario: str, change: Change, world_size: int, root: Path, memory: Path, *, singles: int) -> str | None:
    (recording,) = SCENARIOS[scenario](root, world_size)
    ops = change(recording.ops)
    assert ops != recording.ops
    judge = Judge(memory, world_size)
    states = states_of(ops, recording.base, recording.start, seed=0, randoms=1, singles=singles)
    return next((wrong for state in states if (wrong := judge.violation(state))), None)


@pytest.mark.parametrize("what", LEFT_OUT)
def test_what_is_left_out_is_found(what: str, tmp_path: Path, memory: Path) -> None:
    scenario, change = LEFT_OUT[what]
    wrong = _violation(scenario, change, 1, tmp_path / "recorded", memory, singles=4)
    assert wrong is not None
    print(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("what", HARMLESS)
def test_what_may_be_left_out(what: str, tmp_path: Path, memory: Path) -> None:
    scenario, change = HARMLESS[what]
    assert _violation(scenario, change, 1, tmp_path / "recorded", memory, singles=4) is None


# The recorder and the model themselves.


def test_nothing_escapes_the_recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def saving(write: Callable[[str], Any]) -> None:
        monkeypatch.setattr(LocalStore, "put", lambda store, path, parts: write(os.path.join(store.root, path)))
        with Recording(tmp_path):
            LocalStore(str(tmp_path)).put("file", [b"bytes"])

    def linked(path: str) -> None:
        vars(local)["os"].link(path, f"{path}.2")

    def opened(path: str) -> None:
        vars(local)["open"](path, "wb")

    with pytest.raises(Unrecorded, match=r"os\.link is not known"):
        saving(linked)
    with pytest.raises(Unrecorded, match="writes past the recorder"):
        saving(opened)
    with pytest.raises(AssertionError, match=r"changed past the recorder: \['file'\]"):
        saving(lambda path: Path(path).write_bytes(b"bytes"))
    assert vars(local)["os"] is os
    assert "open" not in vars(local)


def test_calls_are_recorded_as_what_they_do(tmp_path: Path) -> None:
    with Recording(tmp_path) as recording:
        calls, trees = vars(local)["os"], vars(local)["shutil"]  # the recorder's
        calls.makedirs(f"{tmp_path}/a/b")
        fd = calls.open(f"{tmp_path}/a/b/c", os.O_RDWR | os.O_CREAT)
        calls.posix_fallocate(fd, 0, 4096)
        assert calls.pwritev(fd, [b"12", memoryview(b"345")], 1000) == 5
        assert calls.pwrite(fd, b"6", 3000) == 1
        assert calls.lseek(fd, 2, os.SEEK_SET) == 2
        assert calls.write(fd, b"78") == 2
        assert calls.writev(fd, [b"9"]) == 1
        calls.ftruncate(fd, 3500)
        calls.fdatasync(fd)
        calls.close(fd)
        calls.rename(f"{tmp_path}/a/b/c", f"{tmp_path}/a/d")
        trees.rmtree(f"{tmp_path}/a/b")
    assert [type(op) for op in recording.ops] == [Names] * 3 + [Resize] + [Write] * 4 + [Resize, Sync, Names, Names]
    assert _states(*recording.ops, base={})[0] == {
        "a": None,
        "a/d": bytes(2) + b"789" + bytes(995) + b"12345" + bytes(1995) + b"6" + bytes(499),
    }


def _states(*ops: Op, base: Tree) -> list[Tree]:
    """Crash states of the moment after these operations, none twice."""
    disk = Disk(base)
    for op in ops:
        disk.do(op)
    found: list[Tree] = []
    for _, tree in states_now(disk, random.Random(0), 200, 12):
        if tree not in found:
            found.append(tree)
    return found


def test_what_a_crash_may_leave() -> None:
    new, data = 2, bytes(range(1, 201)) * 6
    create = Names("create", ".new", ((0, ".new", new),))
    write = Write(".new", new, 0, data)
    replace = Names("rename", "file", ((0, ".new", None), (0, "file", new)))
    file, folder = Sync(".new", new, False), Sync("", 0, True)
    base: Tree = {"file": b"old"}
    # Durable: one state.
    assert _states(create, write, file, replace, folder, base=base) == [{"file": data}]
    # The name is not: the old file or the new one, and the temporary one may be left.
    found = _states(create, write, file, replace, base=base)
    assert len(found) == 3
    assert all(tree in found for tree in ({"file": b"old"}, {"file": data}, {"file": b"old", ".new": data}))
    # The bytes are not: empty, zero, cut off anywhere, sectors missing.
    torn = [tree["file"] or b"" for tree in _states(create, write, replace, folder, base=base)]
    assert {b"", bytes(len(data)), data} <= set(torn)
    assert any(data.startswith(some) and 0 < len(some) < len(data) for some in torn)
    assert bytes(512) + data[512:] in torn
    assert all(a in (0, b) for some in torn for a, b in zip(some, data, strict=False))
    assert b"old" not in torn
    # Without any fsync, all of these.
    both = _states(create, write, replace, base=base)
    assert {"file": b""} in both
    assert {"file": b"old"} in both
    assert {"file": b"old", ".new": b""} in both


def test_names_of_several_folders() -> None:
    made = Names("mkdir", "a", ((0, "a", 1),)), Names("mkdir", "a/b", ((1, "b", 2),))
    below = Names("create", "a/b/c", ((2, "c", 3),)), Sync("a/b/c", 3, False), Sync("a/b", 2, True)
    found = _states(*made, *below, base={})
    assert len(found) == 3
    assert all(tree in found for tree in ({}, {"a": None}, {"a": None, "a/b": None, "a/b/c": b""}))
    disk = Disk({})
    for op in (*made, *below, Sync("a", 1, True), Sync("", 0, True)):
        disk.do(op)
    assert disk.tree(()) == {"a": None, "a/b": None, "a/b/c": b""}


def test_the_recorder_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Recorder(tmp_path):
        raise ZeroDivisionError
    assert vars(local)["os"] is os
    assert vars(shutil)["os"] is os
