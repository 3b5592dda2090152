"""What a job does now: of each rank from shared memory if it runs on this machine, else from the newest events."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from outlast.diagnostics.live import Observation, heartbeat_path, observe
from outlast.diagnostics.live.shm import find_shm_directory
from outlast.diagnostics.report.incidents import SAME_RESTART_S
from outlast.diagnostics.report.told_verdicts import open_verdicts
from outlast.diagnostics.syndromes.told import Story
from outlast.errors import DiagnosticsError, NoEvents
from outlast.events import Record, parse_event

TAIL_BYTES = 64 << 10
"""Of a rank's events, what is read of the end: some hundred steps."""
SILENT_S = 60.0
"""A job without a sign of life for longer, none of whose ranks is alive on this machine, is not said to run."""
STEP_KINDS = ("step", "program_step")

State = Literal["running", "restarting", "finished", "ended", "failed", "no sign of life"]


@dataclass(frozen=True, kw_only=True)
class RankStatus:
    """One rank."""

    rank: int
    host: str
    pid: int | None
    state: str
    """Of its process, if it is on this machine: ``running``, ``stopped`` or ``dead``; else empty."""
    phase: str
    """As it told last; ``finish`` once it has ended well, and empty where only events are known."""
    step: int
    age_s: float | None
    """Seconds since its last sign of life; None if there is none."""
    doing: str
    """In words, with the collective that it is inside."""
    seen_in: Literal["shared memory", "events"]


@dataclass(frozen=True, kw_only=True)
class NodeStatus:
    """One node, as its launcher told."""

    host: str
    ranks: tuple[int, ...]
    age_s: float
    """Seconds since the newest event of it or of its ranks, by the clocks of both."""
    conditions: tuple[str, ...]
    """What holds there now that can make ranks slow."""


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """A run at one moment."""

    name: str
    run_dir: str
    state: State
    reason: str
    """Why it has failed or ended before its last step; else empty."""
    generation: int
    """How often its ranks had been started before."""
    restarts_left: int
    step: int
    """The newest that a rank has begun or done."""
    steps_planned: int
    """0 if nobody said."""
    step_age_s: float | None
    """Seconds since a rank was done with a step of this start, by the clocks of both; None before the first."""
    hung: bool
    """Whether a rank keeps its peers waiting: its launcher has said so, and no step was done since."""
    verdicts: tuple[str, ...]
    """What holds and is wrong, in one line each; the worst first."""
    stories: tuple[Story, ...]
    """Of those that launchers told while the ranks ran: what was ruled out, the cause, what was tried out and done."""
    nodes: tuple[NodeStatus, ...]
    ranks: tuple[RankStatus, ...]

    def to_json(self) -> dict[str, Any]:
        """Of plain values."""
        return dataclasses.asdict(self)


def status_of(run_dir: Path | str) -> RunStatus:
    """What the run at ``run_dir`` does now. Nothing is written, and nothing waits.

    Raises:
        DiagnosticsError: there is no such directory, or no launcher or rank has ever written an event there; or the
            run's shared memory on this machine is another user's.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise DiagnosticsError(f"no run directory at {run_dir}", "give the path of a run, e.g. runs/NAME")
    now_t, now_s = time.time(), time.monotonic()
    launchers = {path: _records(path) for path in sorted(run_dir.glob("events/agent_*.jsonl"))}
    told = sorted((one for records in launchers.values() for one in records), key=lambda one: one.t)
    newest = _newest_attempt(run_dir)
    by_rank = {} if newest is None else _rank_events(newest)
    if not told and not by_rank:
        raise NoEvents(
            f"{run_dir} contains no events: no job has begun there",
            "give the directory of a run; its events are in events/ and attempts/NNNN/events/",
        )
    generation = max([one.generation for one in told if one.kind == "workers_started"][-1:], default=-1)
    if generation < 0:
        generation = max((one.generation for records in by_rank.values() for one in records), default=0)
    started = _starts(told, generation)
    of_start = {rank: [one for one in records if one.generation == generation] for rank, records in by_rank.items()}
    ranks = _ranks(run_dir, started, of_start, now_t, now_s)
    state, reason = _state(told, generation, started, of_start, ranks, now_t)
    begun = [one for records in of_start.values() for one in records if one.kind == "run_started"]
    done_t = max((one.t for records in of_start.values() for one in records if one.kind in STEP_KINDS), default=None)
    suspected = _suspected(told, generation, done_t) if state == "running" else ()
    is_over = state in ("finished", "ended")
    slow = [] if is_over else [one for one in open_verdicts(told) if one.generation == generation]
    stories = tuple(Story.of(one.fields) for one in slow)
    return RunStatus(
        name=run_dir.resolve().name,
        run_dir=str(run_dir),
        state=state,
        reason=reason,
        generation=generation,
        restarts_left=min((int(one.fields.get("restarts_left", 0)) for one in started), default=0),
        step=max((one.step for one in ranks), default=0),
        steps_planned=max((int(one.fields.get("last_step", 0)) for one in begun), default=0),
        step_age_s=None if done_t is None else max(0.0, now_t - done_t),
        hung=bool(suspected),
        verdicts=() if is_over else (*suspected, *_hangs(told, generation), *(one.verdict for one in stories)),
        stories=stories,
        nodes=_nodes(started, told, of_start, launchers.values(), now_t),
        ranks=ranks,
    )


def _newest_attempt(run_dir: Path) -> Path | None:
    folders = [path for path in run_dir.glob("attempts/[0-9]*") if path.name.isdecimal()]
    return max(folders, key=lambda path: int(path.name), default=None)


def _rank_events(attempt: Path) -> dict[int, list[Record]]:
    found = {}
    for path in sorted(attempt.glob("events/rank_*.jsonl")):
        number = path.stem.removeprefix("rank_")
        if number.isdecimal():
            found[int(number)] = _records(path, most_bytes=TAIL_BYTES)
    return found


def _records(path: Path, *, most_bytes: int | None = None) -> list[Record]:
    """Of the end of a file, and of its first line; what is no event of this version is left out."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            lines = []
            if most_bytes is not None and size > most_bytes:
                lines.append(file.readline())
                file.seek(size - most_bytes)
                file.readline()
            lines += file.read().split(b"\n")
    except OSError as error:
        raise DiagnosticsError(f"{path} cannot be read: {error.strerror}") from error
    found = []
    for line in lines:
        try:
            found.append(parse_event(line, str(path)))
        except DiagnosticsError:
            continue  # the torn last line, or of another version
    return found


