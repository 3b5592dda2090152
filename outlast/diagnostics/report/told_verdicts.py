"""What launchers told while the job ran: who was slow, since when, and how much it cost until it was over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from outlast.diagnostics import formatting as fmt
from outlast.diagnostics.report.incidents import Incident
from outlast.diagnostics.syndromes.told import Story, VerdictGiven
from outlast.diagnostics.syndromes.verdict import NAMES, Culprit
from outlast.events import Record

VERDICT = "verdict"


def find_told(records: Iterable[Record], begin_t: float) -> tuple[Incident, ...]:
    """One incident for each verdict, oldest first.

    Args:
        records: events of launchers, oldest first.
        begin_t: first event of the run, seconds since the epoch.
    """
    newest: dict[tuple[object, ...], tuple[Record, Record]] = {}
    done: list[tuple[Record, Record]] = []
    for record in records:
        if record.kind != VerdictGiven.kind:
            continue
        name = _name(record)
        first = newest[name][0] if name in newest else record
        newest[name] = first, record
        if record.fields.get("state") == "ended":
            done.append(newest.pop(name))
    found = [_incident(first, last, begin_t) for first, last in (*done, *newest.values())]
    return tuple(sorted((one for one in found if one is not None), key=lambda one: one.at_s))


def open_verdicts(records: Iterable[Record]) -> list[Record]:
    """The verdicts that hold at the end of these events, oldest first: those that no later line or start has ended."""
    held: dict[tuple[object, ...], Record] = {}
    for record in records:
        if record.kind == "workers_started":
            held = {name: one for name, one in held.items() if one.generation == record.generation}
        elif record.kind == VerdictGiven.kind:
            held.pop(_name(record), None)
            if record.fields.get("state") != "ended":
                held[_name(record)] = record
    return list(held.values())


def _name(record: Record) -> tuple[object, ...]:
    get = record.fields.get
    return tuple(str(get(key)) for key in ("syndrome", "place", "ranks", "nodes", "role"))


def _culprit(fields: Mapping[str, Any]) -> Culprit:
    return Culprit(
        place=fields["place"],
        ranks=tuple(map(int, fields["ranks"])),
        nodes=tuple(map(str, fields["nodes"])),
        role=str(fields["role"]),
    )


def _incident(first: Record, last: Record, begin_t: float) -> Incident | None:
    """None where the event lacks something, as one of a version to come."""
    fields = last.fields
    try:
        culprit = _culprit(fields)
        who, name = str(culprit), NAMES[fields["syndrome"]]
        since, newest, cost_s = int(fields["step"]), int(fields["last_step"]), float(fields["cost_s"])
        evidence, cause = str(fields["evidence"]), str(fields["cause"])
    except (KeyError, TypeError, ValueError, IndexError):
        return None
    since = min(since, int(first.fields.get("step", since)))
    steps = max(1, newest - since + 1)
    by = "perhaps because of" if fields.get("cause_confidence") == "weak" else "because of"
    why = f", {by} {cause}" if cause else ""
    story = "; ".join(Story.of(fields).lines())
    return Incident(
        at_s=first.t - begin_t,
        kind=VERDICT,
        severity="warn",
        title=f"{name}: {who} since step {since}",
        detail=f"{evidence}; {story}{'; ' if story else ''}told while it ran, until step {newest}",
        step=since,
        rank=culprit.ranks[0] if len(culprit.ranks) == 1 else None,
        cause=f"{who}: {name} in steps {since} to {newest}{why}: {evidence}; {fmt.duration(cost_s * steps)} lost",
        cost_s=cost_s * steps,
        ranks=culprit.ranks,
    )
