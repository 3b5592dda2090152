"""Real ranks over gloo: processes that stay up for a test session and run the functions they are sent."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

LIMIT_S = 90.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Ranks:
    """``world_size`` processes in one default group; ``run(f, *args)`` calls ``f(rank, *args)`` on all of them."""

    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        port = free_port()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def start(self, function: Callable[..., Any], *args: object) -> None:
        for pipe in self.pipes:
            pipe.send((function, args))

    def result(self, rank: int) -> Any:
        assert self.pipes[rank].poll(LIMIT_S), f"rank {rank} did not answer within {LIMIT_S:g} s"
        ok, value = self.pipes[rank].recv()
        assert ok, f"rank {rank}:\n{value}"
        return value

    def run(self, function: Callable[..., Any], *args: object) -> list[Any]:
        self.start(function, *args)
        return [self.result(rank) for rank in range(len(self.pipes))]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(rank: int, world_size: int, port: int, pipe: Connection) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(rank, *args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
