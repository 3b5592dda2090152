"""Processes that ranks started and left behind, such as workers of a data loader or a shell's children.

Such a process is known by a mark in its environment, which it inherits whatever session or parent it moves to, or,
where it has overwritten its environment, by its rank's session. What lacks both is not ours and is left alone. A
program that is meant to outlive its rank is started without them: ``env -u OUTLAST_STARTED_BY setsid PROGRAM``.

As a program, ``python orphans.py MARK``, this is the launcher's guard: it ends those processes if the launcher goes
without having done so, as of SIGKILL. Each line of its standard input is ``watch`` and the process ids of the ranks
that run now, or ``rest`` when the launcher has ended them; the end of the input means that the launcher has gone.
Nothing of outlast is imported, so that it is small.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MARK = "OUTLAST_STARTED_BY"
"""Environment variable that names the launcher's start whose ranks a process belongs to."""
END_S = 5.0
"""How long processes may take to die of SIGKILL before they are told about."""
_PAUSE_S = 0.02
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Orphan:
    """A process that outlived its rank."""

    pid: int
    command: str
    """The beginning of its command line."""

    def __str__(self) -> str:
        return f"{self.pid} ({self.command})"


def find_orphans(mark: str, sessions: Mapping[int, int]) -> list[Orphan]:
    """The living processes of ranks.

    Args:
        mark: what the value of ``MARK`` begins with.
        sessions: of each rank, which led a session, the process id and the time at which it was known to have ended, in
            the kernel's clock ticks since boot. What started later in such a session may be another program's, which
            was given the same number.
    """
    wanted = f"{MARK}={mark}".encode()
    found = []
    for name in os.listdir("/proc"):
        if not name.isdecimal() or int(name) == os.getpid():
            continue
        folder = Path("/proc", name)
        try:
            fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
            state, session, started_ticks = fields[0], int(fields[3]), int(fields[19])
            if state in "ZX" or folder.stat().st_uid != os.geteuid():
                continue
            ours = started_ticks <= sessions.get(session, -1)
            if not ours:
                ours = any(part.startswith(wanted) for part in (folder / "environ").read_bytes().split(b"\0"))
            if ours:
                words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                text = "".join(one if one.isprintable() else "?" for one in words.strip())
                found.append(Orphan(int(name), text[:_SHOWN_CHARACTERS]))
        except OSError:  # it has ended, or hides itself
            continue
    return found


def now_ticks() -> int:
    """Kernel clock ticks since boot."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))


def end_orphans(
    mark: str, sessions: Mapping[int, int], *, within_s: float = END_S
) -> tuple[list[Orphan], list[Orphan]]:
    """SIGKILL the living processes of ranks that have ended, and those that they start meanwhile.

    Returns:
        Those that were found, and of them those that were still there after ``within_s``.
    """
    deadline_s = time.monotonic() + within_s
    ended: dict[int, Orphan] = {}
    while (left := find_orphans(mark, sessions)) and time.monotonic() < deadline_s:
        for one in left:
            ended[one.pid] = one
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(one.pid, signal.SIGKILL)
        time.sleep(_PAUSE_S)
    return list(ended.values()), left


def shown(processes: Sequence[Orphan]) -> str:
    """The first of them, as text for people."""
    return ", ".join(map(str, processes[:4])) + (" …" if len(processes) > 4 else "")


class Guard:
    """The process that ends this launcher's ranks, and what they started, if the launcher dies.

    It has a session of its own, so that signals to the launcher's group do not reach it.

    Args:
        mark: of this launcher; its ranks' marks begin with it.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, mark: str) -> None:
        environ = {key: value for key, value in os.environ.items() if key != MARK}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, mark],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            env=environ,
            cwd="/",
        )

    def watch(self, pids: Iterable[int] = ()) -> None:
        """These ranks run now; without any, they are about to be started."""
        self._tell(" ".join(["watch", *map(str, pids)]) + "\n")

    def rest(self) -> None:
        """The launcher itself has ended the ranks and what they left."""
        self._tell("rest\n")

    def close(self) -> None:
        """End the guard, which ends the ranks unless it was told to rest."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)

    def _tell(self, text: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # somebody has killed it; the ranks go on
            self._process.stdin.write(text.encode())
            self._process.stdin.flush()


def main(mark: str) -> None:
    """The guard: see the docstring of this module."""
    for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(one, signal.SIG_IGN)  # of a scheduler, which sends them to all processes of a job
    watching, pids = False, list[int]()
    for line in sys.stdin:
        what, *words = line.split()
        watching, pids = what == "watch", [int(word) for word in words]
    if not watching:
        return
    ended, left = end_orphans(mark, dict.fromkeys(pids, now_ticks()))
    if ended:
        print(f"outlast: the launcher has gone; its ranks' processes were ended: {shown(ended)}", file=sys.stderr)
    if left:
        print(f"outlast: these do not die of SIGKILL: {shown(left)}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1])
