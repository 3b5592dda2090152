"""The process that tells a node's events to others: ``python -m outlast.diagnostics.export JSON``.

``outlast launch`` starts it. It reads the node's events from their files, so ranks and launcher never wait for it, and
whatever happens to it happens to it alone. It ends, when all is told, as soon as its standard input does: then the
launcher has ended, or was killed.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import threading

from outlast.diagnostics.export.job import LONGEST_END_S, ExportJob
from outlast.diagnostics.export.start import started

INTERVAL_S = 0.5
"""Between two looks at the files."""
NICE = 10
"""Training goes first."""


def main(arguments: list[str]) -> int:
    """Tell events until the standard input ends."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)  # they are for the launcher, whose end is this process's
    os.nice(NICE)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    running = started(ExportJob.from_json(arguments[0]))
    more, ended = False, False
    while not ended:
        if not more:
            ready, _, _ = select.select([sys.stdin], [], [], INTERVAL_S)
            ended = bool(ready) and not os.read(sys.stdin.fileno(), 4096)
        more = running.poll()
    last = threading.Timer(LONGEST_END_S, os._exit, [1])
    last.daemon = True
    last.start()
    running.close()
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # threads of clients that hang do not keep it
