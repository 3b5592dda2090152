"""What a directory may hold after a crash of the machine, given what was done in it until then.

The model of a crash, adversarial as that of ALICE (Pillai et al., OSDI 2014):

- A file's bytes are durable once the file was fsynced. Each write, and each size that was set, since then may have
  reached the disk or not, independently of the others (so they may be reordered), a write also in part: cut off at any
  byte, or any subset of its sectors of 512 bytes. What lies below the file's size and did not reach it is zero.
- A name given or taken in a directory is durable once that directory was fsynced. Since then each may be there or not,
  independently of names beside it, of the file's bytes and of what happened in other directories. Two things hold, as
  on any file system with a journal: what happened to one name is never undone without what happened to it later, and a
  rename is atomic: all of it or nothing. (A rename over a file gives the old file or the new one; the new one may be
  empty or torn where it was not fsynced.)
- A file whose bytes are durable may have lost its name, and with a directory's name all that lies below is lost.
- Nothing that is durable is lost.

:class:`Disk` replays operations and keeps apart what is durable from what is pending; :func:`states_of` gives crash
states from after every single operation: the plain ones (all, or nothing, of the pending names and bytes), each pending
name alone there or alone missing, each pending file torn in a few ways, and random combinations from a seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.checkpoint.recorder import ROOT, Mark, Names, Op, Recorder, Resize, Sync, Tree, Write, tree_at

SECTOR_BYTES = 512

Version = tuple[int, str]
"""A step, and the id of the attempt that saved it."""


@dataclass(frozen=True)
class Expected:
    """What a restore may give after a crash.

    Marks change it: ``begin`` (a save begins: it may, from now on, be found), ``acked`` (``CheckpointSaved`` with
    ``committed`` was emitted: nothing that was begun before may be found any more), ``back`` (the program asks for this
    step and thereby for newer ones to go), ``restored`` (it was given: nothing else may be found), ``nothing`` (a
    restore gave None: nothing may be found).
    """

    allowed: tuple[Version, ...] = ()
    """In the order in which their saves began."""
    nothing: bool = True
    """Whether finding no checkpoint at all is right: only until the first is acknowledged."""

    def after(self, mark: Mark) -> Expected:
        """What may be found from this mark on."""
        this = (mark.step, mark.version)
        if mark.what in ("begin", "back"):
            return Expected((*self.allowed, this), self.nothing)
        if mark.what == "acked":
            return Expected(self.allowed[self.allowed.index(this) :], False)
        if mark.what == "restored":
            return Expected((this,), False)
        if mark.what == "nothing":
            return Expected()
        raise ValueError(mark.what)


@dataclass
class Recording:
    """A context in which operations on ``root`` are recorded, from a directory all of which is durable.

    Attributes:
        start: what a restore may give at the beginning.
        base: what lay in the directory then.
        ops: what was done.
    """

    root: Path
    start: Expected = Expected()
    ops: list[Op] = field(default_factory=list)
    base: Tree = field(default_factory=dict)

    def __enter__(self) -> Self:
        self.recorder = Recorder(self.root)
        self.base, self.ops = self.recorder.base, self.recorder.ops
        self.recorder.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.recorder.__exit__(kind, error, tb)
        if kind is None:
            disk = Disk(self.base)
            for op in self.ops:
                disk.do(op)
            logged, there = disk.tree(disk.pending), tree_at(self.root)
            differs = sorted(path for path in {*logged, *there} if logged.get(path, 0) != there.get(path, 0))
            assert not differs, f"changed past the recorder: {differs}"


@dataclass(frozen=True)
class State:
    """A directory after a crash."""

    tree: Tree
    expected: Expected
    after: int
    """Operations done before the crash."""
    how: str


class Disk:
    """A directory below which things are durable or pending."""

    def __init__(self, base: Tree) -> None:
        self.bytes: dict[int, bytes] = {}
        self.writes: dict[int, list[Write | Resize]] = {}
        self.names: dict[int, dict[str, int]] = {ROOT: {}}
        self.pending: list[Names] = []
        # As the recorder numbers them.
        at = {"": ROOT}
        for node, (path, data) in enumerate(base.items(), 1):
            parent, _, name = path.rpartition("/")
            self.names[at[parent]][name] = at[path] = node
            if data is None:
                self.names[node] = {}
            else:
                self.bytes[node] = data

    def do(self, op: Op) -> None:
        """Replay one operation."""
        if isinstance(op, Names):
            self.pending.append(op)
            if op.what in ("create", "mkdir"):
                node = op.changes[0][2]
                assert node is not None
                if op.what == "mkdir":
                    self.names[node] = {}
                else:
                    self.bytes[node] = b""
        elif isinstance(op, Write | Resize):
            self.writes.setdefault(op.node, []).append(op)
        elif isinstance(op, Sync) and op.folder:
            wanted = {n for n, names in enumerate(self.pending) if any(c[0] == op.node for c in names.changes)}
            durable = self.with_earlier(wanted)
            for n in sorted(durable):
                _change(self.names, self.pending[n])
            self.pending = [names for n, names in enumerate(self.pending) if n not in durable]
        elif isinstance(op, Sync):
            self.bytes[op.node] = apply(self.bytes[op.node], self.writes.pop(op.node, []))

    def with_earlier(self, wanted: set[int]) -> set[int]:
        """Pending changes of names, and all before them that they cannot be without."""
        needed: set[tuple[int, str]] = set()
        chosen = set()
        for n in range(len(self.pending) - 1, -1, -1):
            touched = {(folder, name) for folder, name, _ in self.pending[n].changes}
            if n in wanted or touched & needed:
                chosen.add(n)
                needed |= touched
        return chosen

    def without_later(self, dropped: int) -> set[int]:
        """All pending changes of names but one, and those that cannot be without it."""
        gone = {(folder, name) for folder, name, _ in self.pending[dropped].changes}
        chosen = set(range(dropped))
        for n in range(dropped + 1, len(self.pending)):
            touched = {(folder, name) for folder, name, _ in self.pending[n].changes}
            if touched & gone:
                gone |= touched
            else:
                chosen.add(n)
        return chosen

    def torn(self) -> list[int]:
        """Files that have a name, or may have, and bytes of which some are pending."""
        named = {node for names in self.names.values() for node in names.values()}
        named |= {node for names in self.pending for _, _, node in names.changes if node is not None}
        return [node for node in self.writes if node in named]

    def tree(self, names: Iterable[Names], contents: Mapping[int, bytes] | None = None) -> Tree:
        """What is there if these of the pending changes of names are, and files hold ``contents`` (default: all)."""
        changed: dict[int, dict[str, int]] = dict(self.names)
        for change in names:
            for folder, _, _ in change.changes:
                if changed[folder] is self.names[folder]:
                    changed[folder] = dict(changed[folder])
            _change(changed, change)
        found: Tree = {}
        contents = contents or {}

        def walk(folder: int, prefix: str) -> None:
            for name, node in sorted(changed[folder].items()):
                path = prefix + name
                if node in changed:
                    found[path] = None
                    walk(node, f"{path}/")
                elif node in contents:
                    found[path] = contents[node]
                else:
                    found[path] = apply(self.bytes[node], self.writes.get(node, []))

        walk(ROOT, "")
        return found


def _change(folders: dict[int, dict[str, int]], change: Names) -> None:
    for folder, name, node in change.changes:
        if node is None:
            folders[folder].pop(name, None)
        else:
            folders[folder][name] = node


def apply(data: bytes, writes: Iterable[Write | Resize]) -> bytes:
    """A file's bytes after writes and sizes set."""
    writes = list(writes)
    if not writes:
        return data
    result = bytearray(data)
    for op in writes:
        if isinstance(op, Resize):
            if op.size < len(result) and not op.grow_only:
                del result[op.size :]
            result.extend(bytes(max(0, op.size - len(result))))
        else:
            result.extend(bytes(max(0, op.offset - len(result))))
            result[op.offset : op.offset + len(op.data)] = op.data
    return bytes(result)


