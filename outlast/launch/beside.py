"""A process of outlast's own beside a launcher: what happens to it happens to it alone, and training never waits."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

RESTARTS = 5
"""How often the process is started again."""
PAUSE_S = 2.0
"""Before that."""
PACKAGE_FOLDER = Path(__file__).parents[2]

log = logging.getLogger("outlast.launch")


@dataclass(frozen=True, kw_only=True)
class Words:
    """How messages speak of the process."""

    what: str
    """Who it is: ``what exports metrics``."""
    gone: str
    """What it means that it is not started any more: ``none are exported any more``."""
    late: str
    """Why it may take longer than the launcher waits: ``still sends what waits``."""


class ProcessBeside:
    """``python -m MODULE JOB``, kept running until :meth:`close`. Training neither waits for it nor ends with it.

    Its standard input is a pipe from this process alone: it must end when that does, whatever ends this process.

    Args:
        module: what runs.
        job: called before each start; its argument is whether it is the first. Returns the process's own argument,
            which others can read: no secret is in it.
        words: for messages.
        end_s: how long :meth:`close` waits for its end.
        fds: file descriptors that it inherits.
        told: what it finds on its standard input, e.g. a secret; less than a pipe's 4096 atomic bytes.
    """

    def __init__(
        self,
        module: str,
        job: Callable[[bool], str],
        words: Words,
        *,
        end_s: float,
        fds: Sequence[int] = (),
        told: bytes = b"",
    ) -> None:
        self._module = module
        self._job = job
        self._words = words
        self._end_s = end_s
        self._fds = tuple(fds)
        self._told = told
        self._closing = threading.Event()
        self._starting = threading.Lock()
        self._process = self._start(is_first=True)
        self._thread = threading.Thread(target=self._keep, name=f"keeps {module}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let it end, and wait for that for ``end_s`` at most."""
        with self._starting:
            self._closing.set()
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(self._end_s)
        except subprocess.TimeoutExpired:
            log.warning("outlast: %s (pid %d) %s", self._words.what, self._process.pid, self._words.late)
        self._thread.join(PAUSE_S + 1.0)

    def _start(self, *, is_first: bool) -> subprocess.Popen[bytes]:
        # Neither what lies in the user's folder nor a device is used: another module there may have the same name.
        environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, (environ.get("PYTHONPATH"), str(PACKAGE_FOLDER))))
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", self._module, self._job(is_first)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=self._fds,
            env=environ,
            start_new_session=True,  # Ctrl-C is for the launcher
        )
        if self._told:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has ended at once, which is seen below
                process.stdin.write(self._told)
                process.stdin.flush()
        return process

    def _keep(self) -> None:
        """Start it again when it ends before its time."""
        for left in reversed(range(RESTARTS + 1)):
            status = self._process.wait()
            if self._closing.is_set():
                return
            how = f"exited with status {status}" if status >= 0 else f"was killed by signal {-status}"
            if left == 0:
                log.warning("outlast: %s %s too often: %s; training goes on", self._words.what, how, self._words.gone)
                return
            log.warning("outlast: %s %s; it is started again, training goes on", self._words.what, how)
            if self._closing.wait(PAUSE_S):
                return
            with self._starting:
                if self._closing.is_set():
                    return
                self._process = self._start(is_first=False)
