"""Computes the report of a run from its events alone, so it can be recomputed at any time."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from outlast.diagnostics.config import DiagnosticsConfig
from outlast.diagnostics.live.unwatched import RankUnwatched
from outlast.diagnostics.monitor import NodeCondition
from outlast.diagnostics.report.delays import delays_of
from outlast.diagnostics.report.failures import Beginning, with_failures
from outlast.diagnostics.report.goodput import goodput_of
from outlast.diagnostics.report.incidents import find_incidents, restarts_of
from outlast.diagnostics.report.load import Floats, Loaded, Steps, last_executions, load
from outlast.diagnostics.report.model import (
    CheckpointRow,
    Checkpoints,
    Facts,
    GoodputSplit,
    Lateness,
    LossCurve,
    Report,
    Series,
    Start,
    TimeSplit,
    Traffic,
)
from outlast.diagnostics.report.node_causes import NodeCauses
from outlast.diagnostics.report.numerics import numerics_incidents, numerics_of
from outlast.diagnostics.report.phases import SlowPhase, find_phases, phase_incidents
from outlast.diagnostics.report.rank_causes import RankCauses
from outlast.diagnostics.report.scene import find_scene
from outlast.diagnostics.report.stalls import find_stalls
from outlast.diagnostics.report.stragglers import UNKNOWN_HOST, StragglerRow, lateness_s, rank_stragglers, slow_node
from outlast.diagnostics.report.told_verdicts import find_told
from outlast.errors import DiagnosticsError
from outlast.events import Record

Hosts = dict[tuple[int, int, int], str]
Begun = dict[tuple[int, int, int], Record]


def build_report(run_dir: Path | str, config: DiagnosticsConfig | None = None) -> Report:
    """Compute the report of the run at ``run_dir``.

    Args:
        run_dir: the run's directory.
        config: when a rank counts as a straggler; None takes section ``[diagnostics]`` of the run's newest
            ``config.toml``, or the defaults.

    Raises:
        DiagnosticsError: the directory does not exist or has no events, or an event has an unknown schema version.
    """
    run_dir = Path(run_dir)
    return report_of(load(run_dir), run_dir, config)


def report_of(loaded: Loaded, run_dir: Path, config: DiagnosticsConfig | None = None) -> Report:
    """The report of events that have been loaded; see :func:`build_report`."""
    config = _settings(run_dir) if config is None else config
    steps = last_executions(loaded.rows)
    begun = {
        (attempt, record.generation, record.rank): record
        for attempt, record in loaded.others
        if record.kind == "run_started"
    }
    hosts = {where: str(record.fields.get("host", UNKNOWN_HOST)) for where, record in begun.items()}
    began_t = _first_t(loaded)
    starts = _starts(loaded, hosts, begun, began_t)
    goodput = goodput_of(loaded)
    facts = _facts(loaded, steps, starts, begun, began_t, goodput.wall_s)
    causes = NodeCauses((one for one in loaded.nodes if one.kind == NodeCondition.kind), hosts)
    own = RankCauses(steps, delays_of(loaded, steps))
    rows = _with_node_causes(rank_stragglers(steps, hosts, config, own), steps, causes)
    phases = find_phases(steps, hosts, rows, config, causes, own)
    beginnings = [Beginning(where=(one.attempt, one.generation), launched_s=one.launched_s) for one in starts]
    found, failures = with_failures(loaded, find_incidents(loaded, steps, began_t, causes), beginnings, hosts, began_t)
    slow = [*phase_incidents(phases, steps, began_t), *find_stalls(steps, began_t, config, phases, causes, own)]
    slow += find_told(loaded.nodes, began_t)
    numerics = numerics_of(loaded, began_t)
    missing = [*loaded.missing, *_gaps(loaded, steps, begun)]
    lateness = _lateness(steps, hosts)
    late_ms = {rank: np.asarray(row) for rank, row in zip(lateness.ranks, lateness.late_ms, strict=True)}
    return Report(
        name=run_dir.resolve().name,
        run_dir=str(run_dir),
        verdict=_verdict(rows, phases, len(steps.ranks), config),
        facts=facts,
        loss=_loss(loaded, steps),
        split=_split(steps),
        goodput=GoodputSplit(wall_s=goodput.wall_s, **{f"{cause}_s": s for cause, s in goodput.seconds.items()}),
        traffic=_traffic(steps),
        checkpoints=_checkpoints(loaded, steps),
        incidents=tuple(sorted((*found, *slow, *numerics_incidents(numerics)), key=lambda one: one.at_s)),
        failures=failures,
        slow_phases=phases,
        numerics=numerics,
        lateness=lateness,
        stragglers=rows,
        thresholds=config,
        missing=tuple(missing),
        scene=find_scene(loaded, failures, rows, phases, late_ms, lateness.steps, began_t, facts.median_step_s),
    )


def _with_node_causes(rows: tuple[StragglerRow, ...], steps: Steps, causes: NodeCauses) -> tuple[StragglerRow, ...]:
    """Stragglers with what their nodes' monitors saw while they were slow."""
    if not causes.stretches or not steps.steps:
        return rows
    begin_t, end_t = float(np.nanmin(steps.values["t"])), float(np.nanmax(steps.values["t"]))
    found = []
    for row in rows:
        node = causes.during(begin_t, end_t, row.rank, row.host) if row.straggler else ""
        found.append(dataclasses.replace(row, evidence=f"{row.evidence}; {node}") if node else row)
    return tuple(found)


