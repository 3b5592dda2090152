"""The process that tells a node's events to others: ``python -m outlast.diagnostics.export JSON``.

``outlast launch`` starts it. It reads the node's events from their files, so ranks and launcher never wait for it, and
whatever happens to it happens to it alone. It ends, when all is told, as soon as its standard input does: then the
launcher has ended, or was killed.
"""

from __future__ import annotations

import os
import select
import sys
import threading

from outlast.diagnostics.beside import run_beside
from outlast.diagnostics.export.job import LONGEST_END_S, ExportJob
from outlast.diagnostics.export.start import started

INTERVAL_S = 0.5
"""Between two looks at the files."""


def main(arguments: list[str]) -> int:
    """Tell events until the standard input ends."""
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
    run_beside(main)