def _starts(told: Sequence[Record], generation: int) -> list[Record]:
    """Of each node, the newest ``workers_started`` of the newest start; nodes of an earlier launch are left out."""
    found: dict[str, Record] = {}
    for one in told:
        if one.kind == "workers_started" and one.generation == generation:
            found[str(one.fields.get("host"))] = one
    newest_t = max((one.t for one in found.values()), default=0.0)
    return [one for one in found.values() if newest_t - one.t <= SAME_RESTART_S]


def _ranks(
    run_dir: Path, started: Sequence[Record], events: Mapping[int, Sequence[Record]], now_t: float, now_s: float
) -> tuple[RankStatus, ...]:
    places: dict[int, tuple[str, int | None]] = {}
    for rank, records in events.items():
        for one in records:
            if one.kind == "run_started":
                places[rank] = str(one.fields.get("host", "")), one.fields.get("pid")
    for start in started:
        pids = start.fields.get("pids") or []
        for at, rank in enumerate(start.fields.get("ranks") or []):
            host, pid = places.get(int(rank), ("", None))
            places[int(rank)] = str(start.fields.get("host")), pid or (pids[at] if at < len(pids) else None)
    shm = find_shm_directory(run_dir)
    found = []
    for rank, (host, pid) in sorted(places.items()):
        seen: Observation | None = None
        if shm is not None and heartbeat_path(shm, rank).exists():
            with suppress(DiagnosticsError):  # it has just been removed, or another version wrote it
                seen = observe(shm, rank=rank, pid=pid or 0, started_s=0.0)
        has_ended = any(record.kind == "run_ended" for record in events.get(rank, ()))
        if seen is not None and seen.beat is not None and not (has_ended and seen.state == "dead"):
            found.append(_from_memory(seen, host, now_s))
        else:
            found.append(_from_events(rank, host, pid, events.get(rank, ()), now_t))
    return tuple(found)


def _from_memory(one: Observation, host: str, now_s: float) -> RankStatus:
    assert one.beat is not None
    if one.state == "dead":
        doing = f"its process has ended, in phase {one.beat.phase} of step {one.step}"
    elif one.pending:
        oldest = one.pending[0]
        doing = f"in {oldest.op} #{oldest.number} of step {oldest.step}, for {now_s - oldest.entered_s:.1f} s"
    else:
        doing = f"in phase {one.beat.phase} of step {one.step}"
    if one.state == "stopped":
        doing += "; stopped (state T)"
    return RankStatus(
        rank=one.rank,
        host=host,
        pid=one.pid,
        state=one.state,
        phase=one.beat.phase,
        step=one.step,
        age_s=max(0.0, now_s - one.beat.t_s),
        doing=doing,
        seen_in="shared memory",
    )


