"""Ranks as real processes over gloo, forked from a server that has torch loaded."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist

from benchmarks.namespace import mount_over
from outlast.checkpoint.peers.commit_protocol import CommitProtocol
from outlast.checkpoint.storage.local import LocalStore
from outlast.errors import OutlastError
from outlast.events import CheckpointSaved, Event
from tests.checkpoint.helpers import QUICK, ToldByEvents
from tests.checkpoint.states import local, same, state
from tests.forked import context

LIMIT_S = 90.0


@dataclass(frozen=True)
class Orders:
    """What one rank does; all the ranks of a job get the same but ``die_at``."""

    urls: tuple[str, ...]
    attempt_id: str
    save: tuple[int, ...] = ()
    restore: bool = False
    any_world_size: bool = False
    into: bool = False
    """Restore into tensors that are there."""
    commit_timeout_s: float = 60.0
    die_at: str = ""
    """SIGKILL before the first write of a file whose path contains this."""
    die_before: int = 0
    """SIGKILL before the n-th change of the store, counted from 1 at the first that names step 2; 0: never."""
    fail_at: str = ""
    """Writes of files whose path contains this fail, as on a full disk."""
    fail_after: int = 0
    """So many of them succeed first."""
    acked: str = ""
    """A file to which each step is added that is reported as committed."""
    keep_last: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the checkpoint, besides."""
    durable: tuple[int, ...] | None = None
    """The steps that go to storage; None: all."""
    die_after: tuple[tuple[int, str], ...] = ()
    """SIGKILL once these steps are saved, each in a tier; nothing is closed."""
    die_voting: int = 0
    """SIGKILL when this save (counted from 1) would be voted for in memory."""
    shm: str = ""
    """A folder, on a file system of its own, that this rank has for /dev/shm: its node's memory. Needs root."""
    reads: str = ""
    """A file to which the path of each file that is read is added."""
    misread: str = ""
    """A bit is wrong in what this rank reads of files whose path contains this, as with a faulty page cache."""


@dataclass
class Outcome:
    """What one rank did."""

    exitcode: int
    events: list[dict[str, Any]]
    restored: list[int | str | None]
    """Per URL the step, None, or the error's class and text; a step counts only if all its state is right."""


