"""Jobs of FSDP2 ranks over gloo, forked from a server that has torch and DTensor loaded."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any, Self

import torch
import torch._dynamo  # the first DTensor imports it, which takes a second; here it is done once for all ranks
import torch.distributed as dist

from outlast.checkpoint import CheckpointConfig, Checkpointer
from outlast.checkpoint.peers.collectives import Agreement
from outlast.checkpoint.storage.local import LocalStore
from outlast.events import Event
from tests.checkpoint.ranks import LIMIT_S
from tests.forked import context

CONFIG = CheckpointConfig(commit_timeout_s=60.0, keep_last=0, io_threads=2, chunk_mb=0.0003, pack_below_kb=0.1)
"""Chunks of 300 bytes, so that some shards are several; scalars are packed, biases are not."""


def run(world_size: int, function: Callable[..., Any], *args: object) -> list[Any]:
    """``function(rank, *args)`` on so many ranks of a job of its own; what each returns, by rank."""
    forking = context()
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            ours, theirs = forking.Pipe()
            process = forking.Process(
                target=_rank, args=(theirs, rank, world_size, folder, function, args), daemon=True
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        deadline, found = time.monotonic() + LIMIT_S, []
        try:
            for rank, pipe in enumerate(pipes):
                assert pipe.poll(max(0.0, deadline - time.monotonic())), f"rank {rank} of {world_size} does not answer"
                ok, value = pipe.recv()
                assert ok, f"rank {rank}:\n{value}"
                found.append(value)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return found


def _rank(
    pipe: Connection, rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        pipe.send((True, function(rank, *args)))
    except Exception:
        pipe.send((False, traceback.format_exc()))
    time.sleep(LIMIT_S)  # a group of which one rank is gone is an error for the others; all are killed in the end
    os._exit(1)


def checkpointer(url: str, rank: int, events: list[Event] | None = None, **settings: Any) -> Checkpointer:
    on_event = (lambda event: None) if events is None else events.append
    ranks = dist.get_world_size()
    attempt_id = settings.pop("attempt_id", f"of {ranks}")
    return Checkpointer(
        url, replace(CONFIG, **settings), rank=rank, world_size=ranks, attempt_id=attempt_id, on_event=on_event
    )


class Sent:
    """What this rank is sent from other nodes' memory, in bytes."""

    def __init__(self) -> None:
        self.bytes = 0
        self._transfer = Agreement.transfer

    def __enter__(self) -> Self:
        def transfer(agreement: Agreement, *about: Any) -> Any:
            got = self._transfer(agreement, *about)
            self.bytes += got.nbytes if got is not None else 0
            return got

        Agreement.transfer = transfer  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        Agreement.transfer = self._transfer  # type: ignore[method-assign]


class Counting:
    """What this rank reads of chunks, in bytes, by file."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}
        self._read, self._read_into = LocalStore.read, LocalStore.read_into

    def __enter__(self) -> dict[str, int]:
        def count(path: str, nbytes: int) -> None:
            if path.rpartition("/")[2].startswith("c.") and "/packed/" not in path:
                self.bytes[path.partition("/")[2]] = nbytes

        def read(store: LocalStore, path: str, *bound: int) -> Any:
            data = self._read(store, path, *bound)
            count(path, len(data))
            return data

        def read_into(store: LocalStore, path: str, out: memoryview, seen: Any, bound: int) -> bytes:
            end = self._read_into(store, path, out, seen, bound)
            count(path, len(out) + len(end))
            return end

        LocalStore.read, LocalStore.read_into = read, read_into  # type: ignore[method-assign]
        return self.bytes

    def __exit__(self, *error: object) -> None:
        LocalStore.read, LocalStore.read_into = self._read, self._read_into  # type: ignore[method-assign]
