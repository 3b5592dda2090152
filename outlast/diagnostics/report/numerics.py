"""What the watch on the run's numbers told, as rows of a report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from outlast.diagnostics.numerics.events import NUMERICS_KINDS, NotFinite, ReplicasDifferent
from outlast.diagnostics.report.incidents import Incident, names_of
from outlast.diagnostics.report.load import Loaded
from outlast.events import Record


@dataclass(frozen=True, kw_only=True)
class NumericsRow:
    """What was told of one step, by one or more ranks alike."""

    step: int
    at_s: float
    """Seconds since the first event of the run."""
    kind: str
    """The kind of the event, e.g. ``numerics_spike``."""
    severity: Literal["bad", "warn", "good"]
    told: str
    ranks: tuple[int, ...]
    """Those that told it."""


def numerics_of(loaded: Loaded, begin_t: float) -> tuple[NumericsRow, ...]:
    """All that was told, oldest first; what several ranks told alike is one row.

    Args:
        loaded: the run's events.
        begin_t: when the run began, seconds since the epoch.
    """
    grouped: dict[tuple[object, ...], list[Record]] = {}
    for attempt, record in loaded.others:
        if record.kind in NUMERICS_KINDS:
            get = record.fields.get
            grouped.setdefault((attempt, record.generation, record.kind, get("step"), get("told")), []).append(record)
    return tuple(sorted((_row(records, begin_t) for records in grouped.values()), key=lambda row: (row.at_s, row.step)))


def numerics_incidents(rows: tuple[NumericsRow, ...]) -> tuple[Incident, ...]:
    """Of those rows that are bad: values that are not finite, and replicas that differ."""
    titles = {
        NotFinite.kind: "values are not finite in step {}",
        ReplicasDifferent.kind: "replicas are not the same after step {}",
    }
    return tuple(
        Incident(
            at_s=row.at_s,
            kind=row.kind,
            severity="bad",
            title=(title := titles[row.kind].format(row.step)),
            detail=f"{row.told}; told by {names_of(row.ranks)}",
            step=row.step,
            cause=f"{title}: {row.told}",
        )
        for row in rows
        if row.kind in titles
    )


def _row(records: list[Record], begin_t: float) -> NumericsRow:
    first = records[0]
    get = first.fields.get
    is_bad = first.kind in (NotFinite.kind, ReplicasDifferent.kind)
    step = get("step")
    return NumericsRow(
        step=step if isinstance(step, int) else 0,
        at_s=min(one.t for one in records) - begin_t,
        kind=first.kind,
        severity="bad" if is_bad else "good" if get("state") == "over" else "warn",
        told=str(get("told") or first.kind),
        ranks=tuple(sorted({one.rank for one in records})),
    )