def _settings(run_dir: Path) -> DiagnosticsConfig:
    files = [*sorted(run_dir.glob("attempts/[0-9]*/config.toml")), run_dir / "config.toml"]
    newest = next((path for path in reversed(files[:-1])), files[-1])
    if not newest.is_file():
        return DiagnosticsConfig()
    try:
        section = tomllib.loads(newest.read_text(encoding="utf-8")).get("diagnostics", {})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DiagnosticsError(f"{newest} cannot be read: {error}") from error
    known = {one.name for one in dataclasses.fields(DiagnosticsConfig)}
    return DiagnosticsConfig(**{key: value for key, value in section.items() if key in known})


def _first_t(loaded: Loaded) -> float:
    times = [record.t for _, record in loaded.others[:1]] + [span[0] for span in loaded.spans.values()]
    if not times:
        raise DiagnosticsError("the event files contain no readable event; " + "; ".join(loaded.missing))
    return min(times)


def _starts(loaded: Loaded, hosts: Hosts, begun: Begun, began_t: float) -> tuple[Start, ...]:
    starts = []
    pairs = {(attempt, record.generation) for attempt, record in loaded.others if attempt}
    if len(loaded.rows):
        pairs |= {(int(attempt), int(generation)) for attempt, generation in np.unique(loaded.rows[:, :2], axis=0)}
    launched = [record for _, record in loaded.others if record.kind == "workers_started"]
    after_t = -math.inf
    for attempt, generation in sorted(pairs):
        rows = loaded.rows[(loaded.rows[:, 0] == attempt) & (loaded.rows[:, 1] == generation)]
        times = [r.t for a, r in loaded.others if (a, r.generation) == (attempt, generation)]
        times += [float(rows[:, 4].min()), float(rows[:, 4].max())] if len(rows) else []
        ranks_hosts = {rank: host for (a, g, rank), host in hosts.items() if (a, g) == (attempt, generation)}
        worlds = [int(r.fields.get("world_size", 0)) for w, r in begun.items() if w[:2] == (attempt, generation)]
        # a later launch starts at generation 0 again, so take the newest start before the first event
        launches = [r.t for r in launched if r.generation == generation and after_t < r.t <= min(times)]
        after_t = max(times)
        starts.append(
            Start(
                attempt=attempt,
                generation=generation,
                world_size=max(worlds, default=len(np.unique(rows[:, 2]))),
                hosts=tuple(ranks_hosts[rank] for rank in sorted(ranks_hosts)),
                launched_s=max(launches, default=min(times)) - began_t,
                began_s=min(times) - began_t,
                training_s=float(rows[:, 4].min()) - began_t if len(rows) else None,
                ended_s=max(times) - began_t,
                first_step=int(rows[:, 3].min()) if len(rows) else None,
                last_step=int(rows[:, 3].max()) if len(rows) else None,
            )
        )
    return tuple(starts)


