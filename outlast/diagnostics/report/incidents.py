"""What failed and how the run recovered, in order of time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from outlast.diagnostics.report.load import Loaded, Steps
from outlast.events import Record

Severity = Literal["bad", "warn", "good"]

SAME_RESTART_S = 60.0
"""Nodes that start their ranks within this time of each other belong to the same restart."""


@dataclass(frozen=True, kw_only=True)
class Incident:
    """A failure, or a step of the recovery from one."""

    at_s: float
    """Seconds since the first event of the run."""
    kind: str
    """``hang_found``, ``workers_failed``, ``workers_started``, ``recovered``, ``checkpoint_failed``,
    ``checkpoint_rejected``, ``checkpoint_restored``, ``run_ended``, ``loss_not_finite`` or ``stall``."""
    severity: Severity
    title: str
    detail: str
    step: int | None = None
    rank: int | None = None
    cause: str = ""
    """What went wrong, with whom, as the beginning of a sentence; empty where this is no cause."""
    cost_s: float = 0.0
    """Seconds that a stall cost."""


def find_incidents(loaded: Loaded, steps: Steps, begin_t: float) -> tuple[Incident, ...]:
    """All incidents, oldest first. The same event of several ranks, such as a restore, is one incident."""
    found: list[Incident] = []
    grouped: dict[tuple[object, ...], list[Record]] = {}
    for attempt, record in loaded.others:
        if record.kind in ("checkpoint_failed", "checkpoint_rejected", "checkpoint_restored"):
            key = (attempt, record.generation, record.kind, record.fields.get("step"), record.fields.get("reason"))
            grouped.setdefault(key, []).append(record)
        else:
            found += _from_event(record, begin_t, loaded)
    found += [_from_checkpoint(records, begin_t) for records in grouped.values()]
    found += _restarts(loaded, begin_t)
    found += _recoveries(loaded, begin_t)
    found += _losses(steps, begin_t)
    found.sort(key=lambda one: one.at_s)
    return tuple(found)


def _from_event(record: Record, begin_t: float, loaded: Loaded) -> list[Incident]:
    at_s = record.t - begin_t
    get = record.fields.get
    if record.kind == "hang_found":
        return [
            Incident(
                at_s=at_s,
                kind=record.kind,
                severity="bad",
                title=f"rank {get('culprit')} hung in step {get('step')}",
                detail=(
                    f"killed after {_number(get('silent_s'))} s without progress (limit "
                    f"{_number(get('limit_s'))} s): {get('evidence')}"
                ),
                step=get("step"),
                rank=get("culprit"),
                cause=f"rank {get('culprit')} hung in step {get('step')}: {get('evidence')}",
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
                title=f"{_ranks(ranks)} failed on {get('host')}",
                detail="; ".join(reasons) + ("; restarting" if get("restarting") else "; not restarted"),
                step=step,
                rank=ranks[0] if len(ranks) == 1 else None,
                cause=_crash(record, step),
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
                cause=f"rank {record.rank} failed at step {get('step')}: {get('reason') or 'no reason given'}",
            )
        ]
    return []


def _last_step(loaded: Loaded, failed: Record, rank: int) -> int | None:
    """The last step that a rank had finished when it failed, in the same start; None if there is none."""
    rows = loaded.rows
    mine = rows[(rows[:, 1] == failed.generation) & (rows[:, 2] == rank) & (rows[:, 4] <= failed.t)]
    return int(mine[mine[:, 4].argmax(), 3]) if len(mine) else None


def _crash(record: Record, step: int | None) -> str:
    """``rank 1 on host was killed by SIGKILL after step 60``: the likely cause, which launchers list first."""
    ranks, reasons = record.fields.get("ranks") or [], record.fields.get("reasons") or []
    if not ranks or not reasons:
        return f"ranks failed on {record.fields.get('host')}"
    how, _, words = str(reasons[0]).partition(": ")
    verb = "was " if how.startswith("killed by") else ""
    when = f" after step {step}" if step is not None else " before its first step was done"
    return f"rank {ranks[0]} on {record.fields.get('host')} {verb}{how}{when}" + (f": {words}" if words else "")


def _from_checkpoint(records: Sequence[Record], begin_t: float) -> Incident:
    """One incident for the same event of one or more ranks."""
    first = records[0]
    get = first.fields.get
    step = get("step")
    who = _ranks(sorted({one.rank for one in records}))
    if first.kind == "checkpoint_restored":
        seconds = max(float(one.fields.get("seconds", 0.0)) for one in records)
        title, detail = f"restored the checkpoint of step {step}", f"in {seconds:.2f} s, on {who}"
    elif first.kind == "checkpoint_rejected":
        file = f" (file {get('file')})" if get("file") else ""
        title, detail = f"the checkpoint of step {step} was rejected", f"{get('reason')}{file}; reported by {who}"
    else:
        title, detail = f"the checkpoint of step {step} was not committed", f"{get('reason')}; reported by {who}"
    return Incident(
        at_s=min(one.t for one in records) - begin_t,
        kind=first.kind,
        severity="good" if first.kind == "checkpoint_restored" else "warn",
        title=title,
        detail=detail,
        step=step,
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
                title=f"{_ranks(ranks)} restarted on {hosts[0] if len(hosts) == 1 else f'{len(hosts)} hosts'}",
                detail=f"restart {group[0].generation}; {left} restarts left",
            )
        )
    return found


def _recoveries(loaded: Loaded, begin_t: float) -> list[Incident]:
    """When the first step after each restart was done."""
    if len(loaded.rows) == 0:
        return []
    found: dict[float, Incident] = {}
    for _, record in loaded.others:
        if record.kind != "workers_failed" or not record.fields.get("restarting"):
            continue
        later = loaded.rows[(loaded.rows[:, 4] > record.t) & (loaded.rows[:, 1] > record.generation)]
        if len(later) == 0:
            continue
        next_step = later[later[:, 4].argmin()]
        t, step = float(next_step[4]), int(next_step[3])
        lost = loaded.rows[(loaded.rows[:, 4] < t) & (loaded.rows[:, 3] >= step)]
        redone = len(set(lost[:, 3]))
        again = f"{redone} step{'s' if redone != 1 else ''} redone"
        found.setdefault(
            t,
            Incident(
                at_s=t - begin_t,
                kind="recovered",
                severity="good",
                title=f"training resumed with step {step}",
                detail=f"{t - record.t:.1f} s after the failure; {again}",
                step=step,
            ),
        )
    return list(found.values())


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
                    detail=f"on {_ranks(bad)}",
                    step=step,
                    rank=bad[0] if len(bad) == 1 else None,
                    cause=f"training loss is NaN or infinite from step {step} on, on {_ranks(bad)}",
                )
            ]
    return []


def _ranks(ranks: Sequence[int]) -> str:
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
