"""How processes that run beside a launcher begin and end: what exports metrics, and what serves the page."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable

NICE = 10
"""Training goes first."""


def run_beside(main: Callable[[list[str]], int]) -> None:
    """Run ``main`` with the command line's arguments as this whole process, which ends with its status.

    Signals are for the launcher, whose end is this process's: ``main`` returns when its standard input ends. Threads
    that are then still at work, answering a request or waiting for a server, do not keep it.
    """
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)
    os.nice(NICE)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    status = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)
