"""Programs whose crashes are looked at, and what is right to find after one of them.

Every number of a state is a function of step, key, index and attempt, so a mix of two saves is told from each of them.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from outlast.checkpoint import CheckpointConfig, Checkpointer, Restored
from outlast.checkpoint.format.names import COMMIT, parse_step, rank_name
from outlast.checkpoint.format.records import Fault
from outlast.checkpoint.ownership import lease
from outlast.checkpoint.peers.collectives import Agreement
from outlast.checkpoint.restore.candidates import Candidate
from outlast.checkpoint.restore.housekeeping import NO_STEP, Settlement, find_steps, records_of
from outlast.checkpoint.restore.load import Loader
from outlast.checkpoint.restore.request import RestoreContext, RestoreRequest
from outlast.checkpoint.restore.restore import restore_newest, restore_step
from outlast.checkpoint.steps.reader import StepReader
from outlast.checkpoint.storage.local import LocalStore
from outlast.errors import OutlastError
from outlast.events import CheckpointFailed, CheckpointSaved, Event
from tests.checkpoint.crash import Disk, Expected, Recording, State, Version
from tests.checkpoint.damage import flip
from tests.checkpoint.recorder import Mark, Names, Tree
from tests.checkpoint.states import same

lease._UNREADABLE_S = 0.01  # thousands of crashes leave a lease half written
URL = "run/checkpoints"
"""Below the recorded directory, so that the making of directories is recorded too."""


def replicated(step: int, version: str) -> dict[str, Any]:
    """A tensor of more than a page, one of less than a sector, and a value."""
    base = 8192.0 * (8 * step + ord(version) % 8)
    return {
        "model": {"w": torch.arange(1300.0) + base, "b": torch.arange(3, dtype=torch.float64) - base},
        "step": [step, version],
    }


def local(step: int, version: str, rank: int) -> dict[str, Any]:
    """A rank's own."""
    return {"rng": torch.arange(150) + 1000 * (8 * step + ord(version) % 8) + 200 * rank, "rank": [rank, step, version]}


class _AllRanks(Loader):
    """The part of every rank of a restore, in one process."""

    def _read(self, candidate: Candidate, *sources: Any) -> tuple[Restored, Counter[str]]:
        context = self.context
        first, bytes_by_tier = super()._read(candidate, *sources)
        reader = StepReader(context.store, candidate.step, context.io)
        others = {rank_name(rank): reader.load(rank) for rank in range(1, context.world_size)}
        return replace(first, local={rank_name(0): first.local, **others}), bytes_by_tier