Tear = Callable[[random.Random, list[Write | Resize]], Iterable[Write | Resize]]


def _nothing(rng: random.Random, writes: list[Write | Resize]) -> Iterable[Write | Resize]:
    return ()


def _sizes(rng: random.Random, writes: list[Write | Resize]) -> Iterable[Write | Resize]:
    """The file has its size, but none of its new bytes."""
    for op in writes:
        yield op if isinstance(op, Resize) else Resize(op.path, op.node, op.offset + len(op.data), True)


def _cut(rng: random.Random, writes: list[Write | Resize]) -> Iterable[Write | Resize]:
    """The first operations, the last of them in part."""
    count = rng.randrange(len(writes))
    yield from writes[:count]
    op = writes[count]
    if isinstance(op, Write):
        yield Write(op.path, op.node, op.offset, op.data[: rng.randrange(len(op.data))])


def _sectors(rng: random.Random, writes: list[Write | Resize]) -> Iterable[Write | Resize]:
    """Any of the sectors; of those that are missing, the size may be there."""
    for op in writes:
        if isinstance(op, Resize):
            if rng.random() < 0.5:
                yield op
            continue
        at, end = op.offset, op.offset + len(op.data)
        while at < end:
            stop = min(end, (at // SECTOR_BYTES + 1) * SECTOR_BYTES)
            luck = rng.random()
            if luck < 0.5:
                yield Write(op.path, op.node, at, op.data[at - op.offset : stop - op.offset])
            elif luck < 0.75:
                yield Resize(op.path, op.node, stop, True)
            at = stop


def _some(rng: random.Random, writes: list[Write | Resize]) -> Iterable[Write | Resize]:
    """Any of the operations."""
    return [op for op in writes if rng.random() < 0.5]


TEARS: tuple[Tear, ...] = (_nothing, _sizes, _cut, _sectors, _some)


def states_of(
    ops: Iterable[Op], base: Tree, start: Expected, *, seed: int, randoms: int = 6, singles: int = 12
) -> Iterator[State]:
    """Crash states from before the first operation and after each; none twice while the same is expected of it.

    Args:
        ops: what was done.
        base: what was there before, all of it durable.
        start: what a restore could give before.
        seed: of all random choices.
        randoms: random combinations after each operation.
        singles: at most so many names, and so many files, are singled out after each operation.
    """
    rng = random.Random(seed)
    disk, expected, seen = Disk(base), start, set[int]()
    for after, op in enumerate((None, *ops)):
        if isinstance(op, Mark):
            expected = expected.after(op)
            seen.clear()
        elif op is not None:
            disk.do(op)
        for how, tree in states_now(disk, rng, randoms, singles):
            key = hash(frozenset(tree.items()))
            if key not in seen:
                seen.add(key)
                yield State(tree, expected, after, f"after {op}"[:160] + f": {how}")


def states_now(disk: Disk, rng: random.Random, randoms: int, singles: int) -> Iterator[tuple[str, Tree]]:
    """Crash states of one moment, with what they are in words; some may be equal."""
    pending, torn = disk.pending, disk.torn()

    def contents(tears: Mapping[int, Tear]) -> dict[int, bytes]:
        return {node: apply(disk.bytes[node], tear(rng, disk.writes[node])) for node, tear in tears.items()}

    nothing, sizes = contents(dict.fromkeys(torn, _nothing)), contents(dict.fromkeys(torn, _sizes))
    yield "all is there", disk.tree(pending)
    yield "what is pending is lost", disk.tree((), nothing)
    yield "pending bytes are lost", disk.tree(pending, nothing)
    yield "pending bytes are zero", disk.tree(pending, sizes)
    yield "pending names are lost", disk.tree(())
    for n in _few(rng, range(len(pending)), singles):
        yield f"but for {pending[n]}", disk.tree(pending[m] for m in sorted(disk.without_later(n)))
        yield f"of what is pending only {pending[n]}", disk.tree(pending[m] for m in sorted(disk.with_earlier({n})))
    for node in _few(rng, torn, singles):
        for tear in TEARS:
            yield f"{disk.writes[node][0].path}: {tear.__name__}", disk.tree(pending, contents({node: tear}))
    for _ in range(randoms if pending or torn else 0):
        share = rng.choice((0.2, 0.5, 0.8))
        chosen = disk.with_earlier({n for n in range(len(pending)) if rng.random() < share})
        tears = {node: rng.choice(TEARS) for node in torn if rng.random() < 0.7}
        yield "at random", disk.tree((pending[n] for n in sorted(chosen)), contents(tears))


def _few(rng: random.Random, items: Iterable[int], count: int) -> list[int]:
    """All, or the last and some others."""
    items = list(items)
    return items if len(items) <= count else [*rng.sample(items[:-1], count - 1), items[-1]]
