"""Serves a run's page from its directory, without its launcher: ``outlast report RUN --live``."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from outlast.diagnostics.page.address import address_of, make_token
from outlast.diagnostics.page.app import RunPages
from outlast.diagnostics.page.config import PageConfig
from outlast.diagnostics.port_token import read_token
from outlast.diagnostics.report.status import status_of
from outlast.diagnostics.wsgi import WsgiServer, listen

LOOK_S = 0.5
"""How soon Ctrl-C is noticed at the latest."""


def serve(run_dir: Path, settings: PageConfig, say: Callable[[str], None]) -> None:
    """Serve until ``KeyboardInterrupt``, which is the way to end it.

    Args:
        run_dir: the run's directory.
        settings: with a port.
        say: is told the address: with the token, if it is made here.

    Raises:
        DiagnosticsError: there is no such run, or it has no events.
        ConfigError: the token cannot be read.
        PortInUse: something listens on the port.
    """
    status_of(run_dir)  # a name that is wrong is told now
    assert settings.port is not None
    token = make_token() if settings.token_file is None else read_token(settings.token_file, "--token-file")
    listening = listen(settings.host, settings.port, "--port")
    server = WsgiServer(listening, RunPages(run_dir, token, settings.refresh_s))
    serving = threading.Thread(target=server.serve_forever, name="outlast-page-http", daemon=True)
    serving.start()
    try:
        say(address_of(listening, token if settings.token_file is None else ""))
        while serving.is_alive():
            serving.join(LOOK_S)
    except KeyboardInterrupt:
        pass
    finally:
        listening.close()