class _Inline(ThreadPoolExecutor):
    """No threads: thousands of restores of tiny files spend most of their time in changing from one to another."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **named))
        except Exception as error:
            future.set_exception(error)
        return future


class Program:
    """Saves and restores of some ranks in one process, recorded.

    Args:
        recording: an active one.
        world_size: ranks.
        keep_last: see ``CheckpointConfig``.
    """

    def __init__(self, recording: Recording, world_size: int, keep_last: int) -> None:
        self._recording = recording
        self._world_size = world_size
        # Some tensors packed, some not.
        self._config = CheckpointConfig(
            commit_timeout_s=60.0, keep_last=keep_last, io_threads=1, pack_below_kb=0.02, old_steps="keep"
        )

    def save(self, version: str, *steps: int) -> None:
        """An attempt that saves these steps; all are committed."""
        failed: list[Event] = []

        def on_event(event: Event) -> None:
            if isinstance(event, CheckpointSaved) and event.committed:
                self._recording.recorder.mark("acked", event.step, version)
            if isinstance(event, CheckpointFailed):
                failed.append(event)

        ranks = [
            Checkpointer(
                self._recording.root / URL,
                self._config,
                rank=rank,
                world_size=self._world_size,
                attempt_id=version,
                on_event=on_event,
            )
            for rank in range(self._world_size)
        ]
        for step in steps:
            self._recording.recorder.mark("begin", step, version)
            for rank, saver in enumerate(ranks):
                saver.save(step, replicated=replicated(step, version), local=local(step, version, rank))
            for saver in ranks:
                saver.wait_copied()
        for saver in ranks:
            saver.close()
        assert not failed, failed

    def restore(self) -> Version | None:
        """Restore what is newest."""
        found = restore(self._recording.root, self._world_size, go_on=True)
        if found is None:
            self._recording.recorder.mark("nothing")
            return None
        version = version_of(found, self._world_size)
        self._recording.recorder.mark("restored", *version)
        return version

    def go_back(self, step: int, version: str) -> None:
        """Restore one step; newer ones must go."""
        self._recording.recorder.mark("back", step, version)
        found = restore(self._recording.root, self._world_size, step, go_on=True)
        assert found is not None
        assert version_of(found, self._world_size) == (step, version)
        self._recording.recorder.mark("restored", step, version)


def restore(root: Path, world_size: int, step: int | None = None, *, go_on: bool = False) -> Restored | None:
    """As the program would: a ``Checkpointer``, or all ranks' parts of a restore without a process group.

    Args:
        root: the recorded directory.
        world_size: ranks.
        step: None: the newest.
        go_on: whether training goes on from there, so that the place is put in order.
    """
    config = CheckpointConfig(io_threads=1)
    with Checkpointer(
        root / URL, config, rank=0, world_size=1, attempt_id="r", on_event=lambda event: None
    ) as checkpointer:
        checkpointer._context = replace(checkpointer._context, io=_Inline(1))
        if world_size == 1:
            found = checkpointer.restore("auto" if step is None else step)
            if go_on:
                checkpointer.wait_copied()
            return found
        saver, agreement = checkpointer._context, Agreement(None, 0, 1)
        context = RestoreContext(saver.store, 0, world_size, agreement, saver.on_event, saver.io)
        scanned, reading = find_steps(context)
        loader = _AllRanks(reading, RestoreRequest(None, any_world_size=False, read_once=False), None)
        if step is not None:
            found = restore_step(step, loader, scanned)
            newer = records_of(reading, [other for other in scanned.committed if other > step])
            settlement = Settlement(context, None, scanned, step, superseded=newer)
        else:
            found, damaged = restore_newest(loader, scanned)
            at = found.step if found is not None else NO_STEP
            settlement = Settlement(context, None, scanned, at, damaged=records_of(reading, damaged))
        checkpointer._start.restored(settlement)
        if go_on:
            checkpointer.wait_copied()
        return found


def version_of(found: Restored, world_size: int) -> Version:
    """Whose state this is, in every bit.

    Raises:
        AssertionError: nobody's.
    """
    named = found.replicated.get("step")
    assert isinstance(named, list), "the replicated state has no name"
    step, version = named
    assert step == found.step, f"step {found.step} has the state of step {step}"
    assert same(found.replicated, replicated(step, version)), f"a mix: replicated state of step {step} by {version!r}"
    own = {rank_name(rank): local(step, version, rank) for rank in range(world_size)}
    assert same(found.local, own["rank_00000"] if world_size == 1 else own), f"a mix: local state of step {step}"
    return step, version


class Judge:
    """Looks at crash states: each is laid out as a directory, and restored from.

    Two things are asked of each. First: the restore gives, bit for bit, a version that may be found there (see
    ``Expected``), or None where that is right. It never raises: an error would be a clear answer, but there is always a
    better one, the last acknowledged step, or that there is none yet. Second: every step that has a commit record,
    whether or not it is the newest, can be loaded and is, bit for bit, a version of that step; so a half of a step
    never looks complete, not even to ``restore(step)``.

    Args:
        folder: empty, and best in memory.
        world_size: ranks of the programs.
        complete: whether to ask the second thing.
    """

    def __init__(self, folder: Path, world_size: int, *, complete: bool = True) -> None:
        self._cache = folder / "cache"
        self._root = folder / "state"
        self._cache.mkdir()
        self._world_size = world_size
        self._complete = complete
        self._files: dict[bytes, str] = {}
        self._loaded: dict[int, str] = {}

    def violation(self, state: State, *, go_on: bool = False) -> str | None:
        """What is wrong with what is found, or None.

        Args:
            state: a directory after a crash.
            go_on: whether to look, too, if training goes on: a second restore gives the same, and the next save counts.
        """
        self._lay_out(state.tree)
        try:
            wrong = (self._complete and self._half(state.tree)) or self._found(state.expected)
            if not wrong and go_on:
                wrong = self._goes_on()
            return f"{wrong}; {state.how}" if wrong else None
        finally:
            shutil.rmtree(self._root)

    def _lay_out(self, tree: Tree) -> None:
        root = str(self._root)
        os.mkdir(root)
        for path, data in tree.items():
            if data is None:
                os.mkdir(f"{root}/{path}")
                continue
            kept = self._files.get(data)
            if kept is None:
                kept = self._files[data] = f"{self._cache}/{len(self._files)}"
                Path(kept).write_bytes(data)
                os.chmod(kept, 0o444)
            os.link(kept, f"{root}/{path}")

    def _found(self, expected: Expected) -> str:
        try:
            found = restore(self._root, self._world_size)
            if found is None:
                return "" if expected.nothing else f"nothing was found, allowed is {expected.allowed}"
            version = version_of(found, self._world_size)
        except OutlastError as error:
            return f"{type(error).__name__}: {error}"
        except AssertionError as error:
            return str(error)
        return "" if version in expected.allowed else f"found {version}, allowed is {expected.allowed}"

    def _half(self, tree: Tree) -> str:
        for path in [path for path in tree if path.endswith(f"/{COMMIT}")]:
            folder = path.removesuffix(f"/{COMMIT}")
            step = parse_step(folder.removeprefix(f"{URL}/"))
            if step is None:
                continue
            key = hash(frozenset(item for item in tree.items() if item[0].startswith(f"{folder}/")))
            if key not in self._loaded:
                self._loaded[key] = self._load(step)
            if self._loaded[key]:
                return f"step {step} has a commit record, but {self._loaded[key]}"
        return ""

    def _load(self, step: int) -> str:
        with _Inline(1) as io:
            try:
                reader = StepReader(LocalStore(str(self._root / URL)), step, io)
                ranks = [reader.load(rank) for rank in range(self._world_size)]
                every = {rank_name(rank): state for rank, state in enumerate(ranks)}
                local = ranks[0] if self._world_size == 1 else every
                version_of(
                    Restored(step, reader.load(None), local, self._world_size, ranks.__getitem__), self._world_size
                )
            except (Fault, AssertionError) as error:
                return str(error)
        return ""

    def _goes_on(self) -> str:
        with Recording(self._root) as recording:
            program = Program(recording, self._world_size, 1)
            first, second = program.restore(), program.restore()
            step = 1 + (first[0] if first else 0)
            program.save("z", step)
            last = program.restore()
        if first != second or last != (step, "z"):
            return f"restores gave {first}, then {second}, and, after a save of step {step}, {last}"
        return ""


# Scenarios. Each gives recordings, some of which begin with what a crash of another one left.


def _record(root: Path, base: State | None, body: Callable[[Recording], object]) -> Recording:
    root.mkdir(parents=True)
    if base is not None:
        write_tree(root, base.tree)
    recording = Recording(root, base.expected if base else Expected())
    with recording:
        body(recording)
    return recording


def write_tree(root: Path, tree: Tree) -> None:
    """A directory with this in it."""
    for path, data in tree.items():
        if data is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(data)


def saves(root: Path, world_size: int, keep_last: int) -> Iterator[Recording]:
    """Three steps into an empty place, old ones pruned meanwhile."""
    yield _record(root / "a", None, lambda r: Program(r, world_size, keep_last).save("a", 1, 2, 3))


def saves_anew(root: Path, world_size: int) -> Iterator[Recording]:
    """A step that is there already is saved by a new attempt."""

    def body(recording: Recording) -> None:
        program = Program(recording, world_size, 2)
        program.save("a", 1, 2)
        program.save("b", 2, 3)

    yield _record(root / "a", None, body)


def goes_back(root: Path, world_size: int) -> Iterator[Recording]:
    """A step is asked for that is not the newest, and training goes on from there."""

    def body(recording: Recording) -> None:
        program = Program(recording, world_size, 0)
        program.save("a", 1, 2, 3)
        program.go_back(1, "a")
        program.save("b", 2)

    yield _record(root / "a", None, body)


def cut_off(root: Path, world_size: int) -> Iterator[Recording]:
    """A process is killed in the middle of its second save, in several places; another attempt restores and goes on."""
    first = _record(root / "first", None, lambda r: Program(r, world_size, 2).save("a", 1, 2))

    def body(recording: Recording) -> None:
        program = Program(recording, world_size, 2)
        program.restore()
        program.save("b", 2, 3)

    folder = f"{URL}/step_00000002"
    for path in (f"{folder}/model/w/zarr.json", f"{folder}/votes/rank_00000.json", f"{folder}/{COMMIT}"):
        yield _record(root / path.replace("/", "-"), state_before(first, path), body)


def sets_aside(root: Path, world_size: int) -> Iterator[Recording]:
    """The newest of three steps is damaged, and a save was cut off: a restore sets the one aside, removes the other."""
    first = _record(root / "first", None, lambda r: Program(r, world_size, 3).save("a", 1, 2, 3, 4))
    state = state_before(first, f"{URL}/step_00000004/votes/rank_00000.json")
    tree = dict(state.tree)
    damaged = f"{URL}/step_00000003/votes/rank_00000.json"
    (root / "damaged").write_bytes(tree[damaged] or b"")
    flip(root / "damaged")
    tree[damaged] = (root / "damaged").read_bytes()
    base = dataclasses.replace(state, tree=tree, expected=Expected(((2, "a"),), False))
    yield _record(root / "a", base, lambda r: Program(r, world_size, 3).restore())


def state_before(recording: Recording, path: str) -> State:
    """What is there when all processes are killed right before a file gets its name."""
    (place,) = [
        n
        for n, op in enumerate(recording.ops)
        if isinstance(op, Names) and op.path == path and op.changes[-1][2] is not None
    ]
    disk, expected = Disk(recording.base), recording.start
    for op in recording.ops[:place]:
        disk.do(op)
        expected = expected.after(op) if isinstance(op, Mark) else expected
    return State(disk.tree(disk.pending), expected, place, f"killed before {path}")
