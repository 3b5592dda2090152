"""The process beside a launcher that tells its node's events to Prometheus and others."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from outlast.diagnostics.export.config import ExportConfig
from outlast.diagnostics.export.installed import check_installed
from outlast.diagnostics.export.job import LONGEST_END_S, ExportJob, check_variables, read_token
from outlast.errors import PortInUse

RESTARTS = 5
"""How often the process is started again; it reads the events from the launch's beginning, so nothing is missing."""
PAUSE_S = 2.0
"""Before that."""
END_S = 10.0
"""How long the launcher waits for it at the end. A scheduler that has sent a notice may not wait longer; what is left
then is sent without the launcher."""
LISTENING = 64
"""Connections that may wait."""
PACKAGE_FOLDER = Path(__file__).parents[2]

log = logging.getLogger("outlast.launch")


class Exporting:
    """A process that exports, kept running until :meth:`close`. Training neither waits for it nor ends with it.

    Args:
        job: what it is told.
        listening: the socket of Prometheus' port, if asked for; it stays open over starts of the process.
    """

    def __init__(self, job: ExportJob, listening: socket.socket | None) -> None:
        self._job = job
        self._listening = listening
        self._closing = threading.Event()
        self._starting = threading.Lock()
        self._process = self._start()
        self._thread = threading.Thread(target=self._keep, name="outlast-exporting", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let it tell what is left, for ``END_S`` at most."""
        with self._starting:
            self._closing.set()
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            log.warning(
                "outlast: what exports metrics (pid %d) still sends what waits; it ends by itself, within %g s at most",
                self._process.pid,
                LONGEST_END_S,
            )
        self._thread.join(PAUSE_S + 1.0)
        if self._listening is not None:
            self._listening.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _start(self) -> subprocess.Popen[bytes]:
        """Its standard input is a pipe from this process alone: it ends when this process does, whatever ends that."""
        # Neither what lies in the user's folder nor a device is used: another module there may have the same name.
        environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, (environ.get("PYTHONPATH"), str(PACKAGE_FOLDER))))
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "outlast.diagnostics.export", self._job.to_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=() if self._job.socket_fd is None else (self._job.socket_fd,),
            env=environ,
            start_new_session=True,  # Ctrl-C is for the launcher
        )

    def _keep(self) -> None:
        """Start it again when it ends before its time."""
        for left in reversed(range(RESTARTS + 1)):
            status = self._process.wait()
            if self._closing.is_set():
                return
            how = f"exited with status {status}" if status >= 0 else f"was killed by signal {-status}"
            if left == 0:
                log.warning(
                    "outlast: what exports metrics %s too often: none are exported any more; training goes on", how
                )
                return
            log.warning("outlast: what exports metrics %s; it is started again, training goes on", how)
            # Trackers have what they were told; counts begin again, from all events.
            self._job = dataclasses.replace(self._job, trackers_since_t=time.time())
            if self._closing.wait(PAUSE_S):
                return
            with self._starting:
                if self._closing.is_set():
                    return
                self._process = self._start()


def start_exporting(
    settings: ExportConfig | None, run_dir: Path, agent: Path, *, steps_done: int
) -> contextlib.AbstractContextManager[Exporting | None]:
    """Start what is asked for; a context that ends it. Nothing is started where nothing is asked for.

    Args:
        settings: section ``[export]``.
        run_dir: the run's directory.
        agent: the file of this launcher's events.
        steps_done: the last step of earlier launches.

    Raises:
        MissingDependency: what is asked for is not installed.
        PortInUse: something listens on Prometheus' port.
        ConfigError: the token cannot be read, or a variable of OpenTelemetry's asks for what is not there.
    """
    if settings is None or not settings.targets:
        return contextlib.nullcontext()
    check_installed(settings)
    check_variables(settings, os.environ)
    listening = None
    if settings.prometheus_port is not None:
        token = read_token(settings)
        listening = _listen(settings.prometheus_port, "127.0.0.1" if token is None else "")
        host, port = listening.getsockname()[:2]
        log.warning("outlast: metrics at http://%s:%d/metrics%s", host, port, ", with the token" if token else "")
    job = ExportJob(
        run_dir=str(run_dir),
        settings=settings,
        since_t=time.time(),
        steps_done=steps_done,
        agent=str(agent),
        socket_fd=None if listening is None else listening.fileno(),
    )
    return Exporting(job, listening)


def _listen(port: int, address: str) -> socket.socket:
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((address, port))
        listening.listen(LISTENING)
    except OSError as error:
        listening.close()
        raise PortInUse(
            f"export.prometheus_port = {port} cannot be used: {os.strerror(error.errno or 0)}",
            "choose another, or 0 for a free one; each launcher on a machine needs its own",
        ) from error
    return listening
