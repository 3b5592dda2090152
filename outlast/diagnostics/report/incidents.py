"""What went wrong in a run, event by event, in order of time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from outlast.diagnostics import formatting as fmt
from outlast.diagnostics.report.load import Loaded, Steps
from outlast.diagnostics.report.node_causes import NodeCauses
from outlast.diagnostics.syndromes.blame import BlameKey, blame_key
from outlast.events import Record

Severity = Literal["bad", "warn", "good"]

SAME_RESTART_S = 60.0
"""Nodes that start their ranks within this time of each other belong to the same restart."""
MOST_CHARS = 240
"""Of somebody's words in the headline."""
_KILLED_BY = "killed by "
_LEFT = "exited with status 0"
_HUNG = "hung, killed"
LOST_PEER = (
    *("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe"),
    "left the exchange",
)
"""Words of a rank that lost another one: an effect, not a cause."""


@dataclass(frozen=True, kw_only=True)
class Incident:
    """A failure, or a step of the recovery from one."""

    at_s: float
    """Seconds since the first event of the run."""
    kind: str
    """``hang_found``, ``workers_failed``, ``workers_started``, ``rank_died``, ``recovered``, ``checkpoint_failed``,
    ``checkpoint_rejected``, ``checkpoint_restored``, ``run_ended``, ``loss_not_finite``, ``slow_phase``, ``stall``,
    ``verdict``, ``notice``, ``events_lost``, ``nodes_probed``, ``not_finite``, ``replicas_different``."""
    severity: Severity
    title: str
    detail: str
    step: int | None = None
    rank: int | None = None
    cause: str = ""
    """What went wrong, with whom, as the beginning of a sentence; empty where this is no cause."""
    cost_s: float = 0.0
    """Seconds that a stall or a slow phase cost, or that passed without progress before a hang was found."""
    restarting: bool = False
    """Whether the launcher was about to restart the ranks that failed."""
    ranks: tuple[int, ...] = ()
    """Of a verdict: the ranks at fault, or at the place that is."""
    blame: BlameKey | None = None
    """Of the end of ranks: the least is the likeliest first cause, whichever node told it."""


def find_incidents(
    loaded: Loaded, steps: Steps, begin_t: float, causes: NodeCauses | None = None
) -> tuple[Incident, ...]:
    """All incidents, oldest first. The same event of several ranks, such as a restore, is one incident.

    Args:
        loaded: the run's events.
        steps: the last execution of every step.
        begin_t: when the run began, seconds since the epoch.
        causes: what the nodes' monitors saw.
    """
    found: list[Incident] = []
    grouped: dict[tuple[object, ...], list[Record]] = {}
    for attempt, record in loaded.others:
        if record.kind in ("checkpoint_failed", "checkpoint_rejected", "checkpoint_restored"):
            key = (attempt, record.generation, record.kind, record.fields.get("step"), record.fields.get("reason"))
            grouped.setdefault(key, []).append(record)
        else:
            found += _from_event(record, begin_t, loaded, causes)
    found += [_from_checkpoint(records, begin_t) for records in grouped.values()]
    found += _restarts(loaded, begin_t)
    found += _losses(steps, begin_t)
    found.sort(key=lambda one: one.at_s)
    return tuple(found)


