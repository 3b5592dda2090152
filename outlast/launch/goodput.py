"""Tells where a program's wall time went, when its launch is over."""

from __future__ import annotations

import logging
from pathlib import Path

from outlast.errors import DiagnosticsError
from outlast.events import EventLog, GoodputMeasured

MOST_BYTES = 200 << 20
"""Events of longer runs take too long to read for that; the report has it."""

log = logging.getLogger("outlast.launch")


def tell_goodput(run_dir: Path, events: EventLog) -> None:
    """Write where the wall time of a run went, over all its launches, as an event. Nothing is raised: the run is over.

    The trainer's rank 0 does so with its report.
    """
    from outlast.diagnostics.report.goodput import goodput_of
    from outlast.diagnostics.report.load import load

    try:
        size = sum(path.stat().st_size for path in run_dir.glob("attempts/*/events/*.jsonl"))
        if size > MOST_BYTES:
            log.warning("outlast: the events take %d MB; `outlast report` divides their time", size >> 20)
            return
        goodput = goodput_of(load(run_dir))
    except (DiagnosticsError, OSError) as error:
        log.warning("outlast: goodput is not known: %s", error)
        return
    events.write(GoodputMeasured(wall_s=goodput.wall_s, seconds=goodput.seconds))
