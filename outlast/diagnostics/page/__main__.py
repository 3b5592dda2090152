"""The process that serves a run's page: ``python -m outlast.diagnostics.page JSON``.

``outlast launch`` starts it. It reads the run's events from their files, so ranks and launcher never wait for it, and
whatever happens to it happens to it alone. It ends as soon as its standard input does: then the launcher has ended, or
was killed.
"""

from __future__ import annotations

import socket
import sys
import threading
from pathlib import Path

from outlast.diagnostics.beside import run_beside
from outlast.diagnostics.page.app import RunPages
from outlast.diagnostics.page.job import PageJob
from outlast.diagnostics.wsgi import WsgiServer


def main(arguments: list[str]) -> int:
    """Serve until the standard input ends; its first line is the token."""
    job = PageJob.from_json(arguments[0])
    token = sys.stdin.readline().strip()
    if not token:
        return 1
    listening = socket.socket(fileno=job.socket_fd)
    server = WsgiServer(listening, RunPages(Path(job.run_dir), token, job.refresh_s))
    threading.Thread(target=server.serve_forever, name="outlast-page-http", daemon=True).start()
    while sys.stdin.readline():
        pass
    return 0


if __name__ == "__main__":
    run_beside(main)
