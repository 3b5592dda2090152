"""The launcher's side of one standby."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outlast.errors import ConfigError
from outlast.launch.orphans import MARK
from outlast.launch.spec import LaunchSpec
from outlast.launch.standby.message import SOCKET, receive, send

RUNNER = ("-m", "outlast.launch.runner")
STANDBY = ("-m", "outlast.launch.standby")
TAKEN_S = 2.0
"""How long a standby may take to answer an order; one that is stopped, or swapped out, is given up."""
END_S = 5.0
OF_A_START = ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_ERROR_FILE")
"""Variables that differ in each start, as outlast's own do, which begin with ``OUTLAST_``; no package reads them."""
OF_A_PLACE = (
    "MASTER_ADDR",
    "MASTER_PORT",
    *("RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
)
"""Variables that may differ if nothing has read them while it was imported."""


def check_wanted(spec: LaunchSpec) -> None:
    """That standbys are possible where they are asked for by ``launch.standby = "on"``.

    Raises:
        ConfigError: they are not.
    """
    config = spec.effective()
    if config.standby != "on":
        return
    if not spec.is_program:
        why = "outlast's trainer has none"
    elif not Start(spec.command, {}).is_possible:
        why = "only a Python program that is watched has some: no other program, and none with launch.look_every_s 0"
    elif config.max_restarts == 0:
        why = "with launch.max_restarts 0 nothing is restarted"
    else:
        return
    raise ConfigError(f"there cannot be standby processes: {why}", "leave out --standby, or set launch.standby to auto")


@dataclass(frozen=True)
class Start:
    """How torchelastic started a rank."""

    arguments: tuple[str, ...]
    environ: Mapping[str, str] = field(repr=False)

    @property
    def is_possible(self) -> bool:
        """Whether a standby can become this rank: a Python program that outlast's runner runs."""
        return self._runner_at() > 0

    @property
    def command(self) -> tuple[str, ...]:
        """What the rank's process is in the end."""
        return self.arguments[self._runner_at() - 1 :]

    def of_standby(self) -> tuple[str, ...]:
        """The same for a standby."""
        at = self._runner_at()
        return (*self.arguments[:at], *STANDBY, *self.arguments[at + len(RUNNER) :])

    def _runner_at(self) -> int:
        pairs = zip(self.arguments, self.arguments[1:], strict=False)
        return next((at for at, pair in enumerate(pairs) if pair == RUNNER), -1)


class Standby:
    """A started process, which imports, then waits, then perhaps becomes a rank.

    Call it from the launcher's main thread: the kernel ends the process when the thread that started it ends.

    Args:
        start: of the rank whose place it may take.
        plan: what it imports.
        log: what it writes until it becomes a rank.

    Raises:
        OSError: the process cannot be started.
    """

    def __init__(self, start: Start, plan: Mapping[str, Any], log: Path) -> None:
        self._start = start
        self.log = log
        self.report: dict[str, Any] | None = None
        """What it has said of its imports; None before."""
        self._channel, theirs = socket.socketpair()
        environ = {key: value for key, value in start.environ.items() if key != MARK}
        environ[SOCKET] = str(theirs.fileno())
        with theirs, log.open("wb") as output:
            self.process = subprocess.Popen(
                start.of_standby(),
                env=environ,
                stdout=output,
                stderr=output,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        with contextlib.suppress(OSError):  # it has ended already, which is seen at the next look
            send(self._channel, dict(plan))

    def look(self) -> bool:
        """Read its report if it has come; returns whether the process still runs."""
        if self.report is None:
            with contextlib.suppress(EOFError, OSError):
                found = receive(self._channel, 0.0)
                self.report = found[0] if found is not None else None
        return self.process.poll() is None

    def refuses(self, start: Start) -> str:
        """Why it cannot become a rank that would be started so; empty if it can."""
        if not self.look():
            return f"its standby has ended with status {self.process.returncode}"
        if self.report is None:
            return "its standby had not imported everything yet"
        if start.arguments != self._start.arguments:
            return "its command has changed"
        old, new = self._start.environ, start.environ
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) == new.get(key) or key in OF_A_START or key.startswith("OUTLAST_"):
                continue
            if key not in OF_A_PLACE:
                return f"{key} has changed since its standby was started"
            if key in self.report["read"]:
                return f"{key} has changed, and a package that its standby has imported has read it"
        return ""

    def become(self, start: Start, stdout: int, stderr: int) -> bool:
        """Order it to become a rank; returns whether it does. If not, end it.

        Args:
            start: of the rank.
            stdout, stderr: descriptors for the rank's output.
        """
        order = {"environ": dict(start.environ), "command": list(start.command), "folder": os.getcwd()}
        try:
            send(self._channel, order, (stdout, stderr))
            taken = receive(self._channel, TAKEN_S) is not None
        except (EOFError, OSError):
            taken = False
        self._channel.close()
        return taken

    def end(self) -> None:
        """SIGKILL it and what its imports have started; it holds nothing that could be lost."""
        self._channel.close()
        with contextlib.suppress(ProcessLookupError):
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_S)
