"""The metrics of one node: what they are, and how events become them."""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from outlast.diagnostics.config import DiagnosticsConfig
from outlast.diagnostics.report.goodput import CAUSES, STEPS, Goodput
from outlast.diagnostics.report.load import STEP_FIELDS, UNTOLD, last_executions, row_of
from outlast.diagnostics.report.stragglers import rank_stragglers
from outlast.events import Record

Kind = Literal["counter", "gauge", "histogram"]


class Metric(NamedTuple):
    """One metric. Its name ends in its unit; that of a counter also in ``_total`` where it is served."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    """Besides ``run``, which each has."""


METRICS = (
    Metric("outlast_run_info", "gauge", "1; what runs on this node.", ("host", "device", "comm")),
    Metric("outlast_ranks", "gauge", "Ranks of the job that run on this node."),
    Metric("outlast_step", "gauge", "The newest step that is done."),
    Metric("outlast_step_seconds", "histogram", "How long steps took, of all ranks of the node."),
    Metric("outlast_loss", "gauge", "Newest loss: train, of the node's lowest rank, or held_out.", ("split",)),
    Metric("outlast_gradient_norm", "gauge", "Newest norm of the averaged gradient before clipping."),
    Metric("outlast_learning_rate", "gauge", "Newest learning rate."),
    Metric("outlast_tokens", "counter", "Tokens that the node's ranks processed, in steps done again too."),
    Metric("outlast_data_seconds", "counter", "Time that ranks waited for data, added up over the node's ranks."),
    Metric(
        "outlast_exposed_communication_seconds",
        "counter",
        "Communication that backward did not hide, added up over the node's ranks.",
    ),
    Metric(
        "outlast_collective_seconds",
        "counter",
        "Time with a collective under way, hidden or not, added up over the node's ranks; estimated in steps in which "
        "nobody looked.",
    ),
    Metric("outlast_codec_seconds", "counter", "Compression and decompression, added up over the node's ranks."),
    Metric(
        "outlast_checkpoint_blocked_seconds", "counter", "Time that checkpoints held ranks, added up over the node's."
    ),
    Metric("outlast_wire_bytes", "counter", "Bytes of gradient messages that the node's ranks sent."),
    Metric("outlast_dense_bytes", "counter", "What a ring all-reduce in fp32 would have sent instead."),
    Metric(
        "outlast_goodput_seconds",
        "counter",
        "Wall time of the run by cause, as this node saw it: average over nodes, do not add up.",
        ("cause",),
    ),
    Metric("outlast_restarts", "counter", "Starts of the node's ranks after a failure."),
    Metric("outlast_rank_failures", "counter", "Ranks of this node that failed: killed by a signal, or with an error."),
    Metric("outlast_verdicts", "counter", "Ranks that were found at fault, by syndrome.", ("syndrome",)),
    Metric("outlast_stragglers", "gauge", "Ranks of this node that are stragglers among its ranks, newest steps only."),
    Metric("outlast_checkpoints_saved", "counter", "Checkpoints that rank 0 saved, by tier.", ("tier",)),
    Metric("outlast_checkpoints_failed", "counter", "Saves that failed on a rank of the node, by tier.", ("tier",)),
    Metric("outlast_checkpoint_bytes", "counter", "Bytes of checkpoints that the node's ranks wrote.", ("tier",)),
    Metric("outlast_checkpoint_durable_step", "gauge", "The newest step that is committed in storage."),
    Metric("outlast_notices", "counter", "Orders to end, such as SIGTERM, that this node's launcher heard of."),
    Metric("outlast_events_lost", "counter", "Events of this node that could not be written."),
    Metric("outlast_last_event_timestamp_seconds", "gauge", "Time of the newest event, since the epoch."),
    Metric("outlast_export_dropped_records", "counter", "Events that an exporter had no room for.", ("exporter",)),
    Metric("outlast_export_failures", "counter", "Events that an exporter could not take.", ("exporter",)),
)
"""In the order in which they are served."""

BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0)
"""Upper bounds of the buckets of ``outlast_step_seconds``; then infinity."""
STRAGGLER_STEPS = 200
"""Stragglers are told by so many of the newest steps,"""
STRAGGLER_EVERY = 20
"""and judged again after so many."""

_OF_STEP = {
    "outlast_tokens": "tokens",
    "outlast_data_seconds": "data_s",
    "outlast_exposed_communication_seconds": "comm_s",
    "outlast_collective_seconds": "collective_s",
    "outlast_codec_seconds": "codec_s",
    "outlast_checkpoint_blocked_seconds": "checkpoint_s",
    "outlast_wire_bytes": "wire_bytes",
    "outlast_dense_bytes": "dense_bytes",
}
_FROM_START = ("outlast_restarts", "outlast_rank_failures", "outlast_notices", "outlast_events_lost")
"""Counters that are 0 before anything has happened, so that a first increase is seen."""
SYNDROMES = ("hang", "crash")

Labels = tuple[str, ...]


class Sample(NamedTuple):
    """A value of a metric; ``labels`` are those of :class:`Metric`, in its order."""

    metric: Metric
    labels: Labels
    value: float


@dataclass(slots=True)
class Histogram:
    """How many values fell into each bucket."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    """Of each bucket alone; the last is without bound."""
    total: float = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect.bisect_left(BOUNDS_S, value)] += 1
        self.total += value


class NodeMetrics:
    """Adds events up to metrics. Not thread-safe.

    Args:
        steps_done: the last step of the run before this launch.
        thresholds: when a rank counts as a straggler.
    """

    def __init__(self, *, steps_done: int = 0, thresholds: DiagnosticsConfig | None = None) -> None:
        self.goodput = Goodput(steps_done=steps_done)
        self.step_seconds = Histogram()
        self._values: dict[tuple[str, Labels], float] = {(name, ()): 0.0 for name in (*_FROM_START, *_OF_STEP)}
        self._values |= {("outlast_verdicts", (name,)): 0.0 for name in SYNDROMES}
        self._values |= {(f"outlast_checkpoints_{how}", ("storage",)): 0.0 for how in ("saved", "failed")}
        self._thresholds = thresholds or DiagnosticsConfig()
        self._lead: int | None = None
        self._started = False
        self._about: Labels = ("", "", "")
        self._rows: deque[list[float]] = deque()
        self._unjudged = 0
        self._inside_share: dict[int, float] = {}

    def take(self, attempt: int, record: Record) -> None:
        """Take the next event of the node, of its launcher (attempt 0) or a rank.

        Raises:
            KeyError, TypeError, ValueError: it lacks a value that its kind has.
        """
        self.goodput.take(attempt, record)
        self._values["outlast_last_event_timestamp_seconds", ()] = max(
            self._values.get(("outlast_last_event_timestamp_seconds", ()), 0.0), record.t
        )
        if record.kind in STEPS:
            self._step(attempt, record)
        elif take := getattr(self, f"_on_{record.kind}", None):
            take(record)

    def add(self, name: str, amount: float, *labels: str) -> None:
        """Add to a counter."""
        self._values[name, labels] = self._values.get((name, labels), 0.0) + amount

    def set(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge, or a counter that is kept elsewhere."""
        self._values[name, labels] = value

    def samples(self) -> Iterator[Sample]:
        """All values but the histogram's, metric by metric."""
        for metric in METRICS:
            if metric.name == "outlast_goodput_seconds":
                yield from (Sample(metric, (cause,), self.goodput.seconds[cause]) for cause in CAUSES)
            elif metric.name == "outlast_run_info":
                yield Sample(metric, self._about, 1.0)
            else:
                for (name, labels), value in self._values.items():
                    if name == metric.name:
                        yield Sample(metric, labels, value)

    def _step(self, attempt: int, record: Record) -> None:
        row = row_of(attempt, record)
        values = dict(zip(STEP_FIELDS, row[5:], strict=False))
        self.step_seconds.observe(values["step_s"])
        if math.isfinite(values["collective_s"]):
            self._inside_share[record.rank] = values["collective_s"] / max(values["step_s"], 1e-9)
        else:  # nobody looked: as much of it as of the step before
            values["collective_s"] = self._inside_share.get(record.rank, 0.0) * values["step_s"]
        for name, key in _OF_STEP.items():
            if math.isfinite(values[key]):
                self.add(name, values[key])
        if self._lead is None or record.rank <= self._lead:
            self._lead = record.rank
            self.set("outlast_step", float(record.fields["step"]))
            for name, key, labels in (
                ("outlast_loss", "loss", ("train",)),
                ("outlast_learning_rate", "lr", ()),
                ("outlast_gradient_norm", "grad_norm", ()),
            ):
                value = (UNTOLD | record.fields).get(key)
                if value is not None and (record.kind == "step" or math.isfinite(value)):
                    self.set(name, float(value), *labels)
            self._unjudged += 1
        self._rows.append(row)
        if self._unjudged >= STRAGGLER_EVERY:
            self._unjudged = 0
            self._judge()

    def _judge(self) -> None:
        newest = self._rows[-1][3]
        while self._rows and self._rows[0][3] <= newest - STRAGGLER_STEPS:
            self._rows.popleft()
        steps = last_executions(np.asarray(self._rows))
        found = rank_stragglers(steps, {}, self._thresholds) if len(steps.ranks) > 1 else ()
        self.set("outlast_stragglers", float(sum(one.straggler for one in found)))

    def _on_workers_started(self, record: Record) -> None:
        self.set("outlast_ranks", float(len(record["ranks"])))
        self._about = (str(record["host"]), *self._about[1:])
        if self._started:
            self.add("outlast_restarts", 1)
        self._started = True
        self._lead = None

    def _on_run_started(self, record: Record) -> None:
        host = self._about[0] or str(record["host"])
        self._about = (host, str(record["device"]), str(record["comm"]))

    def _on_eval(self, record: Record) -> None:
        self.set("outlast_loss", float(record["loss"]), "held_out")

    def _on_hang_found(self, record: Record) -> None:
        self.add("outlast_verdicts", 1, "hang")

    def _on_workers_failed(self, record: Record) -> None:
        self.add("outlast_rank_failures", len(record["ranks"]))
        crashed = sum(not str(reason).startswith("hung") for reason in record["reasons"])
        self.add("outlast_verdicts", crashed, "crash")

    def _on_checkpoint_saved(self, record: Record) -> None:
        tier = str(record.fields.get("tier", "storage"))
        self.add("outlast_checkpoint_bytes", float(record["size_bytes"]), tier)
        if record.rank == 0:
            self.add("outlast_checkpoints_saved", 1, tier)
        if record["committed"] and tier == "storage":
            self.set("outlast_checkpoint_durable_step", float(record["step"]))

    def _on_checkpoint_failed(self, record: Record) -> None:
        self.add("outlast_checkpoints_failed", 1, str(record.fields.get("tier", "storage")))

    def _on_notice(self, record: Record) -> None:
        self.add("outlast_notices", 1)

    def _on_events_lost(self, record: Record) -> None:
        self.add("outlast_events_lost", float(record["count"]))
