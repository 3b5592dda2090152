"""Pushes a node's metrics by OTLP, as OpenTelemetry's own variables say."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable
from typing import Any

from outlast.diagnostics.export.metrics import BOUNDS_S, METRICS, Metric, NodeMetrics
from outlast.diagnostics.report.goodput import STEPS
from outlast.events import Record

CLOSE_S = 10.0
"""For the last push."""
_LOG = logging.getLogger("outlast.export")


class OpenTelemetryExporter:
    """Adds events up, and pushes the sums every ``OTEL_METRIC_EXPORT_INTERVAL`` ms, from a thread of the SDK.

    Args:
        metrics: what events are added to.
        run: the value of the attribute ``run``.

    Raises:
        ModuleNotFoundError: the SDK or its exporter is not installed.
    """

    name = "opentelemetry"

    def __init__(self, metrics: NodeMetrics, run: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        from opentelemetry.sdk.resources import Resource

        self._metrics = metrics
        self._labels = {"run": run}
        self._lock = threading.Lock()
        told_once = _ToldOnce()
        for handler in logging.getLogger().handlers:
            handler.addFilter(told_once)
        named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        resource = Resource.create({} if named else {"service.name": "outlast"})
        self._provider = MeterProvider([PeriodicExportingMetricReader(OTLPMetricExporter())], resource=resource)
        meter = self._provider.get_meter("outlast")
        for metric in METRICS:
            about = {"unit": _unit(metric), "description": metric.help}
            if metric.kind == "histogram":
                self._step_seconds = meter.create_histogram(
                    metric.name, explicit_bucket_boundaries_advisory=list(BOUNDS_S), **about
                )
            elif metric.kind == "counter":
                meter.create_observable_counter(metric.name, [self._observer(metric)], **about)
            else:
                meter.create_observable_gauge(metric.name, [self._observer(metric)], **about)

    def take(self, attempt: int, record: Record) -> None:
        """Add an event; the next push has it."""
        with self._lock:
            self._metrics.take(attempt, record)
        if record.kind in STEPS:
            self._step_seconds.record(float(record["step_s"]), self._labels)

    def lost(self, counter: str, exporter: str, events: int = 1) -> None:
        """Count events that another exporter lost: ``dropped_records`` or ``failures``."""
        with self._lock:
            self._metrics.add(f"outlast_export_{counter}", events, exporter)

    def close(self) -> None:
        """Push what is new, for ``CLOSE_S`` at most."""
        self._provider.shutdown(timeout_millis=CLOSE_S * 1e3)

    def _observer(self, metric: Metric) -> Callable[[Any], Iterable[Any]]:
        from opentelemetry.metrics import Observation

        def observe(_options: Any) -> Iterable[Any]:
            with self._lock:
                found = [one for one in self._metrics.samples() if one.metric == metric]
            for one in found:
                yield Observation(one.value, {**self._labels, **dict(zip(metric.labels, one.labels, strict=True))})

        return observe


class _ToldOnce(logging.Filter):
    """Of what the SDK has to say when nobody answers, each text once."""

    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it is new, or not the SDK's."""
        if not record.name.startswith("opentelemetry"):
            return True
        text = str(record.msg)
        if text in self._told:
            return False
        self._told.add(text)
        return True


def _unit(metric: Metric) -> str:
    return {"seconds": "s", "bytes": "By"}.get(metric.name.rpartition("_")[2], "1")