def _from_events(rank: int, host: str, pid: int | None, records: Sequence[Record], now_t: float) -> RankStatus:
    steps = [one for one in records if one.kind in STEP_KINDS]
    step = int(steps[-1].fields.get("step", 0)) if steps else 0
    ended = next((one for one in records if one.kind == "run_ended"), None)
    if ended is not None:
        step = max(step, int(ended.fields.get("step") or 0))
        how = "ended well" if ended.fields.get("ok") else f"ended: {ended.fields.get('reason') or 'no reason given'}"
        doing = f"has {how}, after step {step}"
    elif steps:
        doing = f"has done step {step}"
    else:
        doing = "has begun, and done no step" if records else "has been started, and told nothing"
    return RankStatus(
        rank=rank,
        host=host,
        pid=pid,
        state="",
        phase="finish" if ended is not None and ended.fields.get("ok") else "",
        step=step,
        age_s=max(0.0, now_t - max(one.t for one in records)) if records else None,
        doing=doing,
        seen_in="events",
    )


def _state(
    told: Sequence[Record],
    generation: int,
    started: Sequence[Record],
    events: Mapping[int, Sequence[Record]],
    ranks: Sequence[RankStatus],
    now_t: float,
) -> tuple[State, str]:
    began_t = max((one.t for one in started), default=0.0)
    later = [one for one in told if one.t >= began_t and one.generation == generation]
    failed = [one for one in later if one.kind == "workers_failed"]
    if failed:
        reasons = failed[0].fields.get("reasons") or ["no reason given"]
        named = failed[0].fields.get("ranks") or ["?"]
        why = f"rank {named[0]} on {failed[0].fields.get('host')} {reasons[0]}"
        return ("restarting" if failed[-1].fields.get("restarting") else "failed"), why
    ends = {rank: [one for one in records if one.kind == "run_ended"] for rank, records in events.items()}
    every = [found[-1] for found in ends.values() if found]
    wrong = [one for one in every if not one.fields.get("ok")]
    alive = any(one.state in ("running", "stopped") for one in ranks)
    if wrong and not alive and not started:  # without a launcher nobody else says so
        return "failed", f"rank {wrong[0].rank} ended: {wrong[0].fields.get('reason') or 'no reason given'}"
    if ranks and len(every) == len(ranks) and not wrong and not alive:
        reason = str(next((one.fields["reason"] for one in every if one.fields.get("reason")), ""))
        return ("ended" if reason else "finished"), reason
    newest_s = min((one.age_s for one in ranks if one.age_s is not None), default=None)
    since_s = now_t - began_t if newest_s is None else newest_s
    if alive or since_s < SILENT_S:
        return "running", ""
    return "no sign of life", f"nothing was heard of its ranks for {since_s:.0f} s, and none is alive on this machine"


def _suspected(told: Sequence[Record], generation: int, done_t: float | None) -> tuple[str, ...]:
    """Ranks that keep their peers waiting now, the newest first: no step was done since that was told."""
    held = {
        one.fields.get("culprit"): one
        for one in told
        if one.kind == "hang_suspected" and one.generation == generation and (done_t is None or one.t > done_t)
    }
    return tuple(
        f"rank {rank} keeps its peers waiting at step {one.fields.get('step')}: {one.fields.get('evidence')}"
        for rank, one in sorted(held.items(), key=lambda item: -item[1].t)
    )


def _hangs(told: Sequence[Record], generation: int) -> tuple[str, ...]:
    """Of the newest start."""
    hangs = [one for one in told if one.kind == "hang_found" and one.generation == generation]
    return tuple(
        f"rank {one.fields.get('culprit')} hung in step {one.fields.get('step')}, and was killed: "
        f"{one.fields.get('evidence')}"
        for one in hangs
    )


def _nodes(
    started: Sequence[Record],
    told: Sequence[Record],
    events: Mapping[int, Sequence[Record]],
    launchers: Iterable[Sequence[Record]],
    now_t: float,
) -> tuple[NodeStatus, ...]:
    newest_t: dict[str, float] = {}
    for records in launchers:
        hosts = {str(one.fields["host"]) for one in records if one.kind == "workers_started"}
        newest_t |= {host: max(one.t for one in records) for host in hosts}
    held: dict[str, dict[tuple[object, ...], str]] = {}
    for one in told:
        get = one.fields.get
        if one.kind == "node_monitored":  # the launcher has ended
            held.pop(str(get("host")), None)
        if one.kind != "node_condition":
            continue
        name = (get("what"), get("key"))
        of_host = held.setdefault(str(get("host")), {})
        of_host.pop(name, None)
        if get("state") in ("began", "lasts"):
            of_host[name] = str(get("words"))
    found = []
    for start in started:
        host = str(start.fields.get("host"))
        ranks = tuple(int(rank) for rank in start.fields.get("ranks") or ())
        times = [newest_t.get(host, start.t), *(one.t for rank in ranks for one in events.get(rank, ())[-1:])]
        conditions = tuple(held.get(host, {}).values())
        found.append(NodeStatus(host=host, ranks=ranks, age_s=max(0.0, now_t - max(times)), conditions=conditions))
    return tuple(sorted(found, key=lambda one: one.ranks))