def run(*orders: Orders) -> list[Outcome]:
    """Run a job of one rank per order to its end."""
    forking = context()
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank, order in enumerate(orders):
            ours, theirs = forking.Pipe()
            process = forking.Process(target=_rank, args=(theirs, order, rank, len(orders), folder), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        deadline, outcomes = time.monotonic() + LIMIT_S, []
        for pipe, process in zip(pipes, processes, strict=True):
            try:
                events, restored = pipe.recv() if pipe.poll(max(0.0, deadline - time.monotonic())) else ([], [])
            except EOFError:
                events, restored = [], []
            process.join(max(0.1, deadline - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join()
            assert process.exitcode is not None
            outcomes.append(Outcome(process.exitcode, events, restored))
        return outcomes


def _rank(pipe: Connection, orders: Orders, rank: int, world_size: int, folder: str) -> None:
    _inject(orders)
    if orders.shm:
        mount_over(orders.shm, "/dev/shm")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    events: list[Event] = []
    restored: list[int | str | None] = []

    def on_event(event: Event) -> None:
        events.append(event)
        if orders.acked and isinstance(event, CheckpointSaved) and event.committed:
            with open(orders.acked, "a") as file:
                file.write(f"{event.step}\n")

    for url in orders.urls:
        checkpointer = ToldByEvents(
            url,
            replace(QUICK, commit_timeout_s=orders.commit_timeout_s, keep_last=orders.keep_last, **orders.settings),
            rank=rank,
            world_size=world_size,
            attempt_id=orders.attempt_id,
            on_event=on_event,
        )
        with checkpointer:
            if orders.restore:
                restored.append(_restore(checkpointer, rank, world_size, orders))
            for step in orders.save:
                durable = orders.durable is None or step in orders.durable
                checkpointer.save(step, replicated=state(step), local=local(step, rank), durable=durable)
                checkpointer.wait_copied()
            if orders.die_after:
                wanted, deadline = set(orders.die_after), time.monotonic() + LIMIT_S
                while not wanted <= {(e.step, e.tier) for e in events if isinstance(e, CheckpointSaved)}:
                    assert time.monotonic() < deadline, events
                    time.sleep(0.01)
                pipe.send(([{"kind": event.kind, **asdict(event)} for event in events], restored))
                dist.barrier()  # the others have seen it too
                os.kill(os.getpid(), signal.SIGKILL)
    pipe.send(([{"kind": event.kind, **asdict(event)} for event in events], restored))
    if not orders.save:
        dist.destroy_process_group()
    os._exit(0)  # a job of which a rank was killed cannot be left tidily


def _restore(checkpointer: ToldByEvents, rank: int, world_size: int, orders: Orders) -> int | str | None:
    into, memory = state(99) if orders.into else None, bool(orders.settings)
    try:
        back = checkpointer.restore("auto", into=into, any_world_size=orders.any_world_size)
    except OutlastError as error:
        return f"{type(error).__name__}: {error}"
    if back is None:
        return None
    own = local(back.step, rank) if back.world_size == world_size else {}
    right = same(back.replicated, state(back.step)) and same(back.local, own)
    within_reach = [rank] if memory and back.world_size == world_size else range(back.world_size)
    right = right and all(same(back.read_local(old), local(back.step, old)) for old in within_reach)
    return back.step if right else f"step {back.step}, but not its state"


CHANGES = ("put", "put_atomic", "sync_dirs", "remove", "remove_tree", "move_tree")
"""What a store does that changes something, or makes it durable."""


def _inject_death(before: int) -> None:
    """Die before one of the changes."""
    lock, seen = threading.Lock(), 0

    def counted(change: Callable[..., None]) -> Callable[..., None]:
        def change_or_die(store: LocalStore, first: Any, *rest: Any) -> None:
            nonlocal seen
            first = first if isinstance(first, str) else list(first)
            with lock:
                seen += bool(seen) or "step_00000002" in str(first)
                if seen == before:
                    os.kill(os.getpid(), signal.SIGKILL)
            change(store, first, *rest)

        return change_or_die

    for name in CHANGES:
        setattr(LocalStore, name, counted(getattr(LocalStore, name)))


def _inject(orders: Orders) -> None:
    put, put_atomic = LocalStore.put, LocalStore.put_atomic
    read, read_into = LocalStore.read, LocalStore.read_into

    written: list[str] = []

    def maybe_fail(path: str) -> None:
        if orders.die_at and orders.die_at in path:
            os.kill(os.getpid(), signal.SIGKILL)
        if orders.fail_at and orders.fail_at in path:
            written.append(path)
            if len(written) > orders.fail_after:
                raise OSError(28, "No space left on device")

    def put_or_die(store: LocalStore, path: str, parts: Sequence[Any]) -> None:
        maybe_fail(path)
        put(store, path, parts)

    def put_atomic_or_die(store: LocalStore, path: str, data: bytes) -> None:
        maybe_fail(path)
        put_atomic(store, path, data)

    def note(path: str) -> None:
        if orders.reads:
            with open(orders.reads, "a") as file:
                file.write(f"{path}\n")

    def read_wrongly(store: LocalStore, path: str, *bound: int) -> Any:
        note(path)
        data = read(store, path, *bound)
        if orders.misread and orders.misread in path:
            data[0] ^= 1
        return data

    def read_wrongly_into(
        store: LocalStore, path: str, out: memoryview, seen: Callable[[memoryview], object], bound: int
    ) -> bytes:
        note(path)

        def seen_wrongly(piece: memoryview) -> None:
            piece[0] ^= bool(orders.misread) and orders.misread in path
            seen(piece)

        return read_into(store, path, out, seen_wrongly, bound)

    LocalStore.put, LocalStore.put_atomic = put_or_die, put_atomic_or_die  # type: ignore[method-assign, assignment]
    LocalStore.read, LocalStore.read_into = read_wrongly, read_wrongly_into  # type: ignore[method-assign]
    if orders.die_voting:
        vote = CommitProtocol.vote

        def vote_or_die(protocol: CommitProtocol, header: dict[str, Any]) -> None:
            if header.get("serial") == orders.die_voting:
                os.kill(os.getpid(), signal.SIGKILL)
            vote(protocol, header)

        CommitProtocol.vote = vote_or_die  # type: ignore[method-assign]
    if orders.die_before:
        _inject_death(orders.die_before)
