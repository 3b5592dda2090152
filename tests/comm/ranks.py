"""Real ranks over gloo: processes that stay up and run the functions they are sent, and tell all when one fails.

They are forked from a server that has torch loaded, so that a world costs no import and little memory. A world starts
when it is first used. After a failure it is ended, and the next use starts a new one: one failure costs one test.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from tests.forked import context

LIMIT_S = 90.0
"""How long a call may take."""
GRACE_S = 5.0
"""How long the other ranks have to answer once one has failed."""
TAIL = 4000
"""Characters of what a rank wrote to stderr."""


class Ranks:
    """``world_size`` processes in one default group; ``run(f, *args)`` calls ``f(rank, *args)`` on all of them.

    Args:
        world_size: how many.
        prepare: called on every rank of a new world, before anything else.
        limit_s: how long a call may take.
    """

    def __init__(self, world_size: int, prepare: Callable[[int], None] | None = None, limit_s: float = LIMIT_S) -> None:
        self.world_size = world_size
        self.prepare = prepare
        self.limit_s = limit_s
        self._world: _World | None = None

    def start(self, function: Callable[..., Any], *args: object) -> None:
        """Have all ranks begin; their answers are waited for by ``result``."""
        if self._world is None:
            self._world = _World(self.world_size)
            if self.prepare is not None:
                self._world.send(self.prepare, ())
                self._gather(range(self.world_size))
        self._world.send(function, args)

    def ended(self, rank: int, limit_s: float) -> int | None:
        """Wait for a rank's process to end; its exit code, None if it has not."""
        assert self._world is not None
        process = self._world.processes[rank]
        process.join(limit_s)
        return process.exitcode

    def result(self, rank: int) -> Any:
        """What one rank answers, whatever has become of the others."""
        return self._gather([rank])[0]

    def run(self, function: Callable[..., Any], *args: object) -> list[Any]:
        """What all ranks answer. Raises AssertionError with what is known of every rank, and ends the world."""
        self.start(function, *args)
        return self._gather(range(self.world_size))

    def _gather(self, ranks: Iterable[int]) -> list[Any]:
        assert self._world is not None
        answers = self._world.answers(list(ranks), self.limit_s)
        if all(rank in answers and answers[rank][0] for rank in ranks):
            return [answers[rank][1] for rank in ranks]
        said = self._world.told(answers)
        self.close()
        raise AssertionError(said)

    def close(self) -> None:
        """End all processes; the next use starts new ones."""
        if self._world is not None:
            self._world.close()
            self._world = None


class _World:
    """The processes of one start. What they write to stderr is kept for the case that something fails."""

    def __init__(self, world_size: int) -> None:
        forking = context()
        self.size = world_size
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        # The store listens here before any rank looks for it: its port is nobody else's, and no rank's end takes it.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._pipes: list[Connection] = []
        self.processes = []
        self._found: dict[int, tuple[bool, Any]] = {}
        for rank in range(world_size):
            mine, theirs = forking.Pipe()
            told = (rank, world_size, self._store.port, str(self._stderr(rank)), theirs)
            process = forking.Process(target=_serve, args=told, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self.processes.append(process)

    def _stderr(self, rank: int) -> Path:
        return Path(self._folder.name) / f"rank_{rank}.err"

    def send(self, function: Callable[..., Any], args: tuple[object, ...]) -> None:
        self._found = {}
        for pipe in self._pipes:
            try:
                pipe.send((function, args))
            except BrokenPipeError:
                continue  # it has died, which the wait for its answer finds and tells

    def answers(self, ranks: list[int], limit_s: float) -> dict[int, tuple[bool, Any]]:
        """``(True, value)`` or ``(False, traceback)`` by rank; of those asked, the dead and the silent are missing.

        Once one has failed, all ranks have a few seconds to say what they know.
        """
        found, dead = self._found, set[int]()
        deadline, failed = time.monotonic() + limit_s, False
        while missing := {self._pipes[rank]: rank for rank in ranks if rank not in found and rank not in dead}:
            ready = wait(list(missing), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = missing[pipe]
                try:
                    found[rank] = pipe.recv()
                except (EOFError, ConnectionResetError):
                    dead.add(rank)
                if not failed and (rank in dead or not found[rank][0]):
                    failed = True
                    ranks = list(range(self.size))
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        return found

    def told(self, answers: dict[int, tuple[bool, Any]]) -> str:
        """What is known of every rank."""
        lines = [f"a call on {self.size} ranks failed:"]
        for rank, process in enumerate(self.processes):
            if rank in answers:
                ok, value = answers[rank]
                lines.append(f"rank {rank}: " + ("done" if ok else f"raised\n{value}"))
            else:
                process.join(0.5)
                lines.append(f"rank {rank}: {self._fate(rank)}")
            if written := self._stderr(rank).read_text(errors="replace"):
                lines.append(f"rank {rank} wrote to stderr:\n{written[-TAIL:]}")
        return "\n".join(lines)

    def _fate(self, rank: int) -> str:
        process = self.processes[rank]
        if process.exitcode is not None:
            name = f" ({signal.Signals(-process.exitcode).name})" if process.exitcode < 0 else ""
            return f"ended with exit code {process.exitcode}{name}"
        assert process.pid is not None
        state = psutil.Process(process.pid).status()
        before = self._stderr(rank).stat().st_size
        os.kill(process.pid, signal.SIGUSR1)
        deadline = time.monotonic() + 2
        while self._stderr(rank).stat().st_size == before and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.1)  # the rest of its stacks
        return f"has not answered; pid {process.pid} is {state}, its stacks, if it could write them, are below"

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()


def _serve(rank: int, world_size: int, port: int, stderr: str, pipe: Connection) -> None:
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
    faulthandler.enable(2)
    faulthandler.register(signal.SIGUSR1, 2)
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    try:
        # Whoever waits for a rank that never comes says so before the tests stop waiting for an answer.
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=LIMIT_S / 2))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    except Exception:
        pipe.send((False, traceback.format_exc()))
        return
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(rank, *args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
