"""Steps that took far longer than usual and then went on: how much time they cost, and where it went."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from outlast.diagnostics import formatting as fmt
from outlast.diagnostics.config import DiagnosticsConfig
from outlast.diagnostics.report.incidents import Incident
from outlast.diagnostics.report.load import Floats, Steps
from outlast.diagnostics.report.node_causes import NodeCauses
from outlast.diagnostics.report.phases import SlowPhase
from outlast.diagnostics.report.rank_causes import RankCauses
from outlast.diagnostics.report.stragglers import Bools, Indices, behind_peers_s, lateness_s, steps_after_warmup

_STRETCH = 3.0
_GAP_STEPS = 3
"""Steps of the usual length that a slow stretch may have in a row."""
HALF = 0.5
"""A part of the step, or a rank, is the cause if it explains more than this share of the lost time."""


def find_stalls(
    steps: Steps,
    begin_t: float,
    config: DiagnosticsConfig,
    phases: Sequence[SlowPhase] = (),
    causes: NodeCauses | None = None,
    own: RankCauses | None = None,
) -> tuple[Incident, ...]:
    """Each unbroken stretch of slow steps as one incident, oldest first.

    A step is slow if it took ``stall_factor`` median steps, and ``stall_min_s`` more than one, on any rank; the first
    steps of a start are not counted. Many short steps in a row that are slow together are a stall, too. What a rank's
    slow phase explains is no stall. What a node's monitor or the rank itself saw at the time is named with it.
    """
    if not steps.steps:
        return ()
    step_s = np.nanmax(steps.values["step_s"], axis=1)
    counted = steps_after_warmup(steps, config.straggler_warmup_steps)
    if not counted.any():
        return ()
    median_s = float(np.median(step_s[counted]))
    slow = counted & (step_s > max(config.stall_factor * median_s, median_s + config.stall_min_s))
    slow |= _slow_stretches(step_s, median_s, counted, config)
    found = []
    for is_slow, group in itertools.groupby(range(len(slow)), key=lambda at: bool(slow[at])):
        if is_slow:
            at = np.fromiter(group, dtype=np.int64)
            stall = _incident(steps, at, step_s, median_s, counted, begin_t, causes, own)
            first, last = steps.steps[int(at[0])], steps.steps[int(at[-1])]
            if not any(one.rank == stall.rank and one.first_step <= first and last <= one.last_step for one in phases):
                found.append(stall)
    return tuple(found)


def _slow_stretches(step_s: Floats, median_s: float, counted: Bools, config: DiagnosticsConfig) -> Bools:
    """Steps of stretches that are slow as a whole: short steps on a throttled processor, none of which takes long.

    The steps of a stretch take ``stall_factor`` median steps, but for a few between them, and cost ``_STRETCH`` times
    ``stall_min_s`` together.
    """
    found = np.zeros(len(step_s), dtype=bool)
    slow = np.flatnonzero(counted & (step_s > config.stall_factor * median_s))
    for stretch in np.split(slow, np.flatnonzero(np.diff(slow) > _GAP_STEPS + 1) + 1):
        if len(stretch) > 1 and (step_s[stretch] - median_s).sum() > _STRETCH * config.stall_min_s:
            found[stretch[0] : stretch[-1] + 1] = True
    return found & counted


def _incident(
    steps: Steps,
    at: Indices,
    step_s: Floats,
    median_s: float,
    counted: Bools,
    begin_t: float,
    causes: NodeCauses | None,
    own: RankCauses | None,
) -> Incident:
    first, last = steps.steps[int(at[0])], steps.steps[int(at[-1])]
    which = f"step {first}" if first == last else f"steps {first} to {last}"
    took_s = float(step_s[at].sum())
    lost_s = took_s - median_s * len(at)
    why, rank = _cause(steps, at, lost_s, counted, own)
    times = [float(one) for one in steps.values["t"][int(at[0])] if math.isfinite(one)]
    began_t = min(times) - float(step_s[at[0]])
    if causes is not None and (node := causes.during(began_t, began_t + took_s, rank)):
        why += f"; {node}"
    cause = f"{which} stalled for {fmt.duration(lost_s)}: {why}"
    return Incident(
        at_s=max(0.0, began_t - begin_t),
        kind="stall",
        severity="warn",
        title=f"{which} took {fmt.duration(took_s)} instead of {fmt.duration(median_s * len(at))}",
        detail=f"{why}; it went on by itself, and cost {fmt.duration(lost_s)}",
        step=first,
        rank=rank,
        cause=cause,
        cost_s=lost_s,
    )


def _cause(steps: Steps, at: Indices, lost_s: float, counted: Bools, own: RankCauses | None) -> tuple[str, int | None]:
    """Where most of the time went, and on which rank alone."""

    def excess_s(name: str) -> Floats:
        """[ranks]: seconds more than usual in a part of the step."""
        values = steps.values[name]
        usual = np.nan_to_num(np.nanmedian(values[counted], axis=0))
        more: Floats = np.nan_to_num(values[at]).sum(axis=0) - usual * len(at)
        return more

    parts = {"waiting for data": excess_s("data_s"), "saving checkpoints": excess_s("checkpoint_s")}
    late = lateness_s(steps.values["collective_s"])
    late_s = np.nan_to_num(late[at]).sum(axis=0)
    if len(steps.ranks) > 1 and late_s.max() > HALF * lost_s:
        column = int(late_s.argmax())
        part = next((name for name, more in parts.items() if more[column] > HALF * lost_s), "outside collectives")
        rank = steps.ranks[column]
        seen = own.of(column, at, behind_peers_s(late, at, column)) if own is not None else None
        because = f"; {seen.words}" if seen is not None else ""
        waited = fmt.duration(float(late_s.max()))
        return f"its peers waited {waited} for rank {rank}, which was slow {part}{because}", rank
    for name, more in parts.items():
        if more.min() > HALF * lost_s:
            return f"all ranks were slow {name}", None
    if own is not None and (words := own.of_all(at, counted, lost_s)):
        return f"all ranks were {words}", None
    took, inside = steps.values["step_s"][at], steps.values["collective_s"][at]
    if (np.isfinite(took) & ~np.isfinite(inside)).any():
        return "nobody knows in what, for collectives are not looked at in every step", None
    if excess_s("collective_s").min() > HALF * lost_s:
        return "all ranks spent it inside collectives: the network was slow or cut, or a rank stood still there", None
    return "all ranks were slow outside collectives, as on a busy, throttled or suspended machine", None
