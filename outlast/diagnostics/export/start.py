"""Builds the exporters that are asked for, and feeds them."""

from __future__ import annotations

import logging
import socket
import time
from pathlib import Path

from outlast.diagnostics.export.exporter import CLOSE_S, Exporter, Queued
from outlast.diagnostics.export.follow import NodeEvents
from outlast.diagnostics.export.job import ExportJob, read_token
from outlast.diagnostics.export.metrics import NodeMetrics
from outlast.diagnostics.export.opentelemetry import OpenTelemetryExporter
from outlast.diagnostics.export.prometheus import PrometheusExporter
from outlast.diagnostics.export.scalars import TrackerExporter
from outlast.diagnostics.export.trackers import TRACKERS
from outlast.events import Record

_LOG = logging.getLogger("outlast.export")


class Running:
    """Exporters, and the events that they are fed from.

    Args:
        events: the node's.
        exporters: in the order in which they are fed.
    """

    def __init__(self, events: NodeEvents, exporters: list[Exporter]) -> None:
        self._events = events
        self._exporters = exporters
        self._told: set[tuple[str, str]] = set()

    def poll(self) -> bool:
        """Feed what has come; returns whether there is more."""
        told, more = self._events.poll()
        for attempt, record in told:
            self._feed(attempt, record)
        return more

    def close(self) -> None:
        """Feed what there is, and end."""
        for attempt, record in self._events.drain():
            self._feed(attempt, record)
        deadline_s = time.monotonic() + CLOSE_S
        queued = [one for one in self._exporters if isinstance(one, Queued)]
        for one in queued:
            one.stop()
        for exporter in self._exporters:
            if not isinstance(exporter, Queued):
                exporter.close()
        for one in queued:
            one.close(max(0.0, deadline_s - time.monotonic()))
        if self._events.unreadable:
            _LOG.warning("outlast: %d lines were no events, and are in no metric", self._events.unreadable)

    def _feed(self, attempt: int, record: Record) -> None:
        for exporter in self._exporters:
            try:
                exporter.take(attempt, record)
            except (KeyError, TypeError, ValueError) as error:
                if (exporter.name, record.kind) not in self._told:
                    self._told.add((exporter.name, record.kind))
                    _LOG.warning("outlast: %s: an event %r was left out: %r", exporter.name, record.kind, error)


def started(job: ExportJob) -> Running:
    """Start what a job asks for.

    Raises:
        ModuleNotFoundError: something that is asked for is not installed; the launcher has looked before.
        ConfigError: the token cannot be read any more.
    """
    settings, run_dir = job.settings, Path(job.run_dir)
    events = NodeEvents(run_dir, Path(job.agent), since_t=job.since_t)
    counting: list[PrometheusExporter | OpenTelemetryExporter] = []
    if job.socket_fd is not None:
        listening = socket.socket(fileno=job.socket_fd)
        counting.append(PrometheusExporter(_metrics(job), job.run, listening, read_token(settings)))
    if settings.opentelemetry:
        counting.append(OpenTelemetryExporter(_metrics(job), job.run))

    def lost(counter: str, exporter: str) -> None:
        for one in counting:
            one.lost(counter, exporter)

    asked = [name for name in TRACKERS if name in settings.targets]
    for one in counting:  # from zero, so that a first loss is seen
        for name in asked:
            one.lost("dropped_records", name, 0)
            one.lost("failures", name, 0)
    trackers = [Queued(_tracker_exporter(job, name), settings.queue_records, lost) for name in asked]
    return Running(events, [*counting, *trackers])


def _metrics(job: ExportJob) -> NodeMetrics:
    return NodeMetrics(steps_done=job.steps_done, thresholds=job.thresholds)


def _tracker_exporter(job: ExportJob, name: str) -> Exporter:
    return TrackerExporter(name, job.trackers_since_t, lambda: TRACKERS[name](job), steps_done=job.steps_done)