def _facts(
    loaded: Loaded, steps: Steps, starts: tuple[Start, ...], begun: Begun, began_t: float, wall_s: float
) -> Facts:
    newest = begun[max(begun)].fields if begun else {}
    last = starts[-1] if starts else None
    ended = {
        # A rank that a notice ended before the last step has ended well, and gives it as the reason.
        record.rank: bool(record.fields.get("ok")) and not record.fields.get("reason")
        for attempt, record in loaded.others
        if last is not None
        and record.kind == "run_ended"
        and (attempt, record.generation) == (last.attempt, last.generation)
    }
    step_s = _mean(steps, "step_s")
    groups = [[r for _, r in loaded.others if r.kind == "workers_started" and r.generation == 0], *restarts_of(loaded)]
    launched = {int(rank) for one in groups[-1] for rank in one.fields.get("ranks") or []}
    launched_on = sorted({str(one.fields.get("host", UNKNOWN_HOST)) for one in groups[-1]})
    return Facts(
        world_size=last.world_size if last is not None else len(launched),
        device=str(newest.get("device", "")),
        parameters=int(newest.get("parameters", 0)),
        comm=str(newest.get("comm", "")),
        starts=starts,
        hosts=tuple(sorted({host for start in starts for host in start.hosts}) or launched_on),
        # Ranks that failed before they wrote anything are known to the launcher alone.
        restarts=max(len(restarts_of(loaded)), sum(start.generation > 0 for start in starts)),
        steps_done=len(steps.steps),
        steps_planned=int(newest.get("last_step", 0)),
        steps_redone=steps.redone,
        finished=last is not None and len(ended) == last.world_size and all(ended.values()),
        began_t=began_t,
        wall_s=wall_s,
        useful_s=float(step_s.sum()),
        tokens=int(np.nansum(steps.values.get("tokens", np.empty(0)))),
        median_step_s=float(np.median(step_s)) if len(step_s) else 0.0,
    )


def _mean(steps: Steps, name: str) -> Floats:
    """[steps]: the mean over the ranks that took the step; NaN if the value of one of them is NaN."""
    if not steps.steps:
        return np.empty(0)
    present: npt.NDArray[np.bool_] = np.isfinite(steps.values["t"])
    with np.errstate(invalid="ignore"):
        mean: Floats = np.where(present, steps.values[name], 0.0).sum(axis=1) / present.sum(axis=1)
    return mean


def _series(values: Floats) -> Series:
    return tuple(float(one) for one in values)


def _loss(loaded: Loaded, steps: Steps) -> LossCurve:
    held_out: dict[int, float] = {}
    for _, record in loaded.others:  # oldest first, so a repeated evaluation of a step replaces the earlier one
        if record.kind == "eval":
            held_out[int(record.fields["step"])] = float(record.fields["loss"])
    told = bool(steps.steps) and not np.isnan(steps.values["lr"]).all()
    return LossCurve(
        steps=tuple(steps.steps) if told else (),
        train=_series(_mean(steps, "loss")) if told else (),
        lr=_series(_mean(steps, "lr")),
        grad_norm=_series(_mean(steps, "grad_norm")),
        update_norm=_series(_mean(steps, "update_norm")),
        eval_steps=tuple(sorted(held_out)),
        evaluated=tuple(held_out[step] for step in sorted(held_out)),
    )


def _split(steps: Steps) -> TimeSplit:
    step_s, data_s, comm_s, checkpoint_s = (
        _mean(steps, name) for name in ("step_s", "data_s", "comm_s", "checkpoint_s")
    )
    waiting_s, waited_for = _waiting(steps)
    return TimeSplit(
        steps=tuple(steps.steps),
        compute_s=_series(np.maximum(step_s - data_s - comm_s - checkpoint_s, 0.0)),
        data_s=_series(data_s),
        communication_s=_series(comm_s),
        checkpoint_s=_series(checkpoint_s),
        waiting_s=_series(waiting_s),
        waited_for=waited_for,
    )


