"""Events as numbers by name and step, for trackers of experiments; and the exporter that feeds one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from outlast.diagnostics.report.goodput import STEPS, Goodput
from outlast.events import Record

NAMES = {
    "loss": "train/loss",
    "grad_norm": "train/gradient_norm",
    "update_norm": "train/update_norm",
    "lr": "train/learning_rate",
    "tokens": "train/tokens",
    "step_s": "time/step_s",
    "data_s": "time/data_s",
    "comm_s": "time/exposed_communication_s",
    "checkpoint_s": "time/checkpoint_s",
    "collective_s": "time/collective_s",
    "codec_s": "time/codec_s",
    "wire_bytes": "comm/wire_bytes",
    "dense_bytes": "comm/dense_bytes",
    "alpha": "comm/contraction",
    "residual": "comm/residual",
}
"""Of a step's event: field, and name in a tracker."""
GOODPUT_EVERY_S = 10.0
"""Goodput is told this often at most, in the events' own time."""
RETRY_S = 60.0
"""After a tracker could not be opened, it is tried again no sooner than this."""


class Tracker(Protocol):
    """A client of one of the programs that keep numbers of experiments."""

    def log(self, step: int, t: float, values: Mapping[str, float]) -> None:
        """Keep numbers of a step; ``t`` is when they were told, in seconds since the epoch."""

    def close(self) -> None:
        """Send what waits."""


class TrackerExporter:
    """Tells a tracker what rank 0 tells, and the launcher of its node.

    It is opened by the first word of rank 0, so of a job's nodes one has it. Steps that a restart does again are told
    again, with their number.

    Args:
        name: the extra.
        since_t: older events have been told already.
        open_tracker: opens the tracker.
        steps_done: the last step of earlier launches.
    """

    def __init__(self, name: str, since_t: float, open_tracker: Callable[[], Tracker], *, steps_done: int = 0) -> None:
        self.name = name
        self._since_t = since_t
        self._open = open_tracker
        self._tracker: Tracker | None = None
        self._failed_s = -math.inf
        self._error: Exception | None = None
        self._goodput = Goodput(steps_done=steps_done)
        self._told_t = -math.inf
        self._step = steps_done
        self._restarts = 0

    def take(self, attempt: int, record: Record) -> None:
        """Tell the tracker.

        Raises:
            Exception: whatever the tracker raises, also while it cannot be opened.
        """
        self._goodput.take(attempt, record)
        if record.kind == "workers_started" and record.generation > 0:
            self._restarts += 1
        if record.rank != 0:
            return
        values = dict(scalars_of(record))
        self._step = step = int(record.fields.get("step", self._step))
        if record.kind in STEPS and record.t - self._told_t >= GOODPUT_EVERY_S:
            self._told_t = record.t
            values |= self._totals()
        if values and record.t >= self._since_t:
            self._opened().log(step, record.t, values)

    def close(self) -> None:
        """Tell the last totals, and close the tracker."""
        if self._tracker is not None:
            self._goodput.finish()
            self._tracker.log(self._step, time.time(), self._totals())
            self._tracker.close()

    def _totals(self) -> dict[str, float]:
        parts = {f"goodput/{cause}_s": seconds for cause, seconds in self._goodput.seconds.items()}
        return {**parts, "launch/restarts": float(self._restarts)}

    def _opened(self) -> Tracker:
        if self._tracker is None:
            if self._error is not None and time.monotonic() - self._failed_s < RETRY_S:
                raise self._error
            try:
                self._tracker = self._open()
            except Exception as error:
                self._error, self._failed_s = error, time.monotonic()
                raise
        return self._tracker


def scalars_of(record: Record) -> Mapping[str, float]:
    """The numbers in an event, by their names in trackers; none for most kinds."""
    fields: Mapping[str, Any] = record.fields
    if record.kind in STEPS:
        return {NAMES[key]: float(value) for key, value in fields.items() if key in NAMES and value is not None}
    if record.kind == "eval":
        return {"eval/loss": float(fields["loss"]), "time/evaluation_s": float(fields["seconds"])}
    if record.kind == "logged":
        return {str(name): float(value) for name, value in fields["values"].items()}
    if record.kind == "checkpoint_saved" and fields.get("committed"):
        return {f"checkpoint/{key}": float(fields[key]) for key in ("blocked_s", "durable_s", "size_bytes")}
    return {}
