"""An all-reduce between two processes on this machine, which shows that gloo and the recorder work."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from outlast.diagnostics.doctor.allreduce_probe import ELEMENTS
from outlast.diagnostics.live.shm import clear, ring_path, shm_directory
from outlast.errors import DiagnosticsError
from outlast.free_port import free_port

FIX = "read the message; the usual causes are a firewall on 127.0.0.1, a full /dev/shm or a broken torch"


@dataclass(frozen=True, kw_only=True)
class AllReduced:
    """How long it took, on the slower of the two ranks."""

    nbytes: int
    connect_s: float
    all_reduce_s: float
    whole_s: float
    """Includes starting both processes, importing torch, and ending them."""


def all_reduce(timeout_s: float) -> AllReduced:
    """Sum 1 MiB of ones over two gloo processes on the loopback interface. Neither outlives the call.

    Raises:
        DiagnosticsError: they could not be started, failed, returned a wrong sum, or took longer than ``timeout_s``.
    """
    command = [sys.executable, "-m", "outlast.diagnostics.doctor.allreduce_probe"]
    environ = {**os.environ, "GLOO_SOCKET_IFNAME": _loopback(), "OMP_NUM_THREADS": "1"}
    start_s = time.perf_counter()
    with contextlib.ExitStack() as stack:
        shm = stack.enter_context(_shared_memory())
        port = str(free_port())
        ranks = []
        for rank in range(2):
            process = subprocess.Popen(
                [*command, str(rank), port, str(ring_path(shm, rank))],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environ,
            )
            ranks.append(stack.enter_context(process))
            stack.callback(process.kill)  # runs before the process is waited for
        results = [json.loads(line) for line in _outputs(ranks, start_s + timeout_s, timeout_s)]
    if any(one["sum"] != 2.0 * ELEMENTS or not one["recorded"] for one in results):
        raise DiagnosticsError(f"the two ranks returned wrong results: {results}", FIX)
    return AllReduced(
        nbytes=4 * ELEMENTS,
        connect_s=max(one["connect_s"] for one in results),
        all_reduce_s=max(one["all_reduce_s"] for one in results),
        whole_s=time.perf_counter() - start_s,
    )


def _outputs(ranks: Sequence[subprocess.Popen[str]], deadline_s: float, timeout_s: float) -> list[str]:
    """The last line that each rank printed."""
    lines = []
    for rank, process in enumerate(ranks):
        try:
            out, err = process.communicate(timeout=max(0.1, deadline_s - time.perf_counter()))
        except subprocess.TimeoutExpired as error:
            raise DiagnosticsError(f"no result from the two ranks within {timeout_s:g} s", FIX) from error
        if process.returncode != 0:
            last = (err.strip().splitlines() or ["no message"])[-1]
            raise DiagnosticsError(f"rank {rank} exited with status {process.returncode}: {last}", FIX)
        lines.append(out.strip().splitlines()[-1])
    return lines


@contextlib.contextmanager
def _shared_memory() -> Iterator[Path]:
    """Shared memory of a temporary directory, so that concurrent checks do not interfere."""
    with tempfile.TemporaryDirectory(prefix="outlast-doctor-") as own:
        shm = shm_directory(own)
        try:
            yield shm
        finally:
            clear(shm)


def _loopback() -> str:
    """The name of the loopback interface."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == "127.0.0.1" for one in addresses):
            return str(name)
    return "lo"