def _waiting(steps: Steps) -> tuple[Floats, tuple[tuple[int, float], ...]]:
    """[steps]: the wait for the latest rank, mean over ranks; and each rank's share of being the one waited for.

    A rank waits in collectives as much longer as it arrives earlier than the latest. What backward hides of that is
    not in ``comm_s``: the wait is no longer than what this rank's ``comm_s`` exceeds that of the rank with the least.
    """
    if len(steps.ranks) < 2 or not steps.steps:
        return np.zeros(len(steps.steps)), ()
    comm_s, collective_s = steps.values["comm_s"], steps.values["collective_s"]
    late_s = lateness_s(collective_s)
    several = np.isfinite(late_s).any(axis=1)
    waited = np.zeros(comm_s.shape)
    early_s = collective_s[several] - np.nanmin(collective_s[several], axis=1, keepdims=True)
    longer_s = comm_s[several] - np.nanmin(comm_s[several], axis=1, keepdims=True)
    waited[several] = np.nan_to_num(np.minimum(early_s, longer_s))
    mean: Floats = waited.sum(axis=1) / np.isfinite(steps.values["t"]).sum(axis=1)
    latest = np.argmax(np.nan_to_num(late_s), axis=1)
    of_rank = np.bincount(latest, weights=mean, minlength=len(steps.ranks))
    if of_rank.sum() <= 0:
        return mean, ()
    order = np.argsort(-of_rank, kind="stable")
    shares = of_rank / of_rank.sum()
    return mean, tuple((steps.ranks[int(one)], float(shares[one])) for one in order if shares[one] > 0)


def _traffic(steps: Steps) -> Traffic:
    totals = {name: float(np.nansum(values)) for name, values in steps.values.items()}
    wire, dense, step_s = (totals.get(name, 0.0) for name in ("wire_bytes", "dense_bytes", "step_s"))
    inside, took = (steps.values.get(name, np.empty(0)) for name in ("collective_s", "step_s"))
    looked_s = float(np.nansum(np.where(np.isfinite(inside), took, 0.0)))
    return Traffic(
        wire_bytes=int(wire),
        dense_bytes=int(dense),
        ratio=dense / wire if wire > 0 else None,
        collective_share=float(np.nansum(inside)) / looked_s if looked_s > 0 else 0.0,
        codec_share=totals["codec_s"] / step_s if step_s > 0 else 0.0,
        alpha=_median(steps, "alpha"),
        residual=_median(steps, "residual"),
    )


def _median(steps: Steps, name: str) -> float | None:
    values = steps.values.get(name, np.empty(0))
    measured = values[np.isfinite(values)]
    return float(np.median(measured)) if measured.size else None


def _checkpoints(loaded: Loaded, steps: Steps) -> Checkpoints:
    saved: dict[tuple[int, int, str], list[Record]] = {}
    failed: dict[tuple[int, int, str], str] = {}
    for attempt, record in loaded.others:
        if record.kind in ("checkpoint_saved", "checkpoint_failed"):
            where = (attempt, int(record.fields["step"]), str(record.fields.get("tier", "storage")))
            if record.kind == "checkpoint_saved":
                saved.setdefault(where, []).append(record)
            else:
                failed.setdefault(where, str(record.fields.get("reason", "")))
    worlds = {attempt: int(one.fields["world_size"]) for attempt, one in loaded.others if one.kind == "run_started"}
    rows = []
    for where in sorted({*saved, *failed}):
        attempt, step, tier = where
        parts = saved.get(where, [])
        committed = any(part.fields.get("committed") for part in parts)
        ranks = len({part.rank for part in parts})
        # Copies of a memory checkpoint have no commit of their own.
        whole = "copied" if tier in ("partner", "local") and ranks == worlds.get(attempt) else "written"
        rows.append(
            CheckpointRow(
                step=step,
                attempt=attempt,
                tier=tier,
                state="committed" if committed else "failed" if where in failed else whole,
                ranks=ranks,
                size_bytes=sum(int(part.fields.get("size_bytes", 0)) for part in parts),
                blocked_s=max((float(part.fields.get("blocked_s", 0.0)) for part in parts), default=0.0),
                durable_s=max((float(part.fields.get("durable_s", 0.0)) for part in parts), default=0.0),
                reason="" if committed else failed.get(where, ""),
            )
        )
    shares = _split(steps).shares()
    return Checkpoints(rows=tuple(rows), time_share=shares["checkpoint"])


