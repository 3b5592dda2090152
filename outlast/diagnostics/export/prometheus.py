"""Serves a node's metrics to Prometheus."""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from outlast.diagnostics.export.metrics import BOUNDS_S, METRICS, Histogram, Metric, NodeMetrics, Sample
from outlast.diagnostics.port_token import carries
from outlast.diagnostics.wsgi import Wsgi, WsgiServer
from outlast.events import Record


class PrometheusExporter:
    """Adds events up, and answers ``GET /metrics`` on a socket.

    Args:
        metrics: what events are added to.
        run: the value of the label ``run``.
        listening: a bound TCP socket, which listens; it is closed with the exporter.
        token: what a request must carry as ``Authorization: Bearer TOKEN``; None asks for nothing.

    Raises:
        ModuleNotFoundError: ``prometheus_client`` is not installed.
    """

    name = "prometheus"

    def __init__(self, metrics: NodeMetrics, run: str, listening: socket.socket, token: str | None = None) -> None:
        from prometheus_client import CollectorRegistry, make_wsgi_app

        self._metrics = metrics
        self._run = run
        self._lock = threading.Lock()
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        app: Wsgi = make_wsgi_app(registry)
        self._server = WsgiServer(listening, app if token is None else _guarded(app, token))
        self._thread = threading.Thread(target=self._server.serve_forever, name="outlast-prometheus", daemon=True)
        self._thread.start()

    def take(self, attempt: int, record: Record) -> None:
        """Add an event; the next request sees it."""
        with self._lock:
            self._metrics.take(attempt, record)

    def lost(self, counter: str, exporter: str, events: int = 1) -> None:
        """Count events that another exporter lost: ``dropped_records`` or ``failures``."""
        with self._lock:
            self._metrics.add(f"outlast_export_{counter}", events, exporter)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()

    def describe(self) -> list[Any]:
        """For ``prometheus_client``: names are not known before events."""
        return []

    def collect(self) -> Iterator[Any]:
        """For ``prometheus_client``: all metrics as they are now."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        with self._lock:
            samples = list(self._metrics.samples())
            step_seconds = Histogram(list(self._metrics.step_seconds.counts), self._metrics.step_seconds.total)
        grouped: dict[Metric, list[Sample]] = {}
        for one in samples:
            grouped.setdefault(one.metric, []).append(one)
        for metric, found in grouped.items():
            kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = kind(metric.name, metric.help, labels=("run", *metric.labels))
            for one in found:
                family.add_metric((self._run, *one.labels), one.value)
            yield family
        (metric,) = (one for one in METRICS if one.kind == "histogram")
        family = HistogramMetricFamily(metric.name, metric.help, labels=("run",))
        family.add_metric((self._run,), _cumulative(step_seconds), step_seconds.total)
        yield family


def _cumulative(histogram: Histogram) -> list[tuple[str, float]]:
    total, buckets = 0, []
    for bound, count in zip((*BOUNDS_S, math.inf), histogram.counts, strict=True):
        total += count
        buckets.append(("+Inf" if bound == math.inf else repr(bound), float(total)))
    return buckets


def _guarded(app: Wsgi, token: str) -> Wsgi:
    def guarded(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if carries(environ, token):
            return app(environ, start_response)
        start_response("401 Unauthorized", [("Content-Type", "text/plain"), ("WWW-Authenticate", "Bearer")])
        return [b"this port asks for the token of export.prometheus_token_file: Authorization: Bearer TOKEN\n"]

    return guarded
