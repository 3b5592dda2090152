"""The node's monitor as the launcher runs it: what changes becomes events, and what lasts one line."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

from outlast.diagnostics.live import shm_directory
from outlast.diagnostics.monitor import NodeCondition, NodeMonitor
from outlast.errors import DiagnosticsError
from outlast.events import EventLog
from outlast.launch.config import LaunchConfig

TELL_AGAIN_S = 600.0
"""The same condition is told on the terminal at most this often; the events have all of it."""
WORTH_A_LINE = ("oom_kill", "ecc_errors", "clock_jumped", "time_set")
"""Of what happens once; lines of the kernel's log are left to the report."""

log = logging.getLogger("outlast.launch")


class NodeWatch:
    """Watches this node from the first start of its ranks to the end of the launcher.

    Args:
        run_dir: the run's directory, which names the shared memory.
        config: how often it looks.
        events: where changes are written.
        host: this node's name.
    """

    def __init__(self, run_dir: Path, config: LaunchConfig, events: EventLog, host: str) -> None:
        self._events = events
        self._host = host
        self._told_s: dict[tuple[str, str], float] = {}
        self._monitor: NodeMonitor | None = None
        self._started = False
        if config.node_sample_s <= 0:
            return
        try:
            shm_dir = shm_directory(run_dir) if config.watch else None
        except DiagnosticsError:
            shm_dir = None
        self._monitor = NodeMonitor(
            host, shm_dir, self._tell, interval_s=config.node_sample_s, quiet_s=config.hang_floor_s
        )

    def begin(self, pids: Mapping[int, int]) -> None:
        """These processes were started just now for these ranks."""
        if self._monitor is None:
            return
        self._monitor.watch(pids)
        if not self._started:
            self._started = True
            self._monitor.start()

    def rest(self) -> None:
        """The ranks have ended."""
        if self._monitor is not None:
            self._monitor.watch({})

    def current(self) -> list[NodeCondition]:
        """What holds on this node now, and what ended last; bounded."""
        return [] if self._monitor is None else self._monitor.current()

    def close(self) -> None:
        """The launcher ends."""
        if self._monitor is None:
            return
        told = self._monitor.close()
        self._monitor = None
        if told.samples:
            self._events.write(told)

    def _tell(self, one: NodeCondition) -> None:
        self._events.write(one)
        name, now_s = (one.what, one.key), time.monotonic()
        is_told = one.state == "lasts" or (one.state == "once" and one.what in WORTH_A_LINE)
        if not is_told or now_s - self._told_s.get(name, -TELL_AGAIN_S) < TELL_AGAIN_S:
            return
        self._told_s[name] = now_s
        how_long = f", for {one.seconds:.1f} s" if one.seconds else ""
        log.warning("outlast: node %s: %s%s", self._host, one.words, how_long)
