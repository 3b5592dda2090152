"""What an exporter is, and the queue before one that may be slow."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Protocol

from outlast.events import Record

CLOSE_S = 90.0
"""How long exporters may take at the end for what waits, all together. The launcher does not wait so long."""
_LOG = logging.getLogger("outlast.export")


class Exporter(Protocol):
    """Takes events and tells others of them."""

    name: str
    """That of its extra, e.g. ``tensorboard``."""

    def take(self, attempt: int, record: Record) -> None:
        """Take the next event, of the node's launcher (attempt 0) or of one of its ranks."""

    def close(self) -> None:
        """Tell what has not been told yet, and end."""


class Queued:
    """An exporter in a thread of its own, behind a bounded queue: the others do not wait for it, and nor does training.

    What it has no room for is dropped and counted; what it raises is counted, and the first of its kind is told.

    Args:
        exporter: the one in that thread.
        records: how many events may wait.
        on_lost: called with the name of a counter, ``dropped_records`` or ``failures``, for each event lost.
    """

    def __init__(self, exporter: Exporter, records: int, on_lost: Callable[[str, str], None]):
        self.name = exporter.name
        self._exporter = exporter
        self._on_lost = on_lost
        self._queue: queue.Queue[tuple[int, Record]] = queue.Queue(records)
        self._closing = threading.Event()
        self._told: set[str] = set()
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name=f"outlast-export-{self.name}", daemon=True)
        self._thread.start()

    def take(self, attempt: int, record: Record) -> None:
        """Queue an event, or drop it."""
        try:
            self._queue.put_nowait((attempt, record))
        except queue.Full:
            self._dropped += 1
            self._on_lost("dropped_records", self.name)
            self._tell_once(
                "dropped", f"{self._queue.maxsize} events wait already (export.queue_records); more are dropped"
            )

    def stop(self) -> None:
        """Let it end when nothing waits any more."""
        self._closing.set()

    def close(self, within_s: float = CLOSE_S) -> None:
        """Give it ``within_s`` for what waits; then it is left."""
        self._closing.set()
        self._thread.join(within_s)
        left = self._queue.qsize()
        if self._thread.is_alive() or self._dropped or left:
            _LOG.warning(
                "outlast: %s: %d events were dropped, and %d were not told before the end%s; the run's events have "
                "them all",
                self.name,
                self._dropped,
                left,
                ", because it takes too long" if self._thread.is_alive() else "",
            )

    def _run(self) -> None:
        while not (self._closing.is_set() and self._queue.empty()):
            self._take_next()
        try:
            self._exporter.close()
        except Exception as error:
            self._tell_once("close", f"{type(error).__name__} at the end: {error}")

    def _take_next(self) -> None:
        try:
            attempt, record = self._queue.get(timeout=0.2)
        except queue.Empty:
            return
        try:
            self._exporter.take(attempt, record)
        except Exception as error:
            self._on_lost("failures", self.name)
            self._tell_once(type(error).__name__, f"an event was not exported: {type(error).__name__}: {error}")

    def _tell_once(self, what: str, text: str) -> None:
        if what not in self._told:
            self._told.add(what)
            _LOG.warning("outlast: %s: %s; training goes on", self.name, text)
