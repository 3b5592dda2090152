"""The process beside the first node's launcher that serves the run's page."""

from __future__ import annotations

import contextlib
import logging
import socket
from pathlib import Path
from types import TracebackType
from typing import Self

from outlast.diagnostics.page.address import FILE, address_of, make_token, remove_address, write_address
from outlast.diagnostics.page.config import PageConfig
from outlast.diagnostics.page.job import PageJob
from outlast.diagnostics.port_token import read_token
from outlast.diagnostics.wsgi import listen
from outlast.errors import PortInUse, RunDirectoryError
from outlast.launch.beside import ProcessBeside, Words

END_S = 5.0
"""How long the launcher waits for it at the end; it has nothing to finish."""
WORDS = Words(what="what serves the page", gone="it is not served any more", late="has not ended yet")

log = logging.getLogger("outlast.launch")


class ServingPage:
    """Serves the page while this launcher is the first node's.

    Args:
        settings: section ``[page]``, with a port.
        run_dir: the run's directory.

    Raises:
        ConfigError: the token cannot be read.
    """

    def __init__(self, settings: PageConfig, run_dir: Path) -> None:
        self._settings = settings
        self._run_dir = run_dir
        path = settings.token_file
        self._token = make_token() if path is None else read_token(path, "page.token_file")
        self._listening: socket.socket | None = None
        self._process: ProcessBeside | None = None
        self._address = ""

    def start(self) -> None:
        """Listen, say where, and serve.

        Raises:
            PortInUse: something listens on the port.
            RunDirectoryError: the address cannot be written into the run's directory.
        """
        assert self._settings.port is not None
        listening = listen(self._settings.host, self._settings.port, "page.port")
        address = address_of(listening, self._token)
        try:
            path = write_address(self._run_dir, address)
        except OSError as error:
            listening.close()
            raise RunDirectoryError(
                f"{self._run_dir / FILE}, the page's address, cannot be written: {error.strerror}",
                "make room, or leave page.port out",
            ) from error
        job = PageJob(
            run_dir=str(self._run_dir), refresh_s=self._settings.refresh_s, socket_fd=listening.fileno()
        ).to_json()
        self._process = ProcessBeside(
            "outlast.diagnostics.page",
            lambda is_first: job,
            WORDS,
            end_s=END_S,
            fds=(listening.fileno(),),
            told=self._token.encode() + b"\n",
        )
        self._listening, self._address = listening, address
        log.warning("outlast: page at %s, with the token; the whole address is in %s", address_of(listening), path)

    def lead(self, *, is_first: bool) -> None:
        """The nodes have met: serve on the first one alone. What fails is told, and training goes on."""
        if is_first and self._process is None:
            try:
                self.start()
            except (PortInUse, RunDirectoryError) as error:
                log.error("outlast: the page is not served: %s", str(error).replace("\n", "; "))
        elif not is_first:
            self.close()

    def close(self) -> None:
        """Serve no more; closing twice is harmless."""
        if self._process is not None:
            self._process.close()
            self._process = None
        if self._listening is not None:
            self._listening.close()
            self._listening = None
            remove_address(self._run_dir, self._address)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def serving_page(
    settings: PageConfig | None, run_dir: Path, *, alone: bool
) -> contextlib.AbstractContextManager[ServingPage | None]:
    """A context that ends it; None where it is not asked for.

    Args:
        settings: section ``[page]``.
        run_dir: the run's directory.
        alone: whether no other node can be the first one, so that what is wrong is an error before any rank starts.

    Raises:
        ConfigError: the token cannot be read.
        PortInUse, RunDirectoryError: see :meth:`ServingPage.start`.
    """
    if settings is None or settings.port is None:
        return contextlib.nullcontext()
    page = ServingPage(settings, run_dir)
    if alone:
        page.start()
    return page
