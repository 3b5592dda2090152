"""The thread that watches a node, and what its watching costs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from outlast.diagnostics.monitor.conditions import Conditions, NodeCondition
from outlast.diagnostics.monitor.findings import find
from outlast.diagnostics.monitor.sample import Sample, Sampler
from outlast.events import Event

MOST_SHARE = 0.02
"""Of one core, that samples may cost; a monitor that costs more takes fewer."""
LONGEST_INTERVAL_S = 30.0
SAMPLES_JUDGED = 10
MOST_FAILURES = 5
"""Samples in a row that fail for a reason nobody foresaw, after which no more are taken."""

log = logging.getLogger("outlast.monitor")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeMonitored(Event):
    """The node's monitor ends: what it saw, and what it cost."""

    kind: ClassVar[str] = "node_monitored"
    host: str
    samples: int
    cpu_s: float
    """CPU seconds of all samples."""
    longest_cpu_s: float
    """... and of the dearest one."""
    interval_s: float
    """Between two samples at the end."""
    absent: dict[str, str]
    """What is not seen on this node, and why."""
    untold: int
    """Events too many in a minute."""


class NodeMonitor:
    """Takes samples of a node in a thread of its own, and tells what changes. Nothing in it ends its process.

    Args:
        host: the node's name.
        shm_dir: of the run's heartbeats and rings; None without.
        tell: is given each change, in the monitor's thread.
        interval_s: between two samples.
        quiet_s: a rank that is silent for longer is looked at more closely.
        root: where ``proc``, ``sys`` and ``dev`` are.
    """

    def __init__(
        self,
        host: str,
        shm_dir: Path | None,
        tell: Callable[[NodeCondition], None],
        *,
        interval_s: float = 1.0,
        quiet_s: float = 8.0,
        root: Path = Path("/"),
    ) -> None:
        self._host = host
        self._tell = tell
        self._interval_s = interval_s
        self._sampler = Sampler(shm_dir, interval_s=interval_s, quiet_s=quiet_s, root=root)
        self._conditions = Conditions(host)
        self._lock = threading.Lock()
        self._ranks: tuple[Mapping[int, int], float] = {}, 0.0
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._costs_s: list[float] = []
        self._samples, self._cpu_s, self._longest_s = 0, 0.0, 0.0
        self.newest: Sample | None = None

    def watch(self, pids: Mapping[int, int]) -> None:
        """These processes were started just now for these ranks; none if all have ended."""
        self._ranks = dict(pids), time.monotonic()

    def start(self) -> None:
        """Begin to take samples."""
        self._thread = threading.Thread(target=self._run, name="outlast-node-monitor", daemon=True)
        self._thread.start()

    def look(self) -> list[NodeCondition]:
        """Take one sample; what changed, which has been told."""
        before_s = time.thread_time()
        pids, since_s = self._ranks
        sample = self.newest = self._sampler.look(pids, since_s)
        findings = find(sample)
        with self._lock:  # not while files are read: whoever asks what holds must not wait for a file system
            changes = self._conditions.look(findings, sample.t, sample.seconds)
        for one in changes:
            self._tell(one)
        self._count(time.thread_time() - before_s)
        return changes

    def current(self) -> list[NodeCondition]:
        """What holds on this node now, and what ended last; bounded."""
        with self._lock:
            return self._conditions.current()

    def close(self) -> NodeMonitored:
        """End the thread; what still holds is told as ended."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(self._interval_s + 5.0)  # a file system that hangs may hold it
        with self._lock:
            ended = self._conditions.end()
        for one in ended:
            self._tell(one)
        if self._thread is None or not self._thread.is_alive():
            self._sampler.close()
        return NodeMonitored(
            host=self._host,
            samples=self._samples,
            cpu_s=self._cpu_s,
            longest_cpu_s=self._longest_s,
            interval_s=self._interval_s,
            absent=self._sampler.absent,
            untold=self._conditions.untold,
        )

    def _run(self) -> None:
        failed = 0
        while not self._closing.wait(self._interval_s if self._samples else 0.0):
            try:
                self.look()
            except Exception as error:
                failed += 1
                self._samples += 1
                log.warning(
                    "outlast: a sample of the node failed: %s: %s; training goes on", type(error).__name__, error
                )
                if failed == MOST_FAILURES:
                    log.warning("outlast: no more samples of the node are taken")
                    return
            else:
                failed = 0

    def _count(self, cpu_s: float) -> None:
        """Take samples less often where they cost too much."""
        self._samples += 1
        self._cpu_s += cpu_s
        self._longest_s = max(self._longest_s, cpu_s)
        self._costs_s.append(cpu_s)
        if len(self._costs_s) < SAMPLES_JUDGED:
            return
        mean_s = sum(self._costs_s) / len(self._costs_s)
        self._costs_s.clear()
        if mean_s > MOST_SHARE * self._interval_s and self._interval_s < LONGEST_INTERVAL_S:
            self._interval_s = min(LONGEST_INTERVAL_S, 2 * self._interval_s)
            self._sampler.expect(self._interval_s)
            log.warning(
                "outlast: a sample of the node takes %.0f ms of CPU; from now on there is one every %g s",
                mean_s * 1e3,
                self._interval_s,
            )