def _from_event(record: Record, begin_t: float, loaded: Loaded, causes: NodeCauses | None) -> list[Incident]:
    at_s = record.t - begin_t
    get = record.fields.get
    if record.kind == "hang_found":
        silent_s = float(known) if isinstance(known := get("silent_s"), (int, float)) else 0.0
        node = causes.during(record.t - silent_s, record.t, get("culprit")) if causes is not None else ""
        seen = f"; {node}" if node else ""
        return [
            Incident(
                at_s=at_s,
                kind=record.kind,
                severity="bad",
                title=f"rank {get('culprit')} hung in step {get('step')}",
                detail=(
                    f"killed after {_number(get('silent_s'))} s without progress (limit "
                    f"{_number(get('limit_s'))} s): {get('evidence')}{seen}"
                ),
                step=get("step"),
                rank=get("culprit"),
                cause=(
                    f"rank {get('culprit')}{_where(loaded, record, get('culprit'))} hung in step {get('step')}: "
                    f"{_shortened(get('evidence'))}{seen}"
                ),
                cost_s=silent_s,
                blame=blame_key(
                    left="desynchronised" in str(get("evidence")),
                    hung=True,
                    lost_peer=False,
                    status=0,
                    has_message=True,
                ),
            )
        ]
    if record.kind == "workers_failed":
        ranks = get("ranks") or []
        reasons = dict.fromkeys(map(str, get("reasons") or []))
        step = _last_step(loaded, record, ranks[0]) if ranks else None
        return [
            Incident(
                at_s=at_s,
                kind=record.kind,
                severity="bad",
                title=f"{names_of(ranks)} failed on {get('host')}",
                detail="; ".join(reasons) + ("; restarting" if get("restarting") else "; not restarted"),
                step=step,
                rank=ranks[0] if len(ranks) == 1 else None,
                cause=_crash(record, step, at_s),
                restarting=bool(get("restarting")),
                blame=_blame(next(iter(reasons), "")),
            )
        ]
    if record.kind == "events_lost":
        who = "the launcher" if record.rank < 0 else f"rank {record.rank}"
        return [
            Incident(
                at_s=at_s,
                kind=record.kind,
                severity="warn",
                title=f"{get('count')} events of {who} were lost before this",
                detail=f"they could not be written, and are in no figure here: {get('reason')}",
                rank=record.rank if record.rank >= 0 else None,
            )
        ]
    if record.kind == "nodes_probed":
        findings = [_shortened(one) for one in get("findings") or []]
        return [
            Incident(
                at_s=at_s,
                kind=record.kind,
                severity="warn" if findings else "good",
                title=f"{get('why', 'all stood still')}: nodes and links were tried out",
                detail=f"{'; '.join(findings) or 'none stands out'} ({get('heard')} of {get('nodes')} nodes took part)",
            )
        ]
    if record.kind == "notice":
        return [
            Incident(
                at_s=at_s,
                kind=record.kind,
                severity="warn",
                title=f"the launcher on {get('host')} got {get('signal')}",
                detail=f"a notice: the ranks have {_number(get('grace_s'))} s to save a checkpoint and to end",
            )
        ]
    if record.kind == "run_ended" and not get("ok"):
        return [
            Incident(
                at_s=at_s,
                kind=record.kind,
                severity="bad",
                title=f"rank {record.rank} failed at step {get('step')}",
                detail=str(get("reason") or "no reason given"),
                step=get("step"),
                rank=record.rank,
                cause=(
                    f"rank {record.rank} failed at {at_time(at_s)}, at step {get('step')}: "
                    f"{_shortened(get('reason') or 'no reason given')}"
                ),
                blame=_blame(f"exited with status 1: {get('reason')}"),
            )
        ]
    return []


def _where(loaded: Loaded, told: Record, rank: object) -> str:
    """`` on node-a``: where a launcher had started a rank; empty where that is not known."""
    for _, record in reversed(loaded.others):
        if record.kind == "workers_started" and record.t <= told.t and rank in (record.fields.get("ranks") or []):
            return f" on {record.fields.get('host')}"
    return ""


def _blame(reason: str) -> BlameKey:
    """From a launcher's words for the end of a rank, the likeliest of its node."""
    left = reason.startswith(_LEFT) or "desynchronised" in reason
    return blame_key(
        left=left,
        hung=reason.startswith(_HUNG),
        lost_peer=not left and is_effect(reason),
        status=-1 if reason.startswith(_KILLED_BY) else 1,
        has_message=": " in reason,
    )


def is_effect(text: str) -> bool:
    """Whether these are the words of a rank that has lost another one."""
    return any(phrase in text for phrase in LOST_PEER)


def _last_step(loaded: Loaded, failed: Record, rank: int) -> int | None:
    """The last step that a rank had finished when it failed, in the same start; None if there is none."""
    rows = loaded.rows
    mine = rows[(rows[:, 1] == failed.generation) & (rows[:, 2] == rank) & (rows[:, 4] <= failed.t)]
    return int(mine[mine[:, 4].argmax(), 3]) if len(mine) else None


def _crash(record: Record, step: int | None, at_s: float) -> str:
    """``rank 1 on host killed (SIGKILL) at 7.6 s, after step 60``: the likely cause, which launchers list first."""
    ranks, reasons = record.fields.get("ranks") or [], list(map(str, record.fields.get("reasons") or []))
    if not ranks or not reasons:
        return f"ranks failed on {record.fields.get('host')} at {at_time(at_s)}"
    alike = [rank for rank, reason in zip(ranks, reasons, strict=False) if reason == reasons[0]]
    how, _, words = reasons[0].partition(": ")
    if how.startswith(_KILLED_BY):
        how = f"killed ({how.removeprefix(_KILLED_BY)})"
    when = f"after step {step}" if step is not None else "before its first step was done"
    who = f"{names_of(sorted(alike))} on {record.fields.get('host')}"
    return f"{who} {how} at {at_time(at_s)}, {when}" + (f": {_shortened(words)}" if words else "")


def at_time(at_s: float) -> str:
    """``7.6 s``, ``3 min 05 s``: when something happened."""
    return f"{at_s:.1f} s" if at_s < 99.95 else fmt.duration(at_s)


