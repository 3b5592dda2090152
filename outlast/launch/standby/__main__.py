"""A standby: ``python -m outlast.launch.standby [-m] TARGET ARGUMENTS…`` imports, waits, and becomes a rank.

The arguments are those of :mod:`outlast.launch.runner`, which runs the program once the launcher gives the order. Until
then nothing of the program's own is executed, CUDA is not touched, and no random number is drawn. It ends when the
launcher's side of the socket closes; if the launcher is killed, the kernel kills it too.
"""

from __future__ import annotations

import importlib
import io
import os
import socket
import sys
import time
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from outlast.launch import imports, runner
from outlast.launch.standby import reads
from outlast.launch.standby.message import SOCKET, is_readable, receive, send

IMPORTING, WAITING = "outlast-imports", "outlast-standby"
"""Names of the process for ``ps`` and ``top`` until it is a rank; at most 15 characters."""
SHARE = 0.25
"""Of one core is what the imports take at most while all cores are busy: with the ranks' training, for example."""
BUSY = 0.75
"""Processes that want to run, per core, from which all cores count as busy."""
_LOOK_S = 60.0
_COMM = Path("/proc/self/comm")


class Throttle(MetaPathFinder):
    """Sleeps between imports, so that they take no more than a share of one core where there are not enough.

    A lower priority would be simpler, but who is not root cannot raise it again when the process becomes a rank.

    Args:
        channel: the sleep ends when the launcher goes.
    """

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._busy_load = BUSY * len(os.sched_getaffinity(0))
        self._used_s = time.process_time()
        self._owed_s = 0.0

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """Always None, after a sleep if one is due."""
        now_s = time.process_time()
        if os.getloadavg()[0] >= self._busy_load:
            self._owed_s += (now_s - self._used_s) * (1.0 / SHARE - 1.0)
        self._used_s = now_s
        if self._owed_s > 0.02:
            if is_readable(self._channel, min(self._owed_s, _LOOK_S)):
                sys.exit(0)  # before the report there are no orders: the launcher does not want it any more
            self._owed_s = 0.0
        return None


def prepare(channel: socket.socket, plan: dict[str, Any]) -> imports.Changes:
    """Import what the plan names and report it; returns what the imports have changed in the environment."""
    throttle = Throttle(channel)
    sys.meta_path.insert(0, throttle)
    reads.begin()
    try:
        made, failed = imports.import_again(plan["modules"], plan["environ"])
    finally:
        read = reads.end()
        sys.meta_path.remove(throttle)
    _COMM.write_text(WAITING)
    torch = sys.modules.get("torch")
    send(
        channel,
        {
            "read": sorted(read),
            "failed": failed,
            "cuda": bool(torch is not None and torch.cuda.is_initialized()),
        },
    )
    return made


def become(order: dict[str, Any], descriptors: list[int], made: imports.Changes) -> None:
    """Take the place of a rank that the launcher would have started anew: its environment, files and arguments."""
    sys.stdout.flush()
    sys.stderr.flush()
    for number, descriptor in enumerate(descriptors, 1):
        os.dup2(descriptor, number)
        os.close(descriptor)
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.write_through:
        sys.stdout.reconfigure(line_buffering=os.isatty(1))  # as the interpreter decides at its start
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environ"])
    imports.apply(made)
    sys.orig_argv[:] = order["command"]
    importlib.invalidate_caches()  # the user may have changed the program since


def main(arguments: list[str]) -> int:
    """See the docstring of this module."""
    channel = socket.socket(fileno=int(os.environ.pop(SOCKET)))
    channel.set_inheritable(False)
    own_name = _COMM.read_text().strip()
    _COMM.write_text(IMPORTING)
    sys.path[0] = runner.first_path(arguments)
    try:
        found = receive(channel, _LOOK_S)
        if found is None:
            return 0
        made = prepare(channel, found[0])
        while (found := receive(channel, _LOOK_S)) is None:
            pass
        send(channel, {"taken": True})
    except (EOFError, ConnectionError):
        return 0
    channel.close()
    _COMM.write_text(own_name)
    become(*found, made)
    return runner.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