def _lateness(steps: Steps, hosts: Hosts) -> Lateness:
    if not steps.steps:
        return Lateness(steps=(), ranks=(), hosts=(), late_ms=())
    # steps in which nobody looked at collectives would be gaps in every picture
    looked = np.flatnonzero(np.isfinite(steps.values["collective_s"]).any(axis=1))
    late_ms = lateness_s(steps.values["collective_s"])[looked] * 1e3
    newest: dict[int, str] = {}
    for where in sorted(hosts):
        newest[where[2]] = hosts[where]
    return Lateness(
        steps=tuple(steps.steps[int(at)] for at in looked),
        ranks=tuple(steps.ranks),
        hosts=tuple(newest.get(rank, UNKNOWN_HOST) for rank in steps.ranks),
        late_ms=tuple(_series(column) for column in late_ms.T),
    )


def _verdict(
    rows: tuple[StragglerRow, ...], phases: tuple[SlowPhase, ...], ranks: int, config: DiagnosticsConfig
) -> str:
    if ranks == 0:
        return "No verdict on stragglers: no step was finished."
    if ranks == 1:
        return "No straggler: there is only one rank."
    stragglers = [row for row in rows if row.straggler]
    if stragglers:
        parts = [
            f"rank {row.rank} on {row.host} ({row.median_lateness_ms:.1f} ms late in the median step, the latest in "
            f"{row.latest_share:.0%} of {row.steps} steps, which made steps {row.slowdown_share:.0%} longer"
            f"{_mostly(row, phases)})"
            for row in stragglers[:3]
        ]
        more = f", and {len(stragglers) - 3} more" if len(stragglers) > 3 else ""
        node = slow_node(rows)
        told = f"Node {node} is slow: {len(stragglers)} stragglers" if node else f"{len(stragglers)} stragglers"
        return f"{'Straggler' if len(stragglers) == 1 else told}: {'; '.join(parts)}{more}."
    if phases:
        named = "; ".join(f"rank {one.rank} on {one.host} in {one.which}" for one in phases[:3])
        more = f"; and {len(phases) - 3} more" if len(phases) > 3 else ""
        what = "a slow phase" if len(phases) == 1 else f"{len(phases)} slow phases"
        return f"No straggler over the whole run, but {what}: {named}{more}."
    judged = max((row.steps for row in rows), default=0)
    if judged < config.straggler_min_steps:
        return (
            f"No verdict on stragglers: it takes {config.straggler_min_steps} steps, and there are {judged} "
            f"(not counting the first {config.straggler_warmup_steps} of every start)."
        )
    worst = rows[0]
    return (
        f"No straggler: the latest rank, {worst.rank} on {worst.host}, was {worst.median_lateness_ms:.1f} ms late in "
        f"the median step and the latest in {worst.latest_share:.0%} of {worst.steps} steps."
    )


def _mostly(row: StragglerRow, phases: tuple[SlowPhase, ...]) -> str:
    """The phases in which a straggler was slow."""
    own = [one.which for one in phases if (one.rank, one.host) == (row.rank, row.host)]
    return f", slow in {' and '.join(own[:3])}" if own else ""


def _gaps(loaded: Loaded, steps: Steps, begun: Begun) -> list[str]:
    """Steps without an event of every rank, and ranks of the newest start without an event of their end."""
    gaps = []
    if steps.steps:
        lacking = np.isnan(steps.values["t"]).any(axis=1)
        if lacking.any():
            first, count = steps.steps[int(np.flatnonzero(lacking)[0])], int(lacking.sum())
            gaps.append(
                f"{count} step{'s' if count > 1 else ''} without an event of every rank, the first is step {first}"
            )
    if begun:
        last = max(begun)[:2]
        ranks = {where[2] for where in begun if where[:2] == last}
        ended = {r.rank for a, r in loaded.others if r.kind == "run_ended" and (a, r.generation) == last}
        silent = sorted(ranks - ended)
        if silent:
            names = ", ".join(map(str, silent[:8])) + (" …" if len(silent) > 8 else "")
            gaps.append(
                f"rank{'s' if len(silent) > 1 else ''} {names} of attempt {last[0]}: no event of the end; "
                "still running, or killed"
            )
    unwatched = sorted({(a, r.rank) for a, r in loaded.others if r.kind == RankUnwatched.kind})
    if unwatched:
        names = ", ".join(f"{rank} of attempt {attempt}" for attempt, rank in unwatched[:8])
        more = " …" if len(unwatched) > 8 else ""
        gaps.append(f"shared memory was full: not watched were ranks {names}{more}; what they did in a hang is unknown")
    return gaps
