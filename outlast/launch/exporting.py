"""The process beside a launcher that tells its node's events to Prometheus and others."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from outlast.diagnostics.export.config import ExportConfig
from outlast.diagnostics.export.installed import check_installed
from outlast.diagnostics.export.job import LONGEST_END_S, ExportJob, check_variables, read_token
from outlast.diagnostics.wsgi import listen
from outlast.launch.beside import ProcessBeside, Words

END_S = 10.0
"""How long the launcher waits for it at the end. A scheduler that has sent a notice may not wait longer; what is left
then is sent without the launcher."""
WORDS = Words(
    what="what exports metrics",
    gone="none are exported any more",
    late=f"still sends what waits; it ends by itself, within {LONGEST_END_S:g} s at most",
)

log = logging.getLogger("outlast.launch")


class Exporting:
    """A process that exports, kept running until :meth:`close`. Training neither waits for it nor ends with it.

    It reads the events from the launch's beginning whenever it is started, so nothing is missing.

    Args:
        job: what it is told.
        listening: the socket of Prometheus' port, if asked for; it stays open over starts of the process.
    """

    def __init__(self, job: ExportJob, listening: socket.socket | None) -> None:
        self._job = job
        self._listening = listening
        fds = () if job.socket_fd is None else (job.socket_fd,)
        self._process = ProcessBeside("outlast.diagnostics.export", self._told, WORDS, end_s=END_S, fds=fds)

    def close(self) -> None:
        """Let it tell what is left, for ``END_S`` at most."""
        self._process.close()
        if self._listening is not None:
            self._listening.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _told(self, is_first: bool) -> str:
        if not is_first:  # trackers have what they were told; counts begin again, from all events
            self._job = dataclasses.replace(self._job, trackers_since_t=time.time())
        return self._job.to_json()


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
        host = "127.0.0.1" if token is None else ""
        listening = listen(host, settings.prometheus_port, "export.prometheus_port")
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