def _shortened(text: object) -> str:
    """For a headline; the incident itself has the whole text."""
    words = " ".join(str(text).split())
    return words if len(words) <= MOST_CHARS else f"{words[: MOST_CHARS - 1].rstrip()}…"


def _from_checkpoint(records: Sequence[Record], begin_t: float) -> Incident:
    """One incident for the same event of one or more ranks."""
    first = records[0]
    get = first.fields.get
    step = get("step")
    who = names_of(sorted({one.rank for one in records}))
    if first.kind == "checkpoint_restored":
        seconds = max(float(one.fields.get("seconds", 0.0)) for one in records)
        title, detail = f"restored the checkpoint of step {step}", f"in {seconds:.2f} s, on {who}"
    elif first.kind == "checkpoint_rejected":
        file = f" (file {get('file')})" if get("file") else ""
        # Events before this field existed told of damage, mostly.
        verb = "rejected" if get("damaged", True) else "not used"
        title, detail = f"the checkpoint of step {step} was {verb}", f"{get('reason')}{file}; reported by {who}"
    else:
        title, detail = f"the checkpoint of step {step} was not committed", f"{get('reason')}; reported by {who}"
    has_cause = first.kind == "checkpoint_failed" or (first.kind == "checkpoint_rejected" and get("damaged", True))
    return Incident(
        at_s=min(one.t for one in records) - begin_t,
        kind=first.kind,
        severity="good" if first.kind == "checkpoint_restored" else "warn",
        title=title,
        detail=detail,
        step=step,
        cause=f"{title}: {_shortened(get('reason'))}" if has_cause else "",
    )


def worst_first(incidents: Iterable[Incident]) -> list[Incident]:
    """As people look for them: what is bad, then what is worth a look, then the rest; in each the newest first."""
    ranks = {"bad": 0, "warn": 1}
    return sorted(incidents, key=lambda one: (ranks.get(one.severity, 2), -one.at_s))


def restarts_of(loaded: Loaded) -> list[list[Record]]:
    """The restarts by launchers, oldest first: of each the events of the nodes that started their ranks together."""
    groups: list[list[Record]] = []
    for _, record in loaded.others:
        if record.kind != "workers_started" or record.generation == 0:
            continue
        last = groups[-1][-1] if groups else None
        if last is None or last.generation != record.generation or record.t - last.t > SAME_RESTART_S:
            groups.append([])
        groups[-1].append(record)
    return groups


def _restarts(loaded: Loaded, begin_t: float) -> list[Incident]:
    """One incident for all nodes that restarted their ranks at the same time."""
    found = []
    for group in restarts_of(loaded):
        hosts = sorted({str(one.fields.get("host")) for one in group})
        ranks = sorted({int(rank) for one in group for rank in one.fields.get("ranks") or []})
        left = min(int(one.fields.get("restarts_left", 0)) for one in group)
        found.append(
            Incident(
                at_s=group[0].t - begin_t,
                kind="workers_started",
                severity="warn",
                title=f"{names_of(ranks)} restarted on {hosts[0] if len(hosts) == 1 else f'{len(hosts)} hosts'}",
                detail=f"restart {group[0].generation}; {left} restarts left",
            )
        )
    return found


def _losses(steps: Steps, begin_t: float) -> list[Incident]:
    """The first step whose training loss is NaN or infinite on a rank that took it."""
    if not steps.steps:
        return []
    # A program that tells nothing of itself has neither a loss nor a learning rate.
    loss, t = steps.values["loss"], np.where(np.isnan(steps.values["lr"]), np.nan, steps.values["t"])
    for index, step in enumerate(steps.steps):
        bad = [
            rank
            for column, rank in enumerate(steps.ranks)
            if math.isfinite(t[index, column]) and not math.isfinite(loss[index, column])
        ]
        if bad:
            return [
                Incident(
                    at_s=float(min(one for one in t[index] if math.isfinite(one))) - begin_t,
                    kind="loss_not_finite",
                    severity="bad",
                    title=f"training loss is NaN or infinite from step {step} on",
                    detail=f"on {names_of(bad)}",
                    step=step,
                    rank=bad[0] if len(bad) == 1 else None,
                    cause=f"training loss is NaN or infinite from step {step} on, on {names_of(bad)}",
                )
            ]
    return []


def names_of(ranks: Sequence[int]) -> str:
    """``rank 3``, ``ranks 0–3``, ``ranks 0, 2, 5``."""
    if not ranks:
        return "no rank"
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]}–{ranks[-1]}"
    shown = ", ".join(map(str, ranks[:8]))
    return f"ranks {shown}{' …' if len(ranks) > 8 else ''}"


def _number(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, (int, float)) else "?"
